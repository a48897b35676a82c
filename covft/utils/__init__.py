"""What every room may use: sharded weights, optional libraries."""
