"""Speed and memory, as ratios in one run: against the obvious implementation and against the arithmetic."""
