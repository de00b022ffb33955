"""Operations on rows of logits. They return one value per row and know nothing of reductions.

Each has a reference in plain PyTorch and, where it pays, a native engine; `describe` tells which is in use.
"""

from ._library import describe

__all__ = ["describe"]
