"""A stand-in for the package of LLaVA: its names, signatures and flow of data, in small."""
