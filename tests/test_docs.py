"""The code of the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.data import TensorDataset

from luce.config import parse
from luce.recipes import Recipe, build_method

DOCS = Path(__file__).parents[1] / "docs"


def test_the_method_of_ones_own_trains_its_teacher() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "methods.md").read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    data = TensorDataset(torch.randn(64, 20), torch.randint(5, (64,)))
    names: dict[str, Any] = {"student": nn.Linear(20, 5), "teacher": teacher, "data": data}
    exec(code.replace("PLDLoss()))", "PLDLoss()), teacher_lr=0.1), epochs=3, show_progress=False"), names)
    teacher_losses = [line["train"]["teacher"] for line in names["fitted"].history]
    assert teacher_losses[0] > teacher_losses[1] > teacher_losses[2]


def test_the_network_of_the_page_on_spikes_answers_as_before() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "spiking.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {})


def test_the_recipes_of_the_pages_on_methods_and_black_boxes_are_valid() -> None:
    blocks = [
        yaml.safe_load(block)
        for page in ("methods.md", "black-box.md")
        for block in re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert len(blocks) == 3
    for block in blocks:
        build_method(parse(Recipe, block))
