"""Benchmarks of covft, run from a clone: `python -m benchmarks.speed`, `benchmarks.coverage`, `benchmarks.methods`."""
