"""Configuration: one YAML file, typed and validated before anything is built.

``schema.py`` holds every key with its type, default and documentation (the only place), ``load.py`` reads files and
overrides, ``checks.py`` holds the rules that span several keys, ``renamed.py`` and ``synonyms.py`` the names that keys
had before and have elsewhere, ``render.py`` prints ``--help`` and the reference page.
"""

from megatron_dypo.config.load import load_config
from megatron_dypo.config.schema import Config

__all__ = ["Config", "load_config"]
