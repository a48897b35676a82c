"""Commands of `covft` with modules of their own; `covft.cli` registers them."""
