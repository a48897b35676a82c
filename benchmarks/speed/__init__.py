"""Speed and memory, relative to the obvious implementation and to the arithmetic, within one run."""
