"""DYPO (Dynamic Policy Optimization) post-training on Megatron-Core and vLLM.

The package reads in the order the data flows: ``data`` -> ``rollout`` -> ``reward`` -> ``training`` and ``objectives``
-> ``policy`` and ``kernels`` -> ``weight_sync`` -> ``checkpoint``; ``trainer.py`` is the loop that joins them,
``records.py`` the record that travels. Importing this package imports none of torch, megatron or vllm: the names of the
Python API are imported when they are first asked for (PEP 562).
"""

from importlib import import_module

__version__ = "0.2.0.dev0"

_API = {
    "Config": "config.schema",
    "load_config": "config.load",
    "train": "trainer",
    "Policy": "policy.policy",
    "linear_logprob": "kernels",
    "linear_loss": "kernels",
    "dypo_loss": "objectives",
    "build_reward": "reward",
    "final_answer": "reward",
    "plan": "planner.search",
}
__all__ = ["__version__", *_API]


def __getattr__(name: str) -> object:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_API[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
