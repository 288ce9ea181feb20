"""What the benchmarks are held against: vLLM's figures on one card, and the bars that the engine must reach.

Measured 2026-11-22 on one NVIDIA H100 80GB: vLLM 0.24.0 (FlashAttention 3, torch.compile, CUDA graphs), random weights
of the true shapes, FP16. Imports nothing: whoever only reads results needs no torch.
"""

from __future__ import annotations

CARD = "NVIDIA H100 80GB"
SERVER = "vLLM 0.24.0"
# What a copy from the device to itself moves on that card, reads and writes together.
COPY_GB_PER_S = 3000.0

TEXT_SHAPE = "qwen3-8b"
PICTURE_SHAPE = "qwen2.5-vl-7b"

# Batch -> seconds a step, with 450 to 512 tokens of context.
DECODE_S = {1: 6.99e-3, 8: 7.03e-3, 32: 8.03e-3, 64: 8.86e-3, 128: 11.52e-3}
# Prompts of 448 tokens -> seconds until all have their first token.
PREFILL_S = {1: 16e-3, 128: 1.29}
# Pictures of 1024x768 -> seconds until all have their first token, the processor included.
PICTURES_S = {1: 123e-3, 8: 0.70, 32: 2.89}
PICTURE_DECODE_S = {1: 6.47e-3, 8: 6.95e-3}
# Clients -> (output tokens/s, mean seconds to the first token); streamed, 448 tokens in, 128 out.
HTTP = {1: (141.8, 28e-3), 16: (1852.0, 146e-3), 64: (4445.0, 478e-3), 128: (5680.0, 886e-3)}

# The bars that are not another server's figures.
MAX_PREFILL_S = 1.3  # 128 prompts of 448 tokens
MAX_HELD_BACK_S = 0.05
MAX_ONE_PICTURE_S = 0.123
MAX_32_PICTURES_S = 2.9
MIN_SHARE_SUM = 1.1
MAX_READY_S = 30.0
MIN_CACHE_SHARE = 0.95
MIN_CPU_ONE_STREAM = 1.0
MIN_CPU_16_STREAMS = 4.0


def scaled_s(seconds: float, copy_gb_per_s: float | None) -> float | None:
    """What a time that is bound by memory would be on a card that copies so fast; None: not comparable."""
    return seconds * COPY_GB_PER_S / copy_gb_per_s if copy_gb_per_s else None
