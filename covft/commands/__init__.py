"""Commands of `covft` that are more than a few lines; `covft/cli.py` registers them."""
