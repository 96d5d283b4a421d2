"""Prompts, answers and teacher traces as ``Prompt`` records, their order, and text to token ids."""
