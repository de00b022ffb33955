"""Divergences between the teacher's and the student's distribution, one value per row."""

from .reference import forward_kl, jsd, reverse_kl

__all__ = ["forward_kl", "jsd", "reverse_kl"]
