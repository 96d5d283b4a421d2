"""Measurements that back the claims in docs/: each a script that runs everything it compares."""
