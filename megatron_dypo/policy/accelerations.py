"""Select the faster layers, attention and fused operations that are installed; the only place that does.

``choose`` reads the configuration and what was ``Found``, so a test can simulate any machine; ``explained`` lists the
same for ``doctor``. The optimizer's kernels are chosen where it is built (model.py), vLLM's by vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_dypo.config.schema import Model
from megatron_dypo.runtime import versions
from megatron_dypo.runtime.distributed import training_dtype

_MODULES = ("flash_attn_interface", "fused_weight_gradient_mlp_cuda", "transformer_engine")
MOST_FLASH_WIDTH = 256  # of a head, in torch's own flash attention and in FlashAttention 3
_KERNELS = {  # best first; torch's name: (module, minimum torch for training, compute capabilities, widest head)
    "FA3": ("flash_attn_interface", (2, 11), (9,), MOST_FLASH_WIDTH),
    # its backward pass takes heads up to 128 on both devices; torch 2.11 has no causal window for it
    "FA4": ("flash_attn.cute", (2, 12), (9, 10), 128),
}


@dataclass(frozen=True)
class Found:
    """The machine's ``cuda`` (is there a device), ``torch`` release, and importable optional ``modules``."""

    cuda: bool
    torch: tuple[int, ...]
    modules: frozenset[str] = frozenset()

    @property
    def transformer_engine(self) -> bool:
        return {"transformer_engine", "transformer_engine_torch"} <= self.modules


class Accelerations(NamedTuple):
    """The choice for one model; ``attention``: te, flash or sdpa, as in `model.attention_backend`."""

    transformer_engine: bool  # its layers, RMSNorm, attention and RoPE
    attention: str
    compiled: bool  # SwiGLU and RoPE, one kernel each, by torch's compiler
    apex_gradients: bool  # Apex's kernel adds weight gradients to main_grad; otherwise a matrix product of torch


class Acceleration(NamedTuple):
    """A line of ``doctor``: its name, whether it is in use, and why, or what is used instead."""

    name: str
    in_use: bool
    why: str


def on_this_machine() -> Found:
    """Find the optional modules without importing them or starting CUDA."""
    modules = {name for name in _MODULES if find_spec(name) is not None}
    if "transformer_engine" in modules and _has_file("transformer_engine", "transformer_engine_torch*.so"):
        modules.add("transformer_engine_torch")
    if _has_file("flash_attn", "cute/interface.py"):
        modules.add("flash_attn.cute")
    return Found(torch.cuda.is_available(), versions.release(torch.__version__), frozenset(modules))


def _has_file(package: str, pattern: str) -> bool:
    """Return whether a package has such a file in its folder, its ``wheel_lib``, or next to it, as extensions do."""
    spec = find_spec(package)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    return any(next(place.glob(pattern), None) for f in folders for place in (f, f / "wheel_lib", f.parent))


def choose(model: Model, width: int, found: Found | None = None) -> Accelerations:
    """Return what ``model``, with heads of this ``width``, gets on a machine with ``found``; default: this one.

    Anything it asks for by name is granted: ``refusal`` reports what is impossible.
    """
    found = found or on_this_machine()
    half = training_dtype(model.dtype) == torch.bfloat16
    asked = {model.layer_spec, model.attention_backend}
    # in fp32 Transformer Engine only has an attention that writes scores to memory
    engine = "te" in asked or (asked == {"auto"} and found.cuda and half and found.transformer_engine)
    flash = "flash" if found.cuda and half and takes_flash(width) else "sdpa"
    attention = "te" if engine else flash if model.attention_backend == "auto" else model.attention_backend
    return Accelerations(
        transformer_engine=engine,
        attention=attention,
        compiled=found.cuda,
        apex_gradients=found.cuda and "fused_weight_gradient_mlp_cuda" in found.modules,
    )


def takes_flash(width: int) -> bool:
    """Return whether torch's flash attention supports heads of this ``width``."""
    return width % 8 == 0 and width <= MOST_FLASH_WIDTH


def refusal(model: Model, width: int, found: Found | None = None) -> str | None:
    """Return why ``model`` cannot have what it asks for by name, and what to set instead; None if it can."""
    found = found or on_this_machine()
    dtype = "bf16" if training_dtype(model.dtype) == torch.bfloat16 else "fp32"
    if "te" in (model.layer_spec, model.attention_backend):
        name = "layer_spec" if model.layer_spec == "te" else "attention_backend"
        lacks = [
            *(["CUDA, and no device is found"] if not found.cuda else ()),
            *(["Transformer Engine, which is not installed"] if "transformer_engine" not in found.modules else ()),
        ]
        if not lacks and not found.transformer_engine:
            lacks = ["Transformer Engine's PyTorch extension: only transformer_engine is installed, without it"]
        if lacks:
            return (
                f"model.{name}: te needs {' and '.join(lacks)}: pip install 'transformer-engine[pytorch]' on a machine "
                f"with a GPU, or model.{name}: auto"
            )
    if model.attention_backend == "flash":
        for fails, found_here, serves in (
            (not found.cuda, "needs CUDA, and no device is found", "model.attention_backend: sdpa"),
            (dtype != "bf16", "takes bf16, and model.dtype is fp32", "model.dtype: bf16, or attention_backend: sdpa"),
            (
                not takes_flash(width),
                f"takes heads of up to {MOST_FLASH_WIDTH} in steps of 8, and these have {width}",
                "model.attention_backend: sdpa",
            ),
        ):
            if fails:
                return f"model.attention_backend: flash {found_here}; {serves} serves"
    return None


def flash_kernels(found: Found, capability: tuple[int, int], width: int) -> dict[str, str]:
    """Return why FlashAttention 3 and 4 (best first) cannot run here with heads of this ``width``; "" if they can.

    ``capability`` is the CUDA device's. Only ``flash_kernels.py`` can tell whether the installed package works with
    this torch.
    """
    reasons = {}
    for name, (module, release, devices, widest) in _KERNELS.items():
        checks = (
            (module not in found.modules, f"{module} is not installed"),
            (found.torch < release, f"needs torch {'.'.join(map(str, release))}"),
            (capability[0] not in devices, f"is for compute capability {' and '.join(f'{d}.x' for d in devices)}"),
            (width % 8 or width > widest, f"takes heads of up to {widest}, in steps of 8: these have {width}"),
        )
        reasons[name] = next((why for fails, why in checks if fails), "")
    return reasons


def explained(found: Found | None = None, capability: tuple[int, int] = (0, 0), width: int = 128) -> list[Acceleration]:
    """Return each acceleration of the layers on this machine, for a bf16 model with heads of this ``width``."""
    found = found or on_this_machine()
    if not found.cuda:
        return [Acceleration("accelerations", False, "none apply without CUDA")]
    chosen = choose(Model(preset="tiny", dtype="bf16"), width, found)
    engine, lines = chosen.transformer_engine, []
    missing = "transformer_engine is not installed"
    if "transformer_engine" in found.modules:
        missing = "transformer_engine is installed without its PyTorch extension (transformer_engine_torch)"
    layers = "its layers, RMSNorm, attention and RoPE (model.layer_spec: local does without)"
    lines.append(Acceleration("TE layers", engine, layers if engine else missing))
    if not engine:
        reasons = flash_kernels(found, capability, width)
        best = next((name for name, why in reasons.items() if not why), None)
        lines += [Acceleration(name, name == best, why or ("if it agrees with FA2 at startup" if name == best else
                  f"{best} takes precedence")) for name, why in reasons.items()]  # fmt: skip
        lines.append(
            Acceleration("FA2", best is None, "torch's own flash attention" if best is None else f"{best} takes over")
        )
    both = "SwiGLU" if engine else "SwiGLU and RoPE"
    lines.append(Acceleration("compiled", chosen.compiled, f"{both}, by torch before the first step"))
    apex = "Apex's kernel" if chosen.apex_gradients else "torch's product with fp32 sum; Apex's kernel is not needed"
    lines.append(Acceleration("fused weight gradients", True, "Transformer Engine's" if engine else apex))
    return lines
