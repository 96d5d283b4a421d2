"""Token ids back to text for the report, by the run's tokenizer where that needs neither torch nor a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from megatron_dypo.monitor.run_data import Run


def decoder(run: Run) -> tuple[Callable[[list[int]], str], str]:
    """Ids to text, special tokens included, and a sentence about it; the ids themselves where there is no other way."""
    name = run.setting("model", "tokenizer") or run.setting("model", "hf")
    if name is None and run.setting("model", "preset") is not None:
        from megatron_dypo.data.arithmetic import arithmetic_tokens

        tokens = arithmetic_tokens()
        return lambda ids: tokens.decode(ids, skip_special_tokens=False), ""
    path = _tokenizer_file(str(name)) if name is not None else None
    if path is not None:
        from tokenizers import Tokenizer

        try:
            tokens = Tokenizer.from_file(str(path))
        except Exception:  # tokenizers has no type of its own for a file that it cannot read
            pass
        else:
            return lambda ids: tokens.decode(ids, skip_special_tokens=False), ""
    return lambda ids: " ".join(map(str, ids)), f"Token ids: {name or 'the tokenizer'} has no tokenizer.json here."


def _tokenizer_file(name: str) -> Path | None:
    """``tokenizer.json`` of a folder, or of a hub model that has been downloaded."""
    if "\0" in name:
        return None
    path = Path(name) / "tokenizer.json"
    if os.path.isfile(path):
        return path
    if os.path.isabs(name) or name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
