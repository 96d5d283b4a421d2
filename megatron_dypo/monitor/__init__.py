"""A run's output for its user: ``metrics.jsonl``, wandb and TensorBoard, the terminal, and a self-contained report."""
