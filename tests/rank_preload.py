"""What the fork server of ``tests/ranks.py`` imports once: megatron-core under the CPU shim, and nothing that computes.

A fork after any OpenMP work hangs, so the server must never run a tensor operation.
"""

import warnings

warnings.filterwarnings("ignore")

import megatron_dypo.policy.policy  # noqa: E402, F401
from megatron_dypo.runtime import cpu_shim  # noqa: E402

cpu_shim.install()
