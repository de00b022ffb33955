"""Digests tell different content apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from luce import digest


def test_a_file_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one chunk
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()[:32]
    assert digest.of_file(tmp_path / "file") == digest.of_bytes(content) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(5)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0])},
        {"a": torch.zeros(4), "b": torch.zeros(0)},
    ],
    ids=["name", "size", "shape", "dtype", "sign of zero", "one more"],
)
def test_tensors_that_differ_in_anything_have_another_digest(other: dict[str, torch.Tensor]) -> None:
    assert digest.of_tensors(other) != digest.of_tensors({"a": torch.zeros(4)})


def test_layout_does_not_count() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    assert digest.of_tensors({"a": values.T.contiguous().T}) == digest.of_tensors({"a": values})
    assert digest.of_tensors({"a": torch.tensor(1.0)}) != digest.of_tensors({"a": torch.tensor([1.0])})
    bfloat = {"a": torch.ones(3, dtype=torch.bfloat16)}
    assert digest.of_tensors(bfloat) == digest.of_tensors(dict(bfloat))
