"""Catching features: what is caught, what is refused, and that nothing stays behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from luce import models
from luce.errors import UserError
from luce.models import Classifier
from luce.models.hooks import Features, find, first_tensor


def network() -> nn.Module:
    return models.build("resnet8", classes=10, input_shape=(3, 8, 8))


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# What is caught ---------------------------------------------------------------------------------------------


def test_features_are_what_the_modules_return_and_are_given() -> None:
    model, x = network().eval(), torch.randn(2, 3, 8, 8)
    stem = model.stem(x)
    first = model.stages[0](stem)
    second = model.stages[1](first)
    pooled = model.pool(model.stages[2](second))
    paths = ["stem", "stages.0", "stages.1:input", "stages.1", "pool", "head:input"]
    with Features(model, paths) as features, features.capture() as seen:
        logits = model(x)
    assert list(seen) == paths
    for path, expected in zip(paths, (stem, first, first, second, pooled, pooled), strict=True):
        assert torch.equal(seen[path], expected), path
    assert torch.equal(logits, model.head(pooled))


def test_the_map_before_an_activation() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    with Features(model, ["stages.2.0.act:input", "stages.2"]) as features, features.capture() as seen:
        model(x)
    before, after = seen.values()
    assert (before < 0).any()
    assert torch.equal(before.relu(), after)


def test_a_gradient_goes_back_through_what_was_caught() -> None:
    model = network()
    with Features(model, ["stages.0"]) as features, features.capture() as seen:
        model(torch.randn(2, 3, 8, 8))
    seen["stages.0"].sum().backward()
    assert model.stages[0][0].residual[0][0].weight.grad.abs().sum() > 0
    assert model.stages[1][0].residual[0][0].weight.grad is None


def test_a_negative_number_counts_from_behind() -> None:
    model = models.build("resnet20", classes=10)
    assert find(model, "stages.-1.-1.act:input") is model.stages[2][2].act
    assert find(model, "stages.0.-3") is model.stages[0][0]


class Several(nn.Module):
    """Returns whatever it was made with."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, *, scale: float = 1.0):
        return self.value(scale * x)


class Output(OrderedDict):
    """As Hugging Face's are."""


@pytest.mark.parametrize(
    "value",
    [
        lambda x: (x, x + 1),
        lambda x: [None, x, x + 1],
        lambda x: {"hidden": x, "more": x + 1},
        lambda x: Output(last_hidden_state=x, pooler_output=x + 1),
        lambda x: ((None, x), x + 1),
    ],
    ids=["tuple", "list after None", "dict", "output object", "nested"],
)
def test_of_several_the_first_tensor(value) -> None:
    model, x = nn.Sequential(Several(value)), torch.randn(3, 2)
    with Features(model, ["0", "0:input"]) as features, features.capture() as seen:
        model(x)
    assert torch.equal(seen["0"], x)
    assert torch.equal(seen["0:input"], x)


def test_an_input_given_by_keyword() -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Called()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(mask=None, hidden=x)

    class Called(nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
            return hidden + 1

    model, x = Caller(), torch.randn(2, 2)
    with Features(model, ["inner:input"]) as features, features.capture() as seen:
        model(x)
    assert torch.equal(seen["inner:input"], x)


def test_a_transformer_of_hugging_face() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=11
    )
    model = transformers.BertForSequenceClassification(config).eval()
    paths = ["bert", "bert.encoder.layer.0", "bert.encoder.layer.-1", "bert.pooler"]
    with Features(model, paths) as features, features.capture() as seen:
        answer = model(torch.arange(10).view(2, 5), output_hidden_states=True)
    assert torch.equal(seen["bert"], answer.hidden_states[2])
    assert torch.equal(seen["bert.encoder.layer.0"], answer.hidden_states[1])
    assert torch.equal(seen["bert.encoder.layer.-1"], answer.hidden_states[2])
    assert seen["bert.pooler"].shape == (2, 8)


# Wrappers ---------------------------------------------------------------------------------------------------


def test_wrappers_need_no_mention() -> None:
    inner = network()
    module = inner.stages[1]
    compiled = torch.compile(Classifier(inner), backend="eager")
    for wrapped in (Classifier(inner), DataParallel(Classifier(inner)), compiled, DataParallel(compiled)):
        assert find(wrapped, "stages.1") is module
        assert find(wrapped, "stages.1:input") is module
    assert find(Classifier(inner), "body.stages.1") is module
    assert find(DataParallel(Classifier(inner)), "module.body.stages.1") is module


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_network_that_is_compiled_afterwards(backend: str) -> None:
    torch.compiler.reset()
    model, paths = Classifier(network()), ["stages.0", "stages.2.0.act:input", "pool"]
    inputs = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    model.eval()

    def one_pass(called: nn.Module, features: Features, x: Tensor):
        with features.capture() as seen:
            logits = called(x)
        loss = logits.sum() + sum(value.square().sum() for value in seen.values())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [logits, *seen.values(), *gradients]

    with Features(model, paths) as features:
        expected = [one_pass(model, features, x) for x in inputs]
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        plain = compiled(inputs[0])  # nobody listens
        found = [one_pass(compiled, features, x) for x in inputs]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(plain, expected[0][0])
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        one_pass(compiled, features, torch.randn(4, 3, 8, 8))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before  # compiled once for all


def test_activation_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: bool) -> None:
            super().__init__()
            self.stages = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.reentrant = reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.stages, x, use_reentrant=self.reentrant)

    model, x = Checkpointed(reentrant=False), torch.randn(3, 4, requires_grad=True)
    with Features(model, ["stages.1"]) as features:
        with features.capture() as seen:
            output = model(x)
        (found,) = torch.autograd.grad(output.sum() + 2 * seen["stages.1"].sum(), x)
    hidden = model.stages[1](model.stages[0](x))
    (expected,) = torch.autograd.grad(model.stages[2](hidden).sum() + 2 * hidden.sum(), x)
    torch.testing.assert_close(found, expected)

    model = Checkpointed(reentrant=True)
    refused = pytest.raises(UserError, match=r"`stages\.1` runs without gradients.*`use_reentrant=False`")
    with Features(model, ["stages.1"]) as features:
        with refused, features.capture():
            model(x)
        with torch.no_grad(), features.capture() as seen:  # a teacher needs none
            model(x)
    assert seen["stages.1"].shape == (3, 4)


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("stage.0", "did you mean `stages.0`"),
        ("stages.3", "did you mean `stages.2` or `stages.1` or `stages.0`"),
        ("stages.0.1", "did you mean `stages.0.0`"),
        ("stages.-4", "did you mean `stages"),
        ("stages.-0", "did you mean `stages"),
        ("pol", "did you mean `pool`"),
        ("xyz", "known: head"),
        ("", "known: head"),
        ("pool:output", "did you mean `pool"),
    ],
)
def test_a_module_that_does_not_exist(path: str, near: str) -> None:
    model = Classifier(network())
    with pytest.raises(UserError, match=f"unknown module of Network `{path}`; {near}"):
        Features(model, ["stem", path])
    assert hooks_on(model) == 0


class Odd(nn.Module):
    """Runs `twice` twice and `never` never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.text = nn.Linear(3, 3), nn.Linear(3, 3), Several(lambda x: "text")
        self.before, self.inplace = nn.Linear(3, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        self.text(x)
        return self.inplace(self.before(self.twice(self.twice(x))))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("twice", "`twice` runs more than once in a forward pass.*name a module that runs once"),
        ("never", "`never` did not run in this forward pass"),
        ("text", "expected a tensor at `text`, got str"),
        ("before", r"features at `before` were changed in place, as by ReLU\(inplace=True\)"),
        ("inplace:input", "features at `inplace:input` were changed in place"),
    ],
)
def test_what_cannot_be_caught(path: str, message: str) -> None:
    model, x = Odd(), torch.randn(2, 3)
    with Features(model, [path]) as features:
        for gradient in (True, False):
            with (
                torch.set_grad_enabled(gradient),
                pytest.raises(UserError, match=message),
                features.capture(),
            ):
                model(x)
        model(x)  # without listening nothing is wrong with it
    with Features(model, ["inplace"]) as features, features.capture() as seen:
        model(x)
    assert (seen["inplace"] >= 0).all()


def test_an_error_of_the_network_stays_as_it_is() -> None:
    model = network()
    with Features(model, ["pool"]) as features:
        with pytest.raises(RuntimeError, match="expected input"), features.capture():
            model(torch.randn(2, 5, 8, 8))
        with features.capture() as seen:
            model(torch.randn(2, 3, 8, 8))
    assert seen["pool"].shape == (2, 64)


def test_the_first_tensor() -> None:
    tensor = torch.zeros(1)
    assert first_tensor(([], {"a": (None, tensor)})) is tensor
    for nothing in (None, "text", 3, [], {"a": None}):
        assert first_tensor(nothing) is None


# Nothing stays behind ---------------------------------------------------------------------------------------


def test_hooks_go_with_the_block_whatever_happens() -> None:
    model = network()
    with Features(model, ["stem", "pool:input", "stem"]):
        assert hooks_on(model) == 2
    assert hooks_on(model) == 0
    with pytest.raises(ZeroDivisionError), Features(model, ["stem", "pool:input"]):
        1 / 0  # noqa: B018
    assert hooks_on(model) == 0
    pickle.dumps(model)


def test_nobody_but_the_caller_keeps_a_feature() -> None:
    model = network()
    gc.disable()
    try:
        with Features(model, ["stages.0"]) as features:
            with features.capture() as seen:
                model(torch.randn(2, 3, 8, 8)).sum().backward()
            watched = weakref.ref(seen["stages.0"])
            model(torch.randn(2, 3, 8, 8))
            assert watched() is not None
            del seen
            assert watched() is None
    finally:
        gc.enable()


def test_a_copy_of_the_network_is_heard_no_more_than_the_network() -> None:
    """As of an average of the weights, which is evaluated while the network is watched."""
    model = network()
    with Features(model, ["stages.0"]) as features:
        average, twin = AveragedModel(model), copy.deepcopy(model)
        for other in (model, average, twin):
            other(torch.randn(2, 3, 8, 8))
        with features.capture() as seen:
            model(torch.randn(5, 3, 8, 8))
    assert seen["stages.0"].shape[0] == 5
