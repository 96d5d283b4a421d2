"""The policy: a Megatron-Core GPT, its optimizer, and the passes over packed micro-batches."""
