"""Load the configuration: one YAML file, typed and validated before anything is built.

``sections_*.py`` declare every key with its type, default and documentation (the only place); ``schema.py`` combines
them and ``load.py`` reads files and overrides. ``reads.py`` says when a key is read, ``checks.py`` holds rules across
keys, ``renamed.py`` and ``synonyms.py`` the names that keys had before and have elsewhere. ``render.py`` prints
``--help`` and the reference page.
"""

from megatron_dypo.config.load import load_config
from megatron_dypo.config.schema import Config

__all__ = ["Config", "load_config"]
