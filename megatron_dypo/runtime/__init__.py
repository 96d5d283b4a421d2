"""Process-level setup for training: CPU shim, process groups, seeds, deadlines."""
