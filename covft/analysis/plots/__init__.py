"""Figures of the numbers, with matplotlib."""
