"""What a run tells its user: ``metrics.jsonl``, wandb and TensorBoard, the terminal, and one self-contained page."""
