"""Convert Hugging Face names and layouts <-> Megatron-Core's: one table for initialisation, import, export and sync."""
