"""Settings for all tests: machines are shared, so no example is judged by its time."""

from hypothesis import settings

settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
