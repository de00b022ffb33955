"""`luce spike` and `luce export` on finished runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from luce.config import parse
from luce.errors import UserError
from luce.recipes import Recipe
from luce.runs import SpikeOptions, spike
from luce.runs import run as train
from luce.runs.export import read_packed
from luce.training import checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with binary weights, trained a little."""
    recipe: dict[str, Any] = {
        "method": "cross-entropy",
        "data": {"name": "sklearn:digits", "validation": 0.2},
        "student": {"name": "binary:vgg_pool", "options": {"widths": [4, 6, 8], "hidden": [12]}},
        "loss": {"task": {"loss": "CrossEntropyLoss"}},
        "training": {"epochs": 4, "batch_size": 32, "lr": 0.02, "cpu": True},
    }
    folder = tmp_path_factory.mktemp("trained") / "binary"
    with torch.random.fork_rng():
        train(parse(Recipe, recipe), folder)
    return folder


@pytest.fixture
def run(trained: Path, place: Path) -> Path:
    """That network at runs/binary."""
    return Path(shutil.copytree(trained, place / "runs" / "binary"))


def test_a_run_becomes_a_spiking_network(run: Path, luce) -> None:
    answer = luce("spike", "runs/binary", "--steps", "40", "--calibration", "300")
    assert answer.status == 0, answer.err
    found = json.loads((run / "spiking/spike.json").read_text())
    evaluated = json.loads(luce("evaluate", "runs/binary").out)
    assert found["source_accuracy"] == pytest.approx(evaluated["accuracy"])
    assert abs(found["accuracy"][-1] - found["source_accuracy"]) <= 0.02
    assert found["rows"] == {"calibration": 300, "validation": 259, "test": 500}
    assert found["layers"][1]["binary"] is True
    assert found["size"]["binary_weights"] == 9 * (4 * 6 + 6 * 8) + 8 * 12
    assert "After 40 time steps" in " ".join(answer.out.split())
    assert (run / "spiking/spike.png").read_bytes().startswith(b"\x89PNG")
    assert "luce spike runs/binary" in (run / "spiking/spike.html").read_text()


def test_the_same_command_gives_the_same_figures(run: Path, luce, place: Path) -> None:
    words = ("spike", "runs/binary", "--steps", "6", "--rows", "40", "--lower", "90", "--mode", "synchronous")
    both = []
    for _ in range(2):
        assert luce(*words, "--out", "here", "--start", "0").status == 0
        both.append((place / "here/spike.json").read_bytes())
    assert both[0] == both[1]
    assert json.loads(both[0])["rows"]["test"] == 40
    assert not (run / "spiking").exists()


def test_from_python(run: Path) -> None:
    result = spike(run, SpikeOptions(steps=3, rows=7, calibration=20, lower=()))
    assert (result.test.rows, result.calibration_rows) == (7, 20)
    assert list(result.tests) == [99.9]
    assert len(result.test.accuracy) == 3
    assert {path.name for path in run.iterdir() if path.is_dir()} == set()
    with pytest.raises(UserError, match="expected `rows` of at least 1, got 0"):
        SpikeOptions(rows=0)


def test_one_row(run: Path, luce, place: Path) -> None:
    assert luce("spike", "runs/binary", "--steps", "1", "--rows", "1", "--calibration", "1").status == 0
    assert len(json.loads((run / "spiking/spike.json").read_text())["accuracy"]) == 1


def test_a_network_of_real_weights_converts_too(teacher: Path, luce) -> None:
    assert luce("spike", "runs/teacher", "--steps", "30").status == 0
    found = json.loads((teacher / "spiking/spike.json").read_text())
    assert abs(found["accuracy"][-1] - found["source_accuracy"]) <= 0.1
    assert found["size"]["bits"] == found["size"]["full_precision_bits"]


def test_networks_that_do_not_convert(write, luce, refuses, place: Path) -> None:
    recipe: dict[str, Any] = {
        "data": {"name": "sklearn:digits"},
        "student": {"name": "binary:cnn", "options": {"widths": [2, 3, 4]}},
        "loss": {"task": {"loss": "CrossEntropyLoss"}},
        "training": {"epochs": 1},
    }
    assert luce("train", write(base=recipe), "--out", "run").status == 0
    reason = refuses("spike", "run")
    assert "expected a network that converts to spikes: `stages.0.0` is MaxPool2d" in reason
    assert "`stages.1.0`" in reason
    assert not (place / "run/spiking").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "expected RUN; luce spike --help describes the arguments"),
        (["nowhere"], "expected nowhere to be a finished run"),
        (["run", "--calibration", "0"], "expected `--calibration` of at least 1"),
        (["run", "--steps", "0"], "expected `--steps` of at least 1"),
        (["run", "--rows", "0"], "expected `--rows` of at least 1"),
        (["run", "--percentile", "0"], "expected percentiles above 0"),
        (["run", "--lower", "99,101"], "expected percentiles above 0"),
        (["run", "--start", "1"], "expected `--start` of at least 0"),
        (["run", "--mode", "both"], "expected `--mode` as one of layerwise, synchronous"),
        (["run", "--exit_loss", "2"], "expected `--exit_loss` in [0, 1]"),
        (["run", "--stepz", "3"], "unknown option `--stepz`; did you mean `--steps`"),
    ],
)
def test_wrong_words(words: list[str], reason: str, refuses, place: Path) -> None:
    assert reason in refuses("spike", *words)
    assert not list(place.iterdir())


def test_packed(run: Path, luce) -> None:
    answer = luce("export", "runs/binary", "--format", "packed")
    assert answer.status == 0, answer.err
    path = run / "student.packed.safetensors"
    student, description = checkpoint.load_student(run)
    packed, again = read_packed(path)
    images = 16 * torch.rand(33, 1, 8, 8)
    assert torch.equal(packed(images), student(images))
    assert again == description
    binary, scales, other = 9 * (4 * 6 + 6 * 8) + 8 * 12, 6 + 8 + 12, 9 * 4 + 12 * 10
    bits = binary + 32 * (scales + other)
    assert f"network: {bits:,} bits ({binary:,} binary weights" in answer.out
    with safe_open(path, "pt") as file:
        stored = sum(
            tensor.numel() * tensor.element_size() * 8 for tensor in map(file.get_tensor, file.keys())
        )
    assert bits <= stored < bits + 8 * 3  # at most seven bits to fill each of three last bytes


def test_other_files_are_no_packed_ones(run: Path, place: Path) -> None:
    with pytest.raises(
        UserError, match="to be packed by `luce export --format packed`, version 2, got format None"
    ):
        read_packed(run / "student.safetensors")
    (place / "rubbish.safetensors").write_bytes(b"rubbish")
    for name in ("rubbish", "nothing"):
        with pytest.raises(UserError, match="cannot read"):
            read_packed(place / f"{name}.safetensors")


@pytest.fixture
def packed(run: Path, luce) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What stands in a packed file: tensors, and how the network is built."""
    assert luce("export", "runs/binary", "--format", "packed").status == 0
    with safe_open(run / "student.packed.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["student"])


def write_packed_file(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(tensors, path, {"format": "luce-packed", "version": "1", **metadata})
    return path


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("stages.0.0.weight.signs", lambda tensor: tensor[:-1].clone()),
        ("stages.0.0.weight.signs", lambda tensor: torch.cat([tensor, tensor])),
        ("stages.0.0.weight.signs", lambda tensor: tensor.float()),
        ("stages.0.0.weight.scale", lambda tensor: tensor[:1].clone()),
        ("stages.0.0.weight.scale", None),
        ("stages.0.0.weight.signs", None),
        ("head.weight", None),
        ("head.weight", lambda tensor: tensor[:, 1:].clone()),
    ],
)
def test_packed_files_whose_tensors_do_not_fit(packed, name: str, change: Any, place: Path) -> None:
    tensors, description = packed
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    path = write_packed_file(place / "x.safetensors", tensors, student=json.dumps(description))
    with pytest.raises(UserError, match="is damaged"):
        read_packed(path, trusted=True)


@pytest.mark.parametrize(
    "student",
    [None, "", "[]", "{}", '{"model": 3}', '{"model": "mlp", "options": {}, "classes": 3}', "[" * 10**5],
)
def test_packed_files_that_describe_no_network(student: str | None, place: Path) -> None:
    metadata = {} if student is None else {"student": student}
    path = write_packed_file(place / "x.safetensors", {"x": torch.zeros(1)}, **metadata)
    with pytest.raises(UserError, match="is damaged"):
        read_packed(path)


class Scaled(torch.nn.Module):
    """A network with a parameter of that name, which is none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.rand(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.layer(x)


def test_a_packed_file_runs_no_code_unless_trusted(place: Path) -> None:
    from luce.models import Classifier
    from luce.runs.export import write_packed

    toy: Any = sys.modules["toy"]
    toy.scaled = Scaled
    student = Classifier(Scaled(), [0.0], [1.0]).eval()
    description = {"model": "python:toy.scaled", "options": {}, "classes": ["a", "b"], "input_shape": [3]}
    description |= {"mean": [0.0], "std": [1.0]}
    path = place / "x.safetensors"
    write_packed(path, student, description)
    toy.scaled = lambda: pytest.fail("it was called")
    for name in ("python:toy.scaled", "binary:python:toy.scaled", "timm:hf-hub:someone/network"):
        write_packed(path, student, {**description, "model": name})
        with pytest.raises(UserError, match=f"names `{name}`"):
            read_packed(path)
    toy.scaled = Scaled
    write_packed(path, student, description)
    rows = torch.rand(4, 3)
    assert torch.equal(read_packed(path, trusted=True)[0](rows), student(rows))


@pytest.fixture
def onnx() -> Any:
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module, reason="needs the extra [export]")
    return pytest.importorskip("onnxruntime", reason="needs the extra [export]")


def answers(onnxruntime: Any, path: Path, inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input": inputs.numpy()})[0])


def test_onnx_of_binary_weights(run: Path, luce, onnx: Any) -> None:
    answer = luce("export", "runs/binary")
    assert answer.status == 0, answer.err
    assert answer.err == ""
    assert "the logits of onnxruntime and of PyTorch differ by at most" in answer.out
    student, _ = checkpoint.load_student(run)
    assert student.normalises
    for rows in (1, 2, 17):
        images = 16 * torch.rand(rows, 1, 8, 8)
        torch.testing.assert_close(
            answers(onnx, run / "student.onnx", images), student(images), rtol=1e-4, atol=1e-4
        )
    assert {path.name for path in run.iterdir() if "onnx" in path.name} == {"student.onnx"}


@pytest.mark.slow  # the network of binary weights takes the same path
def test_onnx_of_another_network(onnx: Any, place: Path) -> None:
    from luce.models import Classifier, build
    from luce.runs.export import write_onnx

    name = "resnet8"
    shape = (3, 16, 16)
    student = Classifier(build(name, classes=4, input_shape=shape), [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]).eval()
    description = {"model": name, "options": {}, "classes": list("abcd"), "input_shape": list(shape)}
    write_onnx(place / "s.onnx", student, description)
    images = torch.rand(3, *shape)
    torch.testing.assert_close(answers(onnx, place / "s.onnx", images), student(images), rtol=1e-3, atol=1e-3)


def test_onnx_of_a_text_classifier(bert_folder: Path, onnx: Any, place: Path) -> None:
    from luce.models import Classifier, build
    from luce.runs.export import write_onnx

    name = f"hf:{bert_folder}"
    student = Classifier(build(name, classes=3, input_shape=(12,))).eval()
    description = {"model": name, "options": {}, "classes": list("abc"), "input_shape": [12]}
    write_onnx(place / "s.onnx", student, description)
    ids = torch.randint(1, 15, (3, 12))
    ids[1, 5:] = 0  # padding
    torch.testing.assert_close(answers(onnx, place / "s.onnx", ids), student(ids), rtol=1e-4, atol=1e-4)


TINY = {"model": "tiny", "classes": ["a", "b"], "input_shape": [3]}


def test_a_network_that_answers_otherwise_is_not_kept(
    onnx: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luce.models import Classifier
    from luce.runs.export import write_onnx

    monkeypatch.setattr("luce.runs.export.AGREES", -1.0)
    with pytest.raises(UserError, match="expected the same logits from onnxruntime and PyTorch"):
        write_onnx(place / "s.onnx", Classifier(torch.nn.Linear(3, 2), [0.0], [1.0]), TINY)
    assert not list(place.iterdir())


class Fickle(torch.nn.Module):
    """One answer for one half of the rows, another for the other: nothing that an exporter follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :2] if x.sum() > 0 else x[:, 1:]


def test_a_network_that_cannot_be_exported(onnx: Any, place: Path) -> None:
    from luce.models import Classifier
    from luce.runs.export import write_onnx

    with pytest.raises(UserError, match="`tiny` cannot be exported as ONNX"):
        write_onnx(place / "s.onnx", Classifier(Fickle(), [0.0], [1.0]), TINY)
    assert not list(place.iterdir())


def test_where_no_file_can_be_written(run: Path, refuses, place: Path) -> None:
    (place / "file").touch()
    (place / "folder.safetensors").mkdir()
    assert "expected a folder that can be written to" in refuses("spike", "runs/binary", "--out", "file")
    assert "expected a folder that can be written to" in refuses("spike", "runs/binary", "--out", "file/x")
    packed = ("export", "runs/binary", "--format", "packed", "--out")
    assert "expected a folder that can be written to" in refuses(*packed, "file/x.safetensors")
    assert "cannot write folder.safetensors" in refuses(*packed, "folder.safetensors")
    assert not list(place.rglob("*.part"))


def test_without_the_extra(run: Path, refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install 'luce[export]'" in refuses("export", "runs/binary")
    assert not list(run.glob("*onnx*"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "expected RUN; luce export --help describes the arguments"),
        (["nowhere"], "expected nowhere to be a finished run"),
        (["run", "--format", "torch"], "expected `--format` as one of onnx, packed, got 'torch'"),
        (["run", "--out", "here.pt"], "expected a file that ends in .onnx as `--out`"),
        (["run", "--format", "packed", "--out", "x.onnx"], "expected a file that ends in .safetensors"),
    ],
)
def test_wrong_words_of_export(words: list[str], reason: str, refuses, place: Path) -> None:
    assert reason in refuses("export", *words)
    assert not list(place.iterdir())


def test_help(luce) -> None:
    for command in ("spike", "export"):
        answer = luce(command, "--help")
        assert answer.status == 0
        assert answer.out.startswith(f"usage: luce {command} RUN")
