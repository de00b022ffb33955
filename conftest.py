"""Doctests import every module they are collected from: modules of Triton kernels need Triton."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["src/luce/ops/triton/*.py", "src/luce/ops/*/triton*"]
