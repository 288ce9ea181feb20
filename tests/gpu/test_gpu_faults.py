"""What a card does when it has no memory left, or breaks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch

from config import PROJECT_ROOT
from models.engine.attention import CUDA_PAGE_TOKENS
from models.engine.loop import EngineLoop
from models.engine.runner import PagedRunner, RunnerSizes
from models.engine.scheduler import MAX_RETRIES, SchedulerLimits
from models.engine.sequence import Sequence
from models.errors import InternalError
from tests.gpu.tiny import make_stack
from tests.test_runner import Ends, make_sequence, run

# Of a prompt of so many tokens, an MLP as wide as this makes 2 GiB in one tensor.
LONG_TOKENS, INTERMEDIATE = 32_768, 16_384
LEFT_BYTES = 512 * 1024**2


@pytest.fixture(scope="module")
def runner(device: torch.device) -> PagedRunner:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    sizes = RunnerSizes(
        num_pages=LONG_TOKENS // CUDA_PAGE_TOKENS + 20,
        page_tokens=CUDA_PAGE_TOKENS,
        max_running=8,
        max_context_tokens=LONG_TOKENS + 2 * CUDA_PAGE_TOKENS,
    )
    runner = PagedRunner(make_stack(device, intermediate_size=INTERMEDIATE), sizes)
    # What is allocated at first use is there before the memory is taken away.
    run(runner, make_sequence((5, 6, 7)), limits=limits())
    return runner


def limits() -> SchedulerLimits:
    """A prompt in one step, also beside running sequences."""
    return SchedulerLimits(max_running=8, max_step_tokens=LONG_TOKENS, min_chunk_tokens=LONG_TOKENS)


class Ballast:
    """Takes the card's memory up to a little, until it is dropped."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        free, _ = torch.cuda.mem_get_info(device)
        self.tensor: torch.Tensor | None = torch.empty(free - LEFT_BYTES, dtype=torch.uint8, device=device)

    def drop(self) -> None:
        if self.tensor is not None:
            self.tensor = None
            torch.cuda.empty_cache()


@pytest.fixture
def ballast(card: torch.device) -> Iterator[Ballast]:
    ballast = Ballast(card)
    yield ballast
    ballast.drop()


def loop_of(runner: PagedRunner, *sequences: Sequence) -> tuple[EngineLoop, Ends]:
    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, limits())
    for sequence in sequences:
        loop.add("m", sequence)
    return loop, Ends(*sequences)


def long_sequence() -> Sequence:
    return make_sequence(tuple(index % 500 for index in range(LONG_TOKENS)), max_tokens=2)


def test_prompt_that_finds_no_memory_ends_with_an_error_and_others_go_on(runner: PagedRunner, ballast: Ballast) -> None:
    expected = run(runner, make_sequence((5, 6, 7)), limits=limits())
    short, long = make_sequence((5, 6, 7)), long_sequence()
    loop, ends = loop_of(runner, short)
    while not short.output_ids:
        loop._pass()
    long.on_end = ends._on_end
    loop.add("m", long)
    for _ in range(1000):
        if len(ends.seen) == 2:
            break
        loop._pass()
    assert ends.seen[short][0] == "length" and [short.output_ids] == expected
    reason, error = ends.seen[long]
    assert reason == "failed" and isinstance(error, InternalError) and "memory" in str(error)
    assert long.num_retries == MAX_RETRIES + 1
    ballast.drop()
    assert len(run(runner, long_sequence(), limits=limits())[0]) == 2


def test_prompt_that_finds_memory_when_it_is_tried_again_is_answered(runner: PagedRunner, ballast: Ballast) -> None:
    sequence = long_sequence()
    loop, ends = loop_of(runner, sequence)
    for _ in range(1000):
        if ends.seen:
            break
        loop._pass()
        if sequence.num_retries:
            ballast.drop()
    assert ends.seen[sequence] == ("length", None)
    assert 1 <= sequence.num_retries <= MAX_RETRIES


# In a process of its own: after an assertion on the device, nothing on it works any more.
BREAK_THE_DEVICE = textwrap.dedent(
    """
    import os, sys, threading
    import torch
    from models.engine.loop import EngineLoop
    from models.engine.runner import PagedRunner, RunnerSizes
    from models.engine.scheduler import SchedulerLimits
    from models.errors import EngineDead
    from tests.gpu.tiny import make_stack
    from tests.test_runner import make_sequence, run

    is_captured = sys.argv[1] == "graphs"
    runner = PagedRunner(
        make_stack(torch.device("cuda:0")),
        RunnerSizes(num_pages=9, page_tokens=256, max_running=4, max_context_tokens=512),
    )
    if is_captured:
        runner.capture_graphs()
    assert len(run(runner, make_sequence((5, 6, 7)))[0]) == 24

    loop = EngineLoop(lambda: 0.0)
    loop.add_model("m", runner, SchedulerLimits(max_running=4))
    loop.start()
    both_ended, ends = threading.Semaphore(0), {}

    def on_end(sequence, reason, error):
        ends[sequence] = (reason, type(error).__name__)
        both_ended.release()

    # An id beyond the embedding fails an assertion on the device.
    good, bad = make_sequence((5, 6, 7), max_tokens=400), make_sequence((5, 10**6, 7))
    good.on_end = bad.on_end = on_end
    loop.add("m", good)
    loop.add("m", bad)
    assert both_ended.acquire(timeout=60) and both_ended.acquire(timeout=60)
    assert set(ends.values()) == {("failed", "EngineDead")}, ends
    loop.stop(60)
    assert loop.snapshot().is_dead
    try:
        loop.add("m", make_sequence((5, 6, 7)))
    except EngineDead:
        print("the engine has ended", flush=True)
    os._exit(0)  # taking down a broken context raises
    """
)


@pytest.mark.parametrize("way", ["eager", "graphs"])
def test_broken_device_ends_the_engine_and_everybody_learns_it(card: torch.device, way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BREAK_THE_DEVICE, way],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.stdout.strip().endswith("the engine has ended"), done.stderr[-3000:]
    assert done.returncode == 0
