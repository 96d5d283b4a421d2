"""Describe a model: its shape, its weights under both names, and how they are sharded over ranks."""
