"""One layer alone in few bits: by hand, by a backward pass, by running the network with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from featherweight.formats import IntQuant, PerTensor
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.tools.sensitivity import (
    Candidate,
    Subject,
    alone,
    layer_weights,
    measured_losses,
    predicted_losses,
)


def _model() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    return Model(module, {"forward": Entry((torch.randn(2, 3, 8, 8),), ("x",), ("y",), {"x": {0: "n"}})})


def test_weights_by_layer() -> None:
    assert layer_weights(_model()) == {"0": {"0.weight": 0}, "3": {"3.weight": 0}}


def test_only_that_layer_is_rounded() -> None:
    model, x = _model(), torch.randn(4, 3, 8, 8)
    by_hand = model.copy_module()
    weight = by_hand[3].weight.data  # type: ignore[index, union-attr]
    scale = weight.abs().amax(1, keepdim=True) / 7
    by_hand[3].weight.data = torch.round(weight / scale).clamp(-7, 7) * scale  # type: ignore[index, union-attr]
    with torch.no_grad():
        expected = by_hand(x)
        (seen,) = alone(model, {"3.weight": 0}, 4)(x)
        assert torch.allclose(seen, expected, atol=1e-6)
        assert not torch.allclose(seen, model.module(x), atol=1e-3)


def _calls(count: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 3, 8, 8, generator=generator),) for _ in range(count)]


def _subjects(model: Model, size: float) -> dict[str, Subject]:
    generator = torch.Generator().manual_seed(2)
    nodes = {"0": "0#0", "3": "3#0"}
    return {
        layer: Subject(
            (nodes[layer],),
            {
                "coarse": Candidate({name: 4 * size * torch.randn(weight.shape, generator=generator)}),
                "fine": Candidate({name: size * torch.randn(weight.shape, generator=generator)}),
                "none": Candidate(),
            },
        )
        for layer, name, weight in (
            ("0", "0.weight", model.parameters["0.weight"]),
            ("3", "3.weight", model.parameters["3.weight"]),
        )
    }


def test_measured_is_the_noise_that_the_changed_weight_makes() -> None:
    model, calls = _model(), _calls(6)
    subjects = _subjects(model, 0.01)
    found = measured_losses(model, calls, subjects, {})
    by_hand = model.copy_module()
    with torch.no_grad():
        by_hand[3].weight += subjects["3"].candidates["coarse"].changes["3.weight"]  # type: ignore[index, operator, union-attr]
        noise = sum((by_hand(x) - model.module(x)).square().sum() for (x,) in calls)
        signal = sum(model.module(x).square().sum() for (x,) in calls)
    assert found["3"]["coarse"] == pytest.approx(float(noise / signal), rel=1e-4)
    assert found["3"]["none"] == 0


def test_predicted_is_near_the_measured_for_small_changes() -> None:
    model, calls = _model(), _calls(400)
    subjects = _subjects(model, 1e-3)
    predicted = predicted_losses(model, calls, subjects, {})
    measured = measured_losses(model, calls, subjects, {})
    for layer in subjects:
        for label in ("coarse", "fine"):
            assert predicted[layer][label] == pytest.approx(measured[layer][label], rel=0.3)
        assert predicted[layer]["none"] == 0


def test_rounded_inputs_count_where_they_are_read() -> None:
    model, calls = _model(), _calls(400)
    value = next(node for node in trace(model) if node.layer == "3").inputs[0]
    formats = {value: (IntQuant(torch.tensor(0.0), torch.tensor(1.0), 4, False, PerTensor()),)}
    subjects = {"3": Subject(("3#0",), {"rounded": Candidate({}, True), "not": Candidate({}, False)})}
    measured = measured_losses(model, calls, subjects, formats)["3"]
    predicted = predicted_losses(model, calls, subjects, formats)["3"]
    assert measured["not"] == predicted["not"] == 0
    assert measured["rounded"] > 1e-4
    assert predicted["rounded"] == pytest.approx(measured["rounded"], rel=0.3)


def test_same_seed_same_losses_and_no_gradient_is_left() -> None:
    model, calls = _model(), _calls(4)
    subjects = _subjects(model, 1e-2)
    first = predicted_losses(model, calls, subjects, {}, seed=3)
    assert predicted_losses(model, calls, subjects, {}, seed=3) == first
    assert predicted_losses(model, calls, subjects, {}, seed=4) != first
    assert all(tensor.grad is None and tensor.requires_grad for tensor in model.module.parameters())
