"""Measure what docs/ claims: each script runs everything that it compares."""
