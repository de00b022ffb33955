"""Log-sum-exp of every suffix of a row."""

from .reference import suffix_logsumexp

__all__ = ["suffix_logsumexp"]
