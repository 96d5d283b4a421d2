"""An engine's routing of tokens, in memory and as text (a recorded rollout, a server's response).

Legend: n tokens of prompt and response except the last, which the engine never read; L layers, K experts of a token.
"""

from __future__ import annotations

import base64
import io
import math
from tokenize import TokenError

import numpy as np
from numpy.lib import format as npy


def compact(experts_nLK: np.ndarray) -> np.ndarray:
    """Return a copy with one byte per choice if all experts fit, else two."""
    experts_nLK = np.asarray(experts_nLK)
    return experts_nLK.astype(np.uint8 if experts_nLK.max(initial=0) < 256 else np.uint16)


def as_text(experts_nLK: np.ndarray) -> str:
    """Return the base64 of an ``.npy`` file: vLLM's format."""
    stream = io.BytesIO()
    np.save(stream, experts_nLK, allow_pickle=False)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def from_text(text: str, tokens: int) -> np.ndarray:
    """Return [n, L, K] for a prompt and response of ``tokens`` tokens. Raises ValueError if it is anything else.

    The header is checked before memory is allocated: ``np.load`` would trust any size that it names, and open archives.
    """
    content = base64.b64decode(text, validate=True)
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"experts: version {version} of the .npy format, not (1, 0)")
    try:
        shape, by_columns, dtype = npy.read_array_header_1_0(stream)
    except (TypeError, TokenError) as error:
        raise ValueError(f"experts: {error}") from None
    if len(shape) != 3 or shape[0] != tokens - 1 or min(shape) < 1 or dtype.kind not in "iu":
        raise ValueError(f"experts {list(shape)} ({dtype}) of {tokens} tokens")
    if len(content) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"experts: {len(content) - stream.tell()} bytes do not hold {list(shape)} of {dtype}")
    experts = np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")
    if experts.min() < 0 or experts.max() > np.iinfo(np.int16).max:
        raise ValueError(f"experts {experts.min()} to {experts.max()}")
    return experts
