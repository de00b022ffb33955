"""Operations on rows of logits. They return one value per row and know nothing of reductions.

Each has a reference in plain PyTorch and, where it pays, a native engine and a Triton kernel; `describe`
tells what tensors on the CPU get, `describe_gpu` what those on a CUDA device do.
"""

from .engines import describe, describe_gpu

__all__ = ["describe", "describe_gpu"]
