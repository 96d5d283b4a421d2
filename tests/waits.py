"""Count on the CPU where the host would wait for the device.

Parameters, and what is moved to or created on the policy's device, count as the device's, and so does everything
computed from them. A wait is a value of theirs that the host reads: ``item``, ``tolist``, ``bool``, a move to the CPU,
or an operation whose result's size depends on values (``nonzero``, indexing by a mask, ...). Values that were never on
the device cost nothing.
"""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from megatron.core.transformer.moe import token_dispatcher
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)  # a CPU that is another device than torch.device("cpu")
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
          "equal"}  # fmt: skip
_READS = ("tolist", "numpy", "cpu")


class Waits(TorchDispatchMode):
    """Counts waits by the line of Python that causes them, in ``where``."""

    def __init__(self, parameters):
        super().__init__()
        self.where: Counter[str] = Counter()
        self._on_device = {}  # a storage's address -> the storage, so that no other gets it
        for parameter in parameters:
            for tensor in (parameter, getattr(parameter, "main_grad", None)):
                if tensor is not None:
                    self._mark(tensor)

    @property
    def count(self) -> int:
        return sum(self.where.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = function.overloadpacket.__name__
        on_device = any(map(self._has, given)) or kwargs.get("device") == DEVICE
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        uncounted = name == "repeat_interleave" and kwargs.get("output_size") is None
        if on_device and (name in _WAITS or masks or uncounted):
            self._wait(name)
        if (
            name in ("_to_copy", "copy_")
            and given
            and self._has(given[-1])
            and kwargs.get("device") == torch.device("cpu")
        ):
            self._wait("to the CPU")
        result = function(*args, **kwargs)
        if on_device:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._mark(leaf)
        return result

    def __enter__(self):
        self._patches = ExitStack()
        for name in _READS:
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._read(getattr(torch.Tensor, name))))
        self._patches.enter_context(mock.patch.object(torch.Tensor, "to", self._moved(torch.Tensor.to)))
        self._patches.enter_context(mock.patch.object(torch, "tensor", self._made(torch.tensor)))
        self._patches.enter_context(mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", self._to_host))
        return super().__enter__()

    def __exit__(self, *failure):
        self._patches.close()
        return super().__exit__(*failure)

    def _read(self, real):
        def read(tensor, *args, **kwargs):
            if self._has(tensor):
                self._wait(real.__name__)
            return real(tensor, *args, **kwargs)

        return read

    def _moved(self, real):
        def to(tensor, *args, **kwargs):
            moved = real(tensor, *args, **kwargs)
            wanted = [where for where in (*args, kwargs.get("device")) if isinstance(where, str | torch.device)]
            if DEVICE in wanted:
                self._mark(moved)
            elif wanted and self._has(tensor):
                self._wait("to")
            return moved

        return to

    def _made(self, real):
        """Wrap ``torch.tensor`` with a device, whose dispatch does not include the device."""

        def tensor(*args, **kwargs):
            made = real(*args, **kwargs)
            if kwargs.get("device") == DEVICE:
                self._mark(made)
            return made

        return tensor

    def _to_host(self, tensor, as_numpy=False, record_stream=False):
        """Imitate mcore on CUDA: a copy, and one wait for it."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        self._wait("to the CPU")
        with _disable_current_modes():
            copied = tensor.clone()
        return copied.numpy() if as_numpy else copied

    def _mark(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._on_device[storage.data_ptr()] = storage

    def _has(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._on_device

    def _wait(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        frame = next(frame for frame in reversed(frames) if not frame.filename.endswith("tests/waits.py"))
        self.where[f"{what} at {'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno}"] += 1


@contextmanager
def device_is_marked():
    """Within the block the policy's device is ``DEVICE``, for our code and for mcore's current CUDA device."""
    import megatron_dypo.policy.moe as routing
    import megatron_dypo.policy.policy as policy
    import megatron_dypo.training.step as step

    with ExitStack() as stack:
        for module in (policy, routing, step):
            stack.enter_context(mock.patch.object(module, "device", lambda: DEVICE))
        yield
