"""`python -m megatron_dypo convert import` as a script; see `--help`. Under torchrun the ranks share the work."""

import sys

from megatron_dypo.cli import script

sys.argv[1:1] = ["convert", "import"]
script()
