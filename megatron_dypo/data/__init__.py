"""Read prompts, answers and teacher traces as ``Prompt`` records, order them, and turn text into token ids."""
