"""One layer alone in few bits: the same as rounding its weight by hand."""

from __future__ import annotations

import torch
from torch import nn

from featherweight.model import Entry, Model
from featherweight.tools.sensitivity import alone, layer_weights


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
