"""Shared tools: sharded weights, files, parameters, command-line options, optional libraries."""
