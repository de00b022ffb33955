"""Figures over time against sums that are made one by one."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from luce.models import Classifier
from luce.spiking import Calibration, Chain, Record, SpikingNetwork, choose_exit, convert, early_exit, record
from luce.spiking.experiment import Settings, convert_and_simulate
from luce.spiking.report import as_json, picture, write_html

STEPS = 11


@pytest.fixture
def target(source: nn.Module, images: Tensor) -> Tensor:
    """Mostly what the source says."""
    target = source(images).argmax(1)
    target[:2] = (target[:2] + 1) % 5
    return target


@pytest.fixture
def seen(spiking: SpikingNetwork, chain: Chain, images: Tensor, target: Tensor) -> Record:
    return record(spiking, chain, zip(images.split(5), target.split(5), strict=True), STEPS)


def test_figures_by_their_definitions(
    seen: Record, spiking: SpikingNetwork, chain: Chain, images: Tensor, target: Tensor
) -> None:
    moments = list(spiking.simulate(images, STEPS))
    fan_outs, products = spiking.fan_outs(images[:1])
    spikes, additions = torch.zeros(len(images)).double(), torch.zeros(len(images)).double()
    for moment in moments:
        at = moment.time - 1
        assert torch.equal(seen.correct[at], moment.logits.argmax(1) == target)
        ordered = moment.logits.softmax(1).sort(1, descending=True).values
        torch.testing.assert_close(seen.margin[at], ordered[:, 0] - ordered[:, 1])
        for fired, fan_out in zip(moment.spikes, fan_outs[1:], strict=True):
            spikes += fired.flatten(1).sum(1)
            additions += (fired * fan_out).flatten(1).sum(1)
        torch.testing.assert_close(seen.spikes[at], spikes)
        torch.testing.assert_close(seen.additions[at], additions)
    for index in range(len(spiking.thresholds)):
        count = sum(moment.spikes[index] for moment in moments)
        assert seen.layer_spikes[index] == pytest.approx(float(count.sum()) / len(images))
        assert seen.saturated[index] == pytest.approx(float((count == STEPS).double().mean()))
        assert seen.neurons[index] == count[0].numel()
    assert seen.source_accuracy == pytest.approx((len(images) - 2) / len(images))
    assert seen.accuracy == [pytest.approx(float(correct.double().mean())) for correct in seen.correct]
    assert float(seen.spikes[-1].mean()) == pytest.approx(float(seen.layer_spikes.sum()))
    assert torch.equal(seen.products, products)


def test_products_of_a_network_by_hand(images: Tensor) -> None:
    from luce.spiking import read

    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 5)).double()
    chain = read(model)
    spiking = convert(chain, Calibration(chain, [images]).scales(100.0))
    seen = record(spiking, chain, [(images, torch.zeros(12, dtype=torch.long))], 4)
    assert seen.products.tolist() == [128 * 6, 6 * 5]
    assert torch.equal(seen.additions, 5 * seen.spikes)
    # 4.6 pJ for each product, 0.9 pJ for each addition.
    assert seen.source_energy == {
        name: pytest.approx((768 + 30) * 4.6e-3) for name in ("multiplied", "added")
    }
    spent = seen.energy(100.0, 4)
    assert spent["held"] == pytest.approx(768 * 4.6e-3 + 100 * 0.9e-3)
    assert spent["recomputed"] == pytest.approx(4 * 768 * 4.6e-3 + 100 * 0.9e-3)
    binary = replace(seen, binary=(False, True))
    assert binary.source_energy["added"] == pytest.approx(768 * 4.6e-3 + 30 * 0.9e-3)


def test_products_are_those_of_the_source(seen: Record, chain: Chain, images: Tensor) -> None:
    """Not of its spikes: a pooling before a layer leaves it fewer numbers to multiply."""
    expected: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        windows = (
            nn.functional.unfold(torch.ones_like(inputs[0]), module.kernel_size, padding=module.padding)
            if isinstance(module, nn.Conv2d)
            else inputs[0].new_ones(inputs[0].shape)
        )
        expected.append(int(windows.sum()) * output.shape[1])

    for module in chain.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    chain(images[:1])
    assert seen.products.tolist() == expected


def made_up(correct: list[list[int]], margin: list[list[float]]) -> Record:
    """Two layers of nothing; a spike and two additions per step."""
    steps, rows = len(correct), len(correct[0])
    spikes = torch.arange(1.0, steps + 1).unsqueeze(1).expand(steps, rows)
    none = torch.ones(2)
    return Record(
        torch.tensor(correct).bool(),
        torch.tensor(margin),
        spikes,
        2 * spikes,
        none,
        none,
        none,
        none,
        (False, True),
        torch.ones(rows).bool(),
    )


def test_leaving_early_by_hand() -> None:
    #                steps down, rows across
    seen = made_up(
        correct=[[1, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1]],
        margin=[[0.9, 0.6, 0.1], [0.9, 0.2, 0.8], [0.9, 0.3, 0.9], [0.9, 0.4, 0.9]],
    )
    found = early_exit(seen, 0.5)  # at steps 1, 1 (wrongly) and 2
    assert (found.accuracy, found.time) == (pytest.approx(2 / 3), pytest.approx(4 / 3))
    assert (found.spikes, found.additions) == (pytest.approx(4 / 3), pytest.approx(8 / 3))
    found = early_exit(seen, 0.5, first=2)  # at 2, never, and 2
    assert (found.accuracy, found.time) == (1.0, pytest.approx(8 / 3))
    assert early_exit(seen, 2.0).time == 4
    assert early_exit(seen, 0.0, first=3).time == 3
    chosen = choose_exit(seen, loss=0.0)
    assert chosen.accuracy == 1.0
    assert chosen.time == pytest.approx((1 + 4 + 2) / 3)  # a margin above 0.6 and of at most 0.8
    assert 0.6 < chosen.threshold <= 0.8
    assert choose_exit(seen, loss=1.0).time == 1
    assert seen.within_a_point == 3
    assert replace(seen, correct=torch.zeros(4, 3).bool()).within_a_point is None


def test_leaving_early_is_never_worse_than_stopping_all_at_a_power_of_two(seen: Record) -> None:
    chosen = choose_exit(seen, loss=0.0)
    least = seen.accuracy[-1]
    assert chosen.accuracy >= least
    assert all(chosen.time <= time for time in (1, 2, 4, 8) if seen.accuracy[time - 1] >= least)


def test_no_rows(spiking: SpikingNetwork, chain: Chain) -> None:
    with pytest.raises(ValueError, match="expected rows to simulate"):
        record(spiking, chain, [], 3)


@pytest.mark.parametrize("source", ["binary", "normalised"], indirect=True)
def test_the_report(source: nn.Module, images: Tensor, target: Tensor, tmp_path: Path) -> None:
    student = Classifier(source, mean=[0.2, 0.1], std=[2.0, 0.5]).double().eval()
    batches = [(images[:7], target[:7]), (images[7:], target[7:])]
    heard: list[str] = []
    steps = []

    @contextmanager
    def watch(what: str):
        heard.append(what)
        yield lambda: steps.append(what)

    settings = Settings(steps=STEPS, percentile=99.0, lower=(90.0, 99.0))
    report = convert_and_simulate(
        student,
        batches,
        batches,
        lambda: batches,
        settings,
        watch,
        name="<run>",
        model="net",
        command="luce spike <run>",
    )
    assert heard == ["test rows, percentile 99", "test rows, percentile 90", "validation rows, percentile 99"]
    assert len(steps) == 3 * 2 * STEPS
    content = json.loads(json.dumps(as_json(report)))
    assert len(content["accuracy"]) == len(content["spikes"]) == STEPS
    assert content["accuracy"] == report.test.accuracy
    expected = (student(images).argmax(1) == target).double().mean().item()
    assert content["source_accuracy"] == pytest.approx(expected)
    assert content["early_exit"]["test"]["threshold"] == content["early_exit"]["validation"]["threshold"]
    assert content["lower_thresholds"].keys() == {"90"}
    assert [layer["path"] for layer in content["layers"]] == list(report.paths)
    assert picture(report).startswith(b"\x89PNG")
    page = write_html(report, tmp_path / "spike.html").read_text()
    assert "&lt;run&gt;" in page
    assert "<run>" not in page
    assert "https:" not in page
    assert page.count("<figure>") == 3
