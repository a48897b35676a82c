"""Benchmarks of covft, run from a clone: `python -m benchmarks.speed`, `python -m benchmarks.coverage`."""
