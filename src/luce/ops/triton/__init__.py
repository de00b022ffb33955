"""Shared parts of the Triton kernels: launching, row access, functions of full precision, pairs and scans.

A program processes `height` rows and loops over their classes, `width` at a time. Numbers that belong to a
whole row are kept in float64: they are one where the classes are thousands, so their cost does not show.

Importing a module of this package imports Triton. `luce.ops.engines.run_by_triton` does so when the first
kernel runs, so that ``import luce`` works without Triton.
"""
