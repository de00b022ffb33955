"""Operations on rows of logits: one value per row, without reductions.

Each operation has a reference in plain PyTorch and, where it pays, a native engine and a Triton kernel.
`describe` returns the engine of CPU tensors, `describe_gpu` that of CUDA tensors.
"""

from .engines import describe, describe_gpu

__all__ = ["describe", "describe_gpu"]
