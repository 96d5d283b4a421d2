"""Training checkpoints in mcore's distributed format: written atomically, read back exactly."""
