"""Doctests are collected by importing every module: those of Triton's kernels only where Triton is."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["src/luce/ops/_triton*.py", "src/luce/ops/*/gpu*.py"]
