"""Imports of the fork server of ``tests/ranks.py``, once: everything that a run with the transformers engine needs.

Nothing here computes: a fork after any OpenMP work hangs, so the server must never run a tensor operation. Nor may it
start CUDA, which no forked rank could then use: torch asks the driver's management library for devices instead.
"""

import os
import warnings
from importlib.util import find_spec

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
warnings.filterwarnings("ignore")

import pytest  # noqa: E402, F401 - what the modules of the ranks' functions import
from transformers import AutoModelForCausalLM  # noqa: E402, F401
from transformers.models.llama import modeling_llama  # noqa: E402, F401

import megatron_dypo.cli  # noqa: E402
import megatron_dypo.trainer  # noqa: E402, F401
from megatron_dypo.runtime import cpu_shim  # noqa: E402

if find_spec("hypothesis"):
    import hypothesis  # noqa: F401 - where it is installed
cpu_shim.install()
