"""What a model looks like: its shape, its weights by both names, and how they are cut over ranks."""
