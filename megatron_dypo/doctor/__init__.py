"""Report what is installed, which features it enables, what is wrong, and the command that fixes it."""
