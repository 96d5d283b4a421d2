"""Training checkpoints: mcore's distributed format, written atomically, read back exactly."""
