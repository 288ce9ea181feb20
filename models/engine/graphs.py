"""CUDA graphs over a ladder of sizes: a whole forward as one launch, padded up to the next size.

Launching the few hundred kernels of a decode step from Python takes longer than the step; replaying a graph of them
takes microseconds. A graph has fixed shapes and fixed addresses, so its inputs are buffers that are filled before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]

# Rows between full sizes cost little on the device, and each size costs memory and time at start.
_DECODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
# Up to here a prompt's forward is bound by launches, not by arithmetic.
PREFILL_SIZES = (32, 64, 128, 256, 512)


def decode_sizes(max_running: int) -> tuple[int, ...]:
    """The sizes up to `max_running`, which is always one of them."""
    return (*(size for size in _DECODE_SIZES if size < max_running), max_running)


def capture_cuda(stream: torch.cuda.Stream, pool: Any) -> Capture:
    """How to make graphs that run on `stream` and share the memory `pool` (of `torch.cuda.graph_pool_handle`).

    Replays of graphs that share a pool must not overlap and an output lives until the next replay; so it is with one
    runner's steps, which are ordered by its stream.
    """

    def capture(run: Run) -> Run:
        # Twice before, as PyTorch asks: libraries allocate their workspaces and kernels are compiled.
        for _ in range(2):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, which only a thread-local capture allows.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return capture


class GraphLadder:
    """One graph per size.

    :param sizes: ascending.
    :param make: size -> what to capture; it may look at nothing but its buffers.
    """

    def __init__(self, sizes: tuple[int, ...], make: Callable[[int], Run], capture: Capture) -> None:
        self.sizes = sizes
        # The largest first: the smaller ones then fit into the memory that the pool already has.
        self._replays = {size: capture(make(size)) for size in reversed(sizes)}

    def size_for(self, num: int) -> int | None:
        """The smallest size that holds `num`; None if none does."""
        index = bisect_left(self.sizes, num)
        return self.sizes[index] if index < len(self.sizes) else None

    def replay(self, size: int) -> Tensor:
        return self._replays[size]()
