"""What is installed here, which paths it opens, what is wrong, and the command that mends it."""
