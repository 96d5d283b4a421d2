"""Read a Hugging Face folder's ``config.json`` with transformers' configuration class of the family.

So a missing field has the family's default, and of two contradicting fields the same one counts as in transformers.
Fields that our Megatron-Core layers cannot follow are refused by name.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dypo.errors import UserError
from megatron_dypo.models.families import FAMILIES
from megatron_dypo.models.rules import Family

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from megatron_dypo.models.shape import ModelShape

# What a value must be: a description, and the test for it.
_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer from 1 on", lambda value: type(value) is int and 0 < value < 2**31),
    float: ("a positive number", lambda value: type(value) in (int, float) and 0 < value <= sys.float_info.max),
    bool: ("true or false", lambda value: type(value) is bool),
}

# Fields of ``ModelShape``: transformers' name, which a family's ``keys`` may replace, and the type.
FIELDS: dict[str, tuple[str, type]] = {
    "num_layers": ("num_hidden_layers", int),
    "hidden_size": ("hidden_size", int),
    "ffn_hidden_size": ("intermediate_size", int),
    "num_attention_heads": ("num_attention_heads", int),
    "num_query_groups": ("num_key_value_heads", int),
    "vocab_size": ("vocab_size", int),
    "max_position": ("max_position_embeddings", int),
    "norm_eps": ("rms_norm_eps", float),
    "tied_embeddings": ("tie_word_embeddings", bool),
    "init_std": ("initializer_range", float),
}
_MIXTURE = {"num_experts": int, "router_topk": int, "norm_topk_prob": bool, "shared_expert_ffn_hidden_size": int}
_ROPE = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}  # numbers of a rope type

# Fields that, if set, make transformers load something other than the folder's plain weights.
_REFUSED = {
    "quantization_config": "weights are read as they are: remove the field if they are not quantized",
    "compression_config": "weights are read as they are: remove the field if they are not compressed",
    "text_config": "a model within a model is not supported",
    "per_layer_config": "layers of different kinds are not supported",
    "transformers_weights": "rename that file to model.safetensors and remove the field",
    "configuration_files": "the configuration must be in config.json itself",
}
_SILU = ("silu", "swish")  # transformers' two names of one function


def read_config(path: Path) -> PreTrainedConfig:
    """Load the ``config.json`` at ``path`` with transformers, running no code but its own.

    Raises UserError, one line that names file and field, if transformers refuses it or a field is one of ``_REFUSED``.
    """
    raw = _json(path)
    where = f"model.hf: {path}"
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{where}: model_type {family!r:.80} is not supported; known: {', '.join(FAMILIES)}")
    for name, why in _REFUSED.items():
        if raw.get(name):
            raise UserError(f"{where}: {name}: {why}")
    if family == "mistral" and "layer_types" in raw:
        raise UserError(f"{where}: layer_types: with it transformers reads another family, ministral: not supported")

    for name, kind in _names(FAMILIES[family]).values():
        if raw.get(name) is not None:
            _fitting(path, name, raw[name], kind)

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[family].from_dict(copy.deepcopy(raw))
    except Exception as error:  # whatever transformers' validation raises; its text names the field
        reason = str(error).strip().splitlines()[-1].strip()
        field = re.search(r"Field '(\w+)'", reason)
        raise UserError(f"{where}: {f'{field[1]}: ' if field else ''}transformers refuses it: {reason:.300}") from None


def read_shape(path: Path) -> dict[str, Any]:
    """Return the fields of ``ModelShape`` in the ``config.json`` at ``path``; ``rope_scaling`` as a dict.

    Raises UserError as ``read_config``, and for unsupported values: another activation, sliding windows, RoPE other
    than ``default``, ``linear`` and ``llama3``, and what the family's ``only`` excludes.
    """
    config = read_config(path)
    family = FAMILIES[config.model_type]

    def fitting(name: str, value: Any, kind: type) -> Any:
        return _fitting(path, name, value, kind)

    def known(name: str, value: Any, values: tuple) -> None:
        if value not in values:
            supported = ", ".join(map(str, values))
            raise UserError(f"model.hf: {path}: {name} {value!r:.80} is not supported; known: {supported}")

    names = _names(family).items()
    fields = {field: fitting(name, getattr(config, name, None), kind) for field, (name, kind) in names}
    fields["head_dim"] = fitting("head_dim", _head_dim(config), int)
    known("hidden_act", config.hidden_act, _SILU)
    for name, values in family.only.items():
        known(name, getattr(config, name, None), values)
    for i, kind in enumerate(getattr(config, "layer_types", None) or ()):
        known(f"layer_types: layer {i} (use_sliding_window, max_window_layers)", kind, ("full_attention",))
    rope = config.rope_parameters
    known("rope type", rope.get("rope_type"), ("default", *_ROPE))
    known("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,))
    fields["rope_base"] = fitting("rope_theta", rope.get("rope_theta"), float)
    fields["rope_scaling"] = None
    if numbers := _ROPE.get(rope["rope_type"]):
        scaling = {name: fitting(name, rope.get(name), float) for name in numbers}
        if rope["rope_type"] == "llama3":
            name = "original_max_position_embeddings"
            scaling[name] = fitting(name, rope.get(name), int)
            if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
                raise UserError(
                    f"model.hf: {path}: rope scaling's low_freq_factor must be less than its high_freq_factor"
                )
        fields["rope_scaling"] = {"rope_type": rope["rope_type"], **scaling}
    fields["value_head"] = any(str(name).endswith("ForTokenClassification") for name in config.architectures or ())
    if fields["value_head"]:
        known("num_labels", config.num_labels, (1,))
        fields["tied_embeddings"] = False  # its head is never the embedding
    return {"family": config.model_type, **fields}


def write_config(
    shape: ModelShape, folder: Path, eos_id: int | tuple[int, ...] | None, dtype: torch.dtype | None = None
) -> None:
    """Write ``config.json`` and ``generation_config.json`` of the shape, without weights.

    ``eos_id``: one or several; ``dtype``: that of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = isinstance(eos_id, tuple) and len(eos_id) == 1
    end = {} if eos_id is None else {"eos_token_id": eos_id[0] if alone else eos_id}
    named = {"torch_dtype": dtype_name(dtype)} if dtype else {}
    (folder / "config.json").write_text(json.dumps(shape.to_hf_config() | end | named, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(end, indent=2))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(family: Family) -> dict[str, tuple[str, type]]:
    """Return ``FIELDS`` under the family's names, with those of a mixture."""
    names = {field: (family.keys.get(field, name), kind) for field, (name, kind) in FIELDS.items()}
    return names | {field: (family.keys[field], kind) for field, kind in _MIXTURE.items() if field in family.keys}


def _fitting(path: Path, name: str, value: Any, kind: type) -> Any:
    description, fits = _KINDS[kind]
    if not fits(value):
        raise UserError(f"model.hf: {path}: {name} must be {description}, got {value!r:.80}")
    return kind(value)


def _head_dim(config: PreTrainedConfig) -> Any:
    """Return the head width as transformers' attention does: null has a default only if the class has the field."""
    value = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    if value is None and "head_dim" in type(config).__dataclass_fields__:
        return config.hidden_size // config.num_attention_heads
    return value


def _json(path: Path) -> dict[str, Any]:
    """Return the file's content, read as text as transformers does, so that neither accepts a byte order mark."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        mark = " (save it without the byte order mark)" if "BOM" in str(error) else ""
        raise UserError(f"model.hf: cannot read {path}: {error}{mark}") from None
    if not isinstance(raw, dict):
        raise UserError(f"model.hf: {path} holds no configuration")
    return raw
