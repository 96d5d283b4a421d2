"""Host memory for copies of device memory: pinned if there is CUDA, and kept for the length of the run.

It is allocated in chunks of one size: torch rounds a pinned block up to a power of two, so a single block might cost
twice its size, and never releases it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

CHUNK = 2**28  # bytes, a power of two


class HostMemory:
    """A byte range starting at 0 over chunks that are added on demand."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []  # uint8 [CHUNK] each

    @property
    def nbytes(self) -> int:
        """Return the bytes allocated so far."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def places(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the bytes from ``start`` to ``stop`` in order, as one uint8 view per chunk."""
        while self.nbytes < stop:
            self._chunks.append(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))
        while start < stop:
            number, offset = divmod(start, len(self._chunks[0]))
            place = self._chunks[number][offset : offset + stop - start]
            yield place
            start += len(place)

    def beside(self, contents: Iterable[Tensor], longest: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (bytes of a content, their place here), piece by piece; contents [n] uint8 are placed end to end.

        Equal contents get equal places each time. A piece has at most ``longest`` bytes, if given.
        """
        used = 0
        for content in contents:
            begin = 0
            while begin < len(content):
                size = len(content) - begin if longest is None else min(longest, len(content) - begin)
                for place in self.places(used, used + size):
                    yield content[begin : begin + len(place)], place
                    begin, used = begin + len(place), used + len(place)


def rounded(size: float) -> float:
    """Return the bytes that HostMemory allocates for ``size`` bytes."""
    return -(-size // CHUNK) * CHUNK
