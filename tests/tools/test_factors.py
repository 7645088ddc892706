"""Layers taken apart: the parts make what the whole made, and cost what is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.model import Model, Replace, make_edit
from featherweight.tools.costs import totals
from featherweight.tools.factors import candidates, fill, parts_of
from featherweight.tools.forms import Form, Product, Way
from golden import model, model_of


def everything(path: str, kind: str) -> bool:
    return True


def taken_apart(given: Model, path: str, form: Form) -> Model:
    """A layer in a form, by the weights alone."""
    module = given.copy_module()
    layer: Any = module.get_submodule(path)
    weight = layer.weight.detach().double()
    size = weight[0].numel()
    factors = Product(weight, torch.eye(size, dtype=torch.float64)).factors(form)
    edit = Replace(path, parts_of(layer, form))
    make_edit(module, edit)
    fill(module.get_submodule(path), form, factors, None if layer.bias is None else layer.bias.detach())
    return given.evolve(module=module, edits=(edit,))


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2},
    {"stride": (2, 1), "padding": (0, 2)},
    {"padding": 1, "dilation": 2},
    {"kernel_size": (3, 5), "padding": (1, 2), "stride": (1, 2)},
    {"padding": "same"},
    {"padding": "same", "dilation": (1, 2)},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (2, 1), "padding_mode": "circular", "bias": False},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize(("way", "ranks"), [("product", (7,)), ("spatial", (12,)), ("tucker", (4, 7))])
def test_a_convolution_at_full_rank_makes_what_it_made(
    settings: dict[str, Any], way: Way, ranks: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 7, **{"kernel_size": 3, **settings})
    given = model_of(nn.Sequential(layer, nn.ReLU()), torch.randn(2, 4, 12, 13))
    done = taken_apart(given, "0", Form(way, ranks))
    x = torch.randn(3, 4, 12, 13)
    with torch.no_grad():
        torch.testing.assert_close(done.module(x), given.module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (9,)), (nn.Conv3d, (5, 6, 7))])
@pytest.mark.parametrize(("way", "ranks"), [("product", (6,)), ("tucker", (4, 6))])
def test_convolutions_of_other_axes(
    kind: type[nn.Module], shape: tuple[int, ...], way: Way, ranks: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    given = model_of(nn.Sequential(kind(4, 6, 3, stride=2, padding=1)), torch.randn(2, 4, *shape))
    done = taken_apart(given, "0", Form(way, ranks))
    (found,), _ = candidates(given, everything)
    assert found.ways == ("product", "tucker")
    x = torch.randn(3, 4, *shape)
    with torch.no_grad():
        torch.testing.assert_close(done.module(x), given.module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "forms"),
    [
        (nn.Linear(24, 16), (9, 24), [Form("product", (5,))]),
        (
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            (12, 10, 11),
            [Form("product", (4,)), Form("spatial", (5,)), Form("tucker", (3, 6))],
        ),
        (
            nn.Conv2d(6, 8, (3, 5), stride=(1, 2), padding=(0, 1)),
            (6, 9, 12),
            [Form("product", (4,)), Form("spatial", (5,)), Form("tucker", (3, 6))],
        ),
        (nn.Conv1d(6, 8, 5), (6, 20), [Form("product", (3,)), Form("tucker", (2, 3))]),
    ],
    ids=str,
)
def test_work_is_what_the_network_is_counted_at(
    layer: nn.Module, shape: Sequence[int], forms: Sequence[Form]
) -> None:
    given = model_of(nn.Sequential(layer, nn.ReLU()), torch.randn(2, *shape))
    (found,), refused = candidates(given, everything)
    assert not refused
    for form in (None, *forms):
        counted = totals(given if form is None else taken_apart(given, "0", form))
        work = found.work(form)
        assert work.macs == counted["macs"]
        assert work.parameters == counted["params"] - layer.get_parameter("bias").numel()


class TestCandidates:
    def test_layers_in_the_order_of_calls(self) -> None:
        found, refused = candidates(model("attention"), everything)
        assert [one.path for one in found] == ["embed", "qkv", "project", "fc1", "fc2", "head"]
        assert not refused

    def test_grouped_convolutions_are_passed_by(self) -> None:
        found, refused = candidates(model("depthwise"), everything)
        assert "grouped" in refused["block1.depthwise.0"]
        assert not any("depthwise" in one.path for one in found)

    def test_tied_weights_are_passed_by_and_layers_called_twice_are_not(self) -> None:
        found, refused = candidates(model("shared"), everything)
        assert set(refused) == {"first", "second"}
        (block,) = [one for one in found if one.path == "block"]
        assert len(block.calls) == len(block.places) == 2
        assert block.work().macs == 2 * 8 * 8 * 12 * 12 * 9

    def test_a_layer_whose_weight_the_code_reads_is_passed_by(self) -> None:
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                return F.relu(self.two(self.one(x.to(self.one.weight.dtype))))

        found, refused = candidates(model_of(Reads(), torch.randn(2, 16)), everything)
        assert [one.path for one in found] == ["two"]
        assert refused == {"one": "the module's code reads its 'weight'"}

    def test_layers_inside_of_others_that_compute_with_their_weights(self) -> None:
        class Attends(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
                self.head = nn.Linear(16, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.attention(x, x, x, need_weights=False)[0])

        found, refused = candidates(model_of(Attends(), torch.randn(2, 5, 16)), everything)
        assert [one.path for one in found] == ["head"]
        assert not set(refused) - {"attention.out_proj"}

    def test_what_where_leaves_out_is_no_candidate(self) -> None:
        found, _ = candidates(model("attention"), lambda path, kind: path == "fc1")
        assert [one.path for one in found] == ["fc1"]
