"""Stands in for VLMEvalKit's package."""

STARTED = []
