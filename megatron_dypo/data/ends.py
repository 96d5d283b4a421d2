"""Which tokens end a response: what a model folder's ``generation_config.json`` names, and the tokenizer's own end.

transformers stops at the former, vLLM at both. Llama-3-Instruct ends a turn with ``<|eot_id|>`` while its first
release's tokenizer names ``<|end_of_text|>``; Qwen2.5-Instruct has ``<|im_end|>`` and ``<|endoftext|>``.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from megatron_dypo.errors import UserError

log = logging.getLogger(__name__)


def end_ids(backend: Any, folders: list[Path], vocab_size: int) -> tuple[int, ...]:
    """The tokenizer's end token first, then every end that ``folders`` name, in their order.

    The first folder is the tokenizer's own. Another folder's ids count where they are special tokens of this tokenizer,
    and are left out with a warning where they are not. Raises UserError for an end that is not a token id.
    """
    special = {index for index, token in backend.added_tokens_decoder.items() if token.special}
    found = [backend.eos_token_id]
    for number, folder in enumerate(folders):
        for index in named_ends(folder):
            if index < vocab_size and (number == 0 or index in special):
                found.append(index)
                if index not in backend.added_tokens_decoder and index != backend.eos_token_id:
                    token = backend.convert_ids_to_tokens(index)
                    why = "no special token of the tokenizer, and ends responses all the same"
                    log.warning("%s: its end token %d (%r) is %s", folder, index, token, why)
            else:
                why = "beyond the model's vocabulary" if index >= vocab_size else "not a special token of the tokenizer"
                log.warning("%s: its end token %d is %s, and is left out", folder, index, why)
    return tuple(dict.fromkeys(found))


def named_ends(folder: Path) -> list[int]:
    """``eos_token_id`` of ``generation_config.json``, or where that names none of ``config.json``, as transformers."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = _object(path).get("eos_token_id") if path.is_file() else None
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(index) is int and index >= 0 for index in ids):
            raise UserError(f"{path}: eos_token_id: expected a token id or a list of them, got {value!r:.80}")
        return ids
    return []


def _object(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected an object")
    return tree
