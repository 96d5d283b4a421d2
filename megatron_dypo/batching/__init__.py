"""Graded groups -> training sequences -> packed micro-batches. Imports torch and numpy at most."""
