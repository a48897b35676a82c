"""Counts what `covft.attach` adds to each checkpoint of `docs/models`, and writes the tables of these pages."""
