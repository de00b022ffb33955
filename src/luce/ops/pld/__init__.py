"""Plackett-Luce Distillation, one value per row."""

from .reference import label_first, pld, ranking_nll, teacher_order

__all__ = ["label_first", "pld", "ranking_nll", "teacher_order"]
