"""Builders of networks: what a line makes, the papers' counts, and what is refused."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import RecipeError
from featherweight.model import Model
from featherweight.nets import FAMILIES, build, efficientnet_lite, mobilenet_v1, shufflenet_v2
from featherweight.nets.published import PUBLISHED, Published, agrees
from featherweight.tools.costs import layer_costs, totals
from golden import model_of


def rows() -> list[Any]:
    """The first row of each family in the fast tests; tracing a network of 224 pixels takes a second."""
    seen: set[str] = set()
    marked = []
    for row in PUBLISHED:
        family = row.spec.partition(":")[0]
        marks = [pytest.mark.slow] if family in seen else []
        marked.append(pytest.param(row, marks=marks, id=f"{row.spec}-{row.resolution}"))
        seen.add(family)
    return marked


@cache
def published(row: Published) -> Model:
    with torch.random.fork_rng():
        net = build(row.spec, channels=row.channels, classes=row.classes, resolution=row.resolution)
    sides = (row.resolution,) * 2 if isinstance(row.resolution, int) else row.resolution
    return model_of(net, torch.zeros(1, row.channels, *sides))


def norms(net: nn.Module) -> int:
    layers = [layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d)]
    return sum(tensor.numel() for layer in layers for tensor in layer.parameters())


def maps(net: nn.Module, x: Tensor, kind: type[nn.Module] = nn.Conv2d) -> list[int]:
    """Elements of what each convolution, or layer of a kind, makes, in their order."""
    sizes: list[int] = []
    for layer in net.modules():
        if isinstance(layer, kind):
            layer.register_forward_hook(lambda _, __, y: sizes.append(y[0].numel()))
    with torch.no_grad():
        net.eval()(x)
    return sizes


def last_map(net: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape that the pool reads."""
    seen: list[tuple[int, ...]] = []
    net.get_submodule("pool").register_forward_hook(lambda _, x, __: seen.append(tuple(x[0].shape[2:])))
    with torch.no_grad():
        net.eval()(x)
    return seen[0]


@pytest.mark.parametrize("row", rows())
class TestPublished:
    def test_parameters_are_the_papers(self, row: Published) -> None:
        counted = totals(published(row))["params"]
        assert row.exact in (None, counted)
        if row.params:
            told = counted - norms(published(row).module) if row.params_of == "no norms" else counted
            assert agrees(row.params, told)

    def test_multiply_accumulates_are_the_papers(self, row: Published) -> None:
        net = published(row)
        if not row.macs:
            return
        told = totals(net)["macs"]
        if row.macs_of == "no classes":
            (head,) = [layer.macs for layer in layer_costs(net) if layer.name == "head"]
            told -= head
        (example,) = net.entries["forward"].example_inputs
        if row.macs_of == "operations":
            told = 2 * told + sum(maps(net.copy_module(), example))
        elif row.macs_of == "with norms":
            told += 3 * sum(maps(net.copy_module(), example, nn.BatchNorm2d))
        if row.differs:
            printed = float(row.macs[:-1]) * {"M": 1e6, "G": 1e9}[row.macs[-1]]
            assert abs(printed / told - 1) < (0.005 if row.macs_of == "with norms" else 0.015)
        else:
            assert agrees(row.macs, told)

    def test_what_differs_is_explained(self, row: Published) -> None:
        assert row.note or not (row.differs or row.params_of != "all" or row.macs_of != "all")


@pytest.mark.parametrize(("size", "memory"), [("s", 38.6), ("m", 189.2), ("l", 497.6)])
def test_ds_cnn_takes_the_memory_that_its_paper_prints(size: str, memory: float) -> None:
    (row,) = [row for row in PUBLISHED if row.spec == f"ds-cnn:size={size}"]
    net = published(row)
    layers = [layer for layer in net.module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = sum(layer.weight.numel() + layer.weight.shape[0] for layer in layers)  # and a bias, once folded
    sizes = maps(net.copy_module(), net.entries["forward"].example_inputs[0])
    held = max(one + two for one, two in pairwise(sizes))
    assert round((weights + held) / 1000, 1) == memory


class TestSettings:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_width_and_depth_change_the_size(self, name: str) -> None:
        signal = FAMILIES[name].inputs == "signal"
        resolution = 100 if signal else 32

        def size(settings: str) -> int:
            net = build(f"{name}:{settings}", channels=3, classes=10, resolution=resolution)
            with torch.no_grad():
                y = net.eval()(torch.zeros(2, 3, *([resolution] if signal else [resolution] * 2)))
            assert y.shape == (2, 10)
            return sum(tensor.numel() for tensor in net.parameters())

        narrow, wide = FAMILIES[name].widths[0], FAMILIES[name].widths[2]
        assert size(f"width={narrow}") < size(f"width={wide}") < size(f"width={wide},depth=3")
        if "kernel" in FAMILIES[name].settings:
            assert size(f"width={narrow},kernel=3") < size(f"width={narrow},kernel=7")

    @pytest.mark.parametrize(
        "name", [name for name in FAMILIES if name not in ("vit", "ds-cnn", "ds-cnn-1d")]
    )
    @pytest.mark.parametrize(("resolution", "side"), [(28, 4), (32, 4), (64, 4), (65, 3), (96, 3), (128, 4)])
    def test_small_pictures_keep_a_last_map(self, name: str, resolution: int, side: int) -> None:
        net = build(f"{name}:width=0.15,depth=0.2", channels=1, classes=2, resolution=resolution)
        assert last_map(net, torch.zeros(1, 1, resolution, resolution)) == (side, side)

    @pytest.mark.parametrize("length", [20, 49, 500, 8000, 16000, 40000])
    def test_signals_of_any_length_end_in_a_few_steps(self, length: int) -> None:
        net = build("ds-cnn-1d:width=0.125", channels=1, classes=2, resolution=length)
        (steps,) = last_map(net, torch.zeros(1, 1, length))
        assert steps == -(-length // 2) if length < 100 else 32 <= steps <= 64

    def test_pictures_need_not_be_square(self) -> None:
        for name in ("mobilenetv2", "ds-cnn", "vit"):
            net = build(f"{name}:width=0.2,depth=0.2", channels=1, classes=2, resolution=(24, 32))
            assert net.eval()(torch.zeros(1, 1, 24, 32)).shape == (1, 2)

    def test_blocks_with_a_skip_start_where_the_gradient_flows(self) -> None:
        torch.manual_seed(0)
        net = build("mobilenetv3-small:width=0.25", channels=1, classes=10, resolution=28)
        net(torch.randn(8, 1, 28, 28)).square().sum().backward()
        for name, tensor in net.named_parameters():
            assert tensor.grad is not None, name
            assert tensor.grad.isfinite().all(), name
            assert tensor.grad.abs().max() > 0, name

    def test_widths_between_those_of_the_paper_lie_between(self) -> None:
        sizes = [
            shufflenet_v2(width=width).stages[0][0].branch[2][0].out_channels for width in (0.5, 0.75, 1)
        ]
        assert sizes == [24, 40, 58]

    def test_builders_take_keywords_only(self) -> None:
        net = mobilenet_v1(width=0.25, channels=1, classes=3, resolution=32)
        assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
        with pytest.raises(TypeError):
            mobilenet_v1(0.25)  # type: ignore[misc]


class TestRefusals:
    @pytest.mark.parametrize(
        ("spec", "what", "fix"),
        [
            ("mobilnetv2", "no network 'mobilnetv2'", "did you mean 'mobilenetv2'?"),
            ("", "no network ''", "known: ds-cnn"),
            ("mobilenetv2:widht=1", "mobilenetv2 has no setting 'widht'", "did you mean 'width'?"),
            ("mobilenetv2:resolution=96", "no setting 'resolution'", "come from the data"),
            ("vit:kernel=3", "vit has no setting 'kernel'", "patch"),
            ("mobilenetv2:width=wide", "width is 'wide'", "a number, as in width=0.5"),
            ("mobilenetv2:width", "width is ''", "a number, as in width=0.5"),
            ("mobilenetv2:kernel=2.5", "kernel is '2.5'", "a whole number, as in kernel=3"),
            ("mobilenetv2:width=1,width=2", "'width' is set twice", "once"),
            ("mobilenetv2:width=0", "width is 0", "above 0"),
            ("mobilenetv2:width=nan", "width is nan", "above 0"),
            ("mobilenetv2:depth=-1", "depth is -1", "above 0"),
            ("mobilenetv2:kernel=4", "kernel is 4", "an odd kernel"),
            ("shufflenetv1:groups=5", "groups is 5", "1, 2, 3, 4 or 8"),
            ("ds-cnn:size=q", "size is 'q'", "s, m or l"),
            (
                "vit:patch=5",
                "patches of 5 do not fill a picture of 28 x 28",
                "a patch that divides both sides",
            ),
            ("vit:heads=0", "heads is 0", "at least one"),
            ("ds-cnn-1d", "ds-cnn-1d is for signals", "mobilenetv1"),
        ],
    )
    def test_a_line_that_makes_no_network(self, spec: str, what: str, fix: str) -> None:
        with pytest.raises(RecipeError) as told:
            build(spec, channels=1, classes=10, resolution=(28, 28))
        assert what in told.value.what
        assert told.value.where == f"'{spec}'"
        assert fix in (told.value.fix or "")

    def test_a_network_for_pictures_and_a_signal(self) -> None:
        with pytest.raises(RecipeError, match="for pictures of two axes; the examples have 1") as told:
            build("mobilenetv2", channels=1, classes=10, resolution=(100,))
        assert told.value.fix == "a network for signals: ds-cnn-1d"

    @pytest.mark.parametrize(("channels", "classes"), [(0, 1), (1, 0)])
    def test_nothing_in_or_out(self, channels: int, classes: int) -> None:
        with pytest.raises(RecipeError, match="is 0"):
            build("mobilenetv2", channels=channels, classes=classes, resolution=28)

    def test_a_variant_that_is_not_there(self) -> None:
        with pytest.raises(RecipeError, match="efficientnet-lite7"):
            efficientnet_lite(7)
