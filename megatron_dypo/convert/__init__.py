"""Hugging Face names and layouts <-> Megatron-Core's: one table serves initialisation, import, export and sync."""
