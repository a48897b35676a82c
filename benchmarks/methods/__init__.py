"""What each method of `covft.tune` costs on one tower: parameters, operations, bytes and time, all in one run."""
