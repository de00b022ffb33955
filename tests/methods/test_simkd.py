"""SimKD: the student's form, the teacher's classifier within it, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luce import CrossEntropyLoss, SimKDLoss, models
from luce.errors import UserError
from luce.methods import FeatureMethod
from luce.models import Classifier
from luce.models.simkd import Projector
from luce.signals import LiveTeacher

NET = {"classes": 4, "input_shape": (3, 16, 16)}


def new_method() -> FeatureMethod:
    return FeatureMethod(None, {"simkd": (1.0, SimKDLoss(), ["neck"], ["neck"])})


def batch(rows: int = 6) -> dict[str, Tensor]:
    index = torch.arange(rows)
    return {"input": torch.rand(rows, 3, 16, 16), "target": index % 4, "index": index}


def test_a_step_is_the_mean_square_error_to_the_teacher_s_map() -> None:
    teacher = models.build("resnet8x4", **NET).eval()
    student = Classifier(models.build("simkd:resnet8", teacher="resnet8x4", **NET)).eval()
    method, rows = new_method(), batch()
    source = LiveTeacher(teacher)
    method.build(student, source, rows, rows)
    with method.hooks(student, source):
        terms = method.step(student, rows, source.signal(rows))
    body = student.body
    ours = body.neck(body.stages(body.stem(rows["input"])))
    theirs = teacher.stages(teacher.stem(rows["input"]))
    assert ours.shape == theirs.shape == (6, 256, 4, 4)
    torch.testing.assert_close(terms["simkd"], (ours - theirs).square().mean())
    assert terms.keys() == {"simkd", "loss"}
    logits = F.linear(ours.mean((2, 3)), teacher.head.weight, teacher.head.bias)
    torch.testing.assert_close(student(rows["input"]), logits)


def test_a_map_like_the_teacher_s_makes_the_teacher_s_logits() -> None:
    teacher = models.build("resnet8x4", **NET).eval()
    student = models.build("simkd:resnet8", teacher="resnet8x4", **NET).eval()
    new_method().build(student, LiveTeacher(teacher), batch(1), batch())
    x = batch()["input"]
    theirs = teacher.neck(teacher.stages(teacher.stem(x)))
    assert torch.equal(student.head(student.pool(theirs)), teacher(x))


def test_all_but_the_classifier_learns() -> None:
    teacher = LiveTeacher(models.build("resnet8x4", **NET))
    student = models.build("simkd:resnet8", teacher="resnet8x4", **NET)
    method = FeatureMethod(CrossEntropyLoss(), {"simkd": (1.0, SimKDLoss(), ["neck"], ["neck"])})
    rows = batch()
    method.build(student, teacher, rows, rows)
    before = teacher.network.head.weight.clone()
    optimizer = torch.optim.AdamW([*student.parameters(), *method.parameters()], lr=0.1, weight_decay=0.5)
    with method.hooks(student, teacher):
        method.step(student, rows, teacher.signal(rows))["loss"].backward()
    optimizer.step()
    learning = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in student.named_parameters()} - learning == {"head.weight", "head.bias"}
    assert torch.equal(student.head.weight, before)
    assert teacher.network.head.weight.requires_grad  # the teacher is left as it was
    student.head.weight.data.zero_()
    assert torch.equal(teacher.network.head.weight, before)


def test_the_projector() -> None:
    def parameters(inputs: int, outputs: int, factor: int) -> int:
        middle = outputs // factor
        convolutions = inputs * middle + 9 * middle * middle + middle * outputs
        return convolutions + 2 * (middle + middle + outputs)

    for factor in (1, 2, 8):
        projector = Projector(24, 64, (4, 4), factor)
        assert models.count_parameters(projector) == parameters(24, 64, factor)
    x = torch.randn(2, 24, 8, 2)
    found = projector.eval()(x)
    assert found.shape == (2, 64, 4, 2)  # of each side the smaller
    assert torch.equal(found, projector.layers(F.adaptive_avg_pool2d(x, (4, 2))))
    assert (found >= 0).all()
    assert not [m for m in projector.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]


@pytest.mark.parametrize(("student", "teacher"), [("vgg8", "resnet8"), ("resnet8", "vgg8")])
def test_maps_of_other_sizes(student: str, teacher: str) -> None:
    source = LiveTeacher(models.build(teacher, **NET))
    network = models.build(f"simkd:{student}", teacher=teacher, **NET)
    method, rows = new_method(), batch()
    method.build(network, source, rows, rows)
    with method.hooks(network, source):
        value = method.step(network, rows, source.signal(rows))["loss"]
    value.backward()
    assert value.isfinite()
    assert network(rows["input"]).shape == (6, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("simkd:resnet9", {"teacher": "resnet8"}, "both names of native networks, got `resnet9`"),
        ("simkd:resnet8", {}, "both names of native networks, got `None`"),
        ("simkd:resnet8", {"teacher": "timm:resnet18"}, "native networks, got `timm:resnet18`"),
        ("simkd:mlp", {"teacher": "resnet8"}, r"maps before .* shape \(128,\) of the student"),
        ("simkd:resnet8", {"teacher": "mlp"}, "maps before their pooling for SimKD"),
        (
            "simkd:resnet8",
            {"teacher": "resnet8", "factor": 3},
            "`factor` to divide the teacher's 64 channels",
        ),
        ("simkd:resnet8", {"teacher": "resnet8", "factor": 0}, "`factor` to divide"),
        ("simkd:resnet8", {"teacher": "resnet8", "widths": [3]}, "no option `widths`"),
        ("simkd:resnet8", {"teacher": "cnn", "teacher_options": [8]}, r"`teacher_options` .*got \[8\]"),
        ("simkd:resnet8", {"teacher": "cnn", "teacher_options": {"classes": 9}}, "without `classes` and"),
    ],
)
def test_students_that_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.build(name, **NET, **options)


@pytest.mark.parametrize(
    ("student", "options", "classes", "message"),
    [
        ("resnet8", {}, 4, "as many channels as the teacher's 256 for SimKDLoss, got 64; name `neck`"),
        ("simkd:resnet8", {"teacher": "resnet20"}, 4, "as many channels as the teacher's 256"),
        ("simkd:resnet8", {"teacher": "resnet8x4"}, 12, "a student with a head like the teacher's"),
    ],
)
def test_teachers_that_are_refused(student: str, options: dict, classes: int, message: str) -> None:
    teacher = LiveTeacher(models.build("resnet8x4", **{**NET, "classes": classes}))
    with pytest.raises(UserError, match=message):
        new_method().build(models.build(student, **NET, **options), teacher, batch(1), batch())
