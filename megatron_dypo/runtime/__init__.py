"""What a process needs before it can train: CPU shim, process groups, seeds, deadlines."""
