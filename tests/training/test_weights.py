"""Files of weights, good and bad."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from luce import models
from luce.errors import UserError
from luce.runs.export import write_packed
from luce.training import checkpoint, weights
from luce.training.weights import load_weights, read_weights

Weights = dict[str, torch.Tensor]


def network() -> nn.Module:
    return models.build("cnn", classes=3, input_shape=(1, 8, 8), widths=[2])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_go_to_a_file_and_back(suffix: str, tmp_path: Path) -> None:
    source, target, path = network(), network(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    load_weights(target, path)
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "args": {"lr": 0.1}},
        lambda weights: {"net": weights, "acc": 91.2},
        lambda weights: {"model_state_dict": weights, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
        lambda weights: {"state_dict": {"model": weights}, "optimizer": {}},
        lambda weights: {"my own name": weights},
        lambda weights: {**weights, "epoch": 3},
        lambda weights: under("module.", weights),
        lambda weights: under("_orig_mod.", weights),
        lambda weights: under("module._orig_mod.", weights),
        lambda weights: {"state_dict": under("model._orig_mod.", weights), "epoch": 3},
        lambda weights: under("my.own.prefix.", weights),
        lambda weights: {name.replace("head.", "head.module."): value for name, value in weights.items()},
        lambda weights: {name: value for name, value in weights.items() if "num_batches" not in name},
        lambda weights: {"state_dict": under("net.", weights) | {"loss.weight": torch.ones(3)}},
        lambda weights: under("module.", weights) | {"n_averaged": torch.tensor(5)},
    ],
)
def test_wrappings_of_other_tools_are_taken_off(wrap: Any, tmp_path: Path) -> None:
    source, target = network(), network()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt")
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def test_a_network_may_have_the_names_of_a_wrapper(tmp_path: Path) -> None:
    source, target = (nn.ModuleDict({"module": nn.Linear(2, 2), "b": nn.Linear(2, 2)}) for _ in range(2))
    for given in (source.state_dict(), under("module.", source.state_dict())):
        torch.save(given, tmp_path / "weights.pt")
        load_weights(target, tmp_path / "weights.pt")
        assert torch.equal(target["module"].weight, source["module"].weight)


def test_tensors_beside_the_network_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = under("model.", network().state_dict()) | {"loss.weight": torch.ones(3)}
    torch.save(weights, tmp_path / "weights.pt")
    load_weights(network(), tmp_path / "weights.pt")
    assert "holds the network under `model.`: leaves out loss.weight" in caplog.text
    caplog.clear()
    torch.save(under("model.", network().state_dict()), tmp_path / "weights.pt")
    load_weights(network(), tmp_path / "weights.pt")
    assert not caplog.text


def test_of_several_entries_the_one_that_is_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, average = network().state_dict(), network().state_dict()
    content = {"state_dict_ema": average, "state_dict": plain, "rng": {"cpu": torch.zeros(4)}}
    torch.save(content, tmp_path / "weights.pt")
    found = read_weights(tmp_path / "weights.pt")
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    assert "reads `state_dict`, not `state_dict_ema`" in caplog.text


def test_one_of_two_networks_is_not_guessed(tmp_path: Path) -> None:
    one, two = network().state_dict(), network().state_dict()
    torch.save({"student": one, "teacher": two}, tmp_path / "entries.pt")
    with pytest.raises(UserError, match=r"entries\.pt to hold one network, got student, teacher; save the"):
        load_weights(network(), tmp_path / "entries.pt")
    torch.save(under("student.", one) | under("teacher.", two), tmp_path / "prefixes.pt")
    with pytest.raises(
        UserError, match=r"several that fit, under the prefixes student\., teacher\.; save the"
    ):
        load_weights(network(), tmp_path / "prefixes.pt")


def test_values_beside_the_weights_are_not_read(tmp_path: Path) -> None:
    import argparse

    import numpy as np

    beside = {
        "acc": np.float64(91.0),
        "epoch": np.int64(3),
        "confusion": np.eye(3),
        "rng": np.random.get_state(),
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
    }
    source, target = network(), network()
    torch.save({"model": source.state_dict(), **beside}, tmp_path / "weights.pt")
    before = torch.serialization.get_safe_globals()
    load_weights(target, tmp_path / "weights.pt")
    assert torch.equal(target.state_dict()["head.weight"], source.state_dict()["head.weight"])
    assert torch.serialization.get_safe_globals() == before


def test_numpy_of_an_earlier_version(tmp_path: Path) -> None:
    """Its pickles name `numpy.core`, which NumPy 2 calls `numpy._core`; protocol 0 leaves names as text."""
    import numpy as np

    pickled = pickle.dumps({"w": torch.Size([2]), "best": np.float32(2.0)}, protocol=0)
    assert b"numpy._core" in pickled
    old = pickle.dumps({"best": np.float32(2.0)}, protocol=2).replace(
        b"numpy._core.multi", b"numpy.core.multi"
    )
    with torch.serialization.safe_globals([(weights._Beside, name) for name in weights.BESIDE]):
        found = torch._weights_only_unpickler.load(io.BytesIO(old))
    assert isinstance(found["best"], weights._Beside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_become_float32(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = network().to(dtype), network()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt")
    for name, value in target.state_dict().items():
        assert value.dtype == (torch.int64 if "num_batches" in name else torch.float32)
        assert torch.equal(value, source.state_dict()[name].to(value.dtype))
    assert not caplog.text


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 7e4), (torch.float64, 1e39)])
def test_numbers_too_large_for_a_dtype_are_named(
    dtype: torch.dtype, large: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """70,000 is infinite in 16 bits already in the file, 1e39 becomes so in float32."""
    given = network().to(dtype).state_dict()
    name = next(name for name in given if name.endswith("running_var"))
    given[name] = torch.full_like(given[name].double(), large).to(dtype)
    torch.save(given, tmp_path / "weights.pt")
    load_weights(network(), tmp_path / "weights.pt")
    assert f"infinite or undefined numbers in {name}, " in caplog.text


def test_steps_of_a_quantised_file_are_no_weights(tmp_path: Path) -> None:
    given = network().state_dict()
    given["head.weight"] = torch.ones(3, 2, dtype=torch.int8)
    torch.save(given, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"no floating numbers: head\.weight is torch\.int8"):
        load_weights(network(), tmp_path / "weights.pt")


def test_a_packed_student_is_no_file_of_weights(tmp_path: Path) -> None:
    description = checkpoint.describe("mlp", {"hidden": [2]}, ("a", "b"), (3,), [0.0], [1.0])
    body = models.build("mlp", classes=2, input_shape=(3,), hidden=[2])
    write_packed(tmp_path / "s.safetensors", models.Classifier(body), description)
    with pytest.raises(UserError, match=r"got a packed student.*name the run folder"):
        load_weights(body, tmp_path / "s.safetensors")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("by_torch", [False, True])
def test_what_a_pickle_holds_is_not_executed(wrapped: bool, by_torch: bool, tmp_path: Path) -> None:
    bomb: Any = Bomb(tmp_path / "exploded")
    content = {"state_dict": network().state_dict(), "extra": bomb} if wrapped else bomb
    if by_torch:
        torch.save(content, tmp_path / "weights.pt")
    else:
        (tmp_path / "weights.pt").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"weights\.pt .*holds more than tensors"):
        load_weights(network(), tmp_path / "weights.pt")
    assert not (tmp_path / "exploded").exists()
    if by_torch:
        torch.load(tmp_path / "weights.pt", weights_only=False)
    else:
        pickle.loads((tmp_path / "weights.pt").read_bytes())
    assert (tmp_path / "exploded").exists()  # the bomb was no dud


def test_a_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="save its state_dict as safetensors"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": 3}, {1: torch.zeros(2)}, torch.zeros(3), {"model": {"a": 1}}]
)
def test_files_of_other_things(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"expected .*weights\.pt to hold tensors by name"):
        read_weights(tmp_path / "weights.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut short", "folder"])
def test_files_that_cannot_be_read(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network().state_dict(), path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "garbage": b"not weights at all", "cut short": whole[:200]}[damage])
    with pytest.raises(UserError, match=rf"weights\{suffix}") as caught:
        load_weights(network(), path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network(tmp_path: Path) -> None:
    def complaint(weights: dict[str, torch.Tensor]) -> str:
        save_file(weights, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=r"w\.safetensors does not fit the network") as caught:
            load_weights(network(), tmp_path / "w.safetensors")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    weights = network().state_dict()
    left = {name: value for name, value in weights.items() if name != "head.weight"}
    assert "missing: head.weight;" in complaint(left)
    assert "unexpected: stranger;" in complaint({**weights, "stranger": torch.zeros(1)})
    assert "other shapes: head.weight is (9, 2), not (3, 2);" in complaint(
        {**weights, "head.weight": torch.zeros(9, 2)}
    )
    assert "unexpected: a, b and 1 more;" in complaint(
        {**weights, **{name: torch.zeros(1) for name in "abc"}}
    )


def test_what_was_taken_off_is_in_the_complaint(tmp_path: Path) -> None:
    weights = under("model.", network().state_dict())
    del weights["model.head.weight"]
    torch.save({"net": weights}, tmp_path / "w.pt")
    read = r"\(of its entry `net`\) \(without the prefix `model\.`\)"
    with pytest.raises(UserError, match=rf"w\.pt {read} does not fit .*: missing: head\.weight;"):
        load_weights(network(), tmp_path / "w.pt")


def test_a_tensor_of_two_names_is_stored_once(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        network[1].weight = network[0].weight
        return network

    written, read = tied(), tied()
    save_model(written, str(tmp_path / "tied.safetensors"))
    load_weights(read, tmp_path / "tied.safetensors")
    for name, value in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], value)
    with pytest.raises(UserError, match=r"missing: 1\.weight"):
        load_weights(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), tmp_path / "tied.safetensors")


def test_an_archive_of_torchscript_is_no_file_of_weights(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)).save(str(tmp_path / "code.pt"))
    with pytest.raises(UserError, match=r"got a TorchScript archive, which is code; save the state_dict"):
        load_weights(nn.Linear(3, 2), tmp_path / "code.pt")
