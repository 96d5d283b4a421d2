"""What the fork server of ``tests/ranks.py`` imports once: all that a run with the transformers engine does.

Nothing here computes: a fork after any OpenMP work hangs, so the server must never run a tensor operation.
"""

import warnings

warnings.filterwarnings("ignore")

import hypothesis  # noqa: E402, F401 - with pytest, what the modules of the ranks' functions import
import pytest  # noqa: E402, F401
from transformers import AutoModelForCausalLM  # noqa: E402, F401
from transformers.models.llama import modeling_llama  # noqa: E402, F401

import megatron_dypo.cli  # noqa: E402
import megatron_dypo.train  # noqa: E402, F401
from megatron_dypo.runtime import cpu_shim  # noqa: E402

cpu_shim.install()
