"""Bytes per GPU of LLaVA with covft, counted on the meta device."""
