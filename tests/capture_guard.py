"""What a CUDA graph cannot hold, refused on a CPU: operations that wait for the device or bring data from the host.

Does not see `tolist` and `numpy`, which on a CPU are no operations, nor a copy between two devices."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their result, or its size, is needed on the host.
_WAITING = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::nonzero_static",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave",
    "aten::_pin_memory",
)
# A tensor from Python's numbers: on CUDA a copy from memory that is not pinned.
_FROM_HOST = ("aten::lift_fresh", "aten::lift_fresh_copy", "aten::lift")


class IllegalInCapture(AssertionError):
    """The operation would break a capture, or be left out of its replays."""


class CaptureGuard(TorchDispatchMode):
    """While in force, raises at the first operation that a capture on CUDA could not take.

    :param is_capture: False checks only what a step may do outside of a graph: it must not wait for the device, but may
        bring new data there.
    """

    def __init__(self, *, is_capture: bool = True) -> None:
        super().__init__()
        self._is_capture = is_capture
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        name = func._schema.name
        if name in _WAITING:
            raise IllegalInCapture(f"{name} waits for the device")
        if self._is_capture and name in _FROM_HOST:
            raise IllegalInCapture(f"{name} brings data from the host")
        if name == "aten::copy_" and args[0].dim() == 0 and args[1].dim() == 0:
            raise IllegalInCapture("assigning a number to one place is a copy from the host; fill_ is not")
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    raise IllegalInCapture(f"{name} by a mask waits for the number of its hits")
        return func(*args, **(kwargs or {}))
