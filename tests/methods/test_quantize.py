"""Quantize: which values become integers, over which range, and which layers are spared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.data import Data
from featherweight.errors import DataError, RecipeError, TargetError
from featherweight.formats import (
    Binary,
    Dynamic,
    IntQuant,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorFormat,
    Ternary,
    decode,
    encode,
)
from featherweight.graph import trace
from featherweight.method import Context, Silent
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.tools.simulate import Replay, layer_errors, simulate
from golden import context, data, decibels, folded, model_of, quantized, target
from heard import Heard

VNNI = target(isa="vnni")
TORCH = target("torch")


def quantize(net: Model, examples: Data | None = None, **parameters: Any) -> dict[str, IntQuant]:
    """The formats that a step gives to a model, each chain of length one."""
    if examples is None:
        examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
    done = Quantize.model_validate(parameters).apply(net, context(net, examples, VNNI))
    assert done.module is net.module
    assert net.formats == {}
    assert all(len(chain) == 1 for chain in done.formats.values())
    return {name: chain[0] for name, chain in done.formats.items()}  # type: ignore[misc]


def weights(formats: Iterable[str]) -> set[str]:
    return {name for name in formats if "#" not in name and not name.startswith("input:")}


def values(formats: Iterable[str]) -> set[str]:
    return set(formats) - weights(formats)


def ends(fmt: IntQuant) -> tuple[float, float]:
    return float(fmt.low), float(fmt.high)


def seen(net: Model, examples: Data, name: str) -> Tensor:
    """What calibration makes of a value."""
    found: list[Tensor] = []
    replay = Replay(net)

    def observe(key: str, value: Tensor) -> Tensor:
        if key == name:
            found.append(value)
        return value

    with torch.no_grad():
        for batch in examples.calibration():
            replay(tuple(map(torch.from_numpy, batch)), observe)
    return torch.cat(found)


class TestPlan:
    def test_of_a_residual_net(self) -> None:
        formats = {name: chain[0] for name, chain in quantized("residual").formats.items()}
        convs = {
            "stem.0",
            "layer1.conv1",
            "layer1.conv2",
            "layer2.conv1",
            "layer2.conv2",
            "layer2.shortcut.0",
        }
        assert weights(formats) == {f"{layer}.weight" for layer in {*convs, "head"}}
        assert values(formats) == {
            "input:x",
            "stem.2#0:0",  # behind the convolution's ReLU, not before it
            "layer1.relu#0:0",
            "layer1.conv2#0:0",  # one side of the addition; the other is stem.2
            "layer1.relu#1:0",  # behind the addition's ReLU
            "layer2.relu#0:0",
            "layer2.conv2#0:0",
            "layer2.shortcut.0#0:0",
            "layer2.relu#1:0",
            "pool#0:0",
            "/flatten#0:0",
        }  # the head's output is the network's, and stays float
        assert formats["/flatten#0:0"] is formats["pool#0:0"]

    def test_of_a_concatenation(self) -> None:
        formats = values(quantized("concat").formats)
        assert {"/cat#1:0", "stem#0:0", "convs.0#0:0", "transition.3#0:0"} <= formats
        assert "norms.0#0:0" not in formats  # a batch norm that could not be folded has no integer kernel
        assert "/relu#0:0" in formats  # and the next convolution reads integers again

    def test_of_inverted_residuals(self) -> None:
        formats = values(quantized("depthwise").formats)
        assert {"block1.depthwise.2#0:0", "block1.project.0#0:0", "block1/add#0:0"} <= formats
        assert not {"block1.depthwise.0#0:0", "block1.expand.0#0:0"} & formats

    def test_of_attention(self) -> None:
        formats = quantized("attention").formats
        moved = {formats[name][0] for name in ("/reshape#1:0", "/transpose#0:0")}
        assert moved == {formats["/scaled_dot_product_attention#0:0"][0]}  # a move costs no new range
        assert "/unbind#0:0" not in formats
        assert "qkv#0:0" not in formats  # softmax stays float, so the projection returns floats

    def test_a_pooling_by_maximum_shares_the_range(self) -> None:
        net = model_of(
            nn.Sequential(
                nn.Conv2d(3, 4, 3),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(4, 4, 1),
                nn.Flatten(),
                nn.Linear(36, 5),
            ),
            torch.randn(2, 3, 8, 8),
        )
        formats = quantize(net)
        assert formats["2#0:0"] is formats["1#0:0"]
        assert formats["4#0:0"] is formats["3#0:0"]
        assert values(formats) == {"input:x", "1#0:0", "2#0:0", "3#0:0", "4#0:0"}

    def test_a_clamp_that_another_reader_shares_is_not_absorbed(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Conv2d(3, 4, 1)
                self.b = nn.Conv2d(4, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                y = self.a(x)
                return self.b(F.relu(y)) + y

        formats = quantize(model_of(Net(), torch.randn(2, 3, 4, 4)))
        assert {"a#0:0", "/relu#0:0", "b#0:0", "/add#0:0"} <= set(formats)

    def test_constants_and_integers_stay(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.table = nn.Embedding(10, 8)
                self.scale = nn.Parameter(torch.ones(8))
                self.fc = nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(self.table(x + 1) * self.scale + 2.0)

        tokens = np.random.default_rng(0).integers(0, 8, (4, 5))
        net = model_of(Net(), torch.from_numpy(tokens))
        formats = quantize(net, Data.of(x_train=tokens))
        assert values(formats) == {"/add#1:0"}
        assert weights(formats) == {"fc.weight", "table.weight"}  # a table is looked up, whatever is read

    def test_only_weights(self) -> None:
        formats = quantize(folded("residual"), data("residual"), activations="none")
        assert len(formats) == 7
        assert values(formats) == set()

    def test_transposed_convolutions_where_the_runtime_has_them(self) -> None:
        net = model_of(
            nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 3, 1)), torch.randn(2, 4, 5, 5)
        )
        assert weights(quantize(net)) == {"1.weight"}
        examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
        everywhere = Quantize().apply(net, context(net, examples, target("torch")))
        (fmt,) = everywhere.formats["0.weight"]
        assert isinstance(fmt, IntQuant)
        assert fmt.granularity == PerChannel(1)
        assert fmt.low.shape == (6,)

    def test_every_entry(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x)

            def other(self, x: Tensor) -> Tensor:
                return self.b(x)

        x = torch.randn(2, 3, 4, 4)
        entries = {n: Entry((x,), ("x",), ("y",), {"x": {0: "n"}}, n) for n in ("forward", "other")}
        assert set(quantize(Model(Net(), entries))) == {
            "a.weight", "b.weight", "input:x", "a#0:0", "b#0:0"
        }  # fmt: skip


class TestFormats:
    def test_are_on_the_grid_that_the_runtime_stores(self) -> None:
        formats = quantize(folded("residual"), data("residual"))
        for name in weights(formats):
            fmt = formats[name]
            assert (fmt.signed, fmt.symmetric, fmt.headroom, fmt.granularity) == (
                True,
                True,
                0,
                PerChannel(0),
            )
        for name in values(formats):
            assert (formats[name].signed, formats[name].symmetric) == (False, False)
        narrow = Quantize().apply(
            folded("residual"), context(folded("residual"), data("residual"), target(isa="avx2"))
        )
        (fmt,) = narrow.formats["head.weight"]
        assert isinstance(fmt, IntQuant)
        assert fmt.headroom == 1

    @pytest.mark.parametrize(("isa", "asked", "unused"), [("vnni", 2, 2), ("avx2", 2, 2), ("avx2", 0, 1)])
    def test_unused_bits_are_those_asked_for_and_those_of_the_kernels(
        self, isa: str, asked: int, unused: int
    ) -> None:
        net = folded("residual")
        done = Quantize(headroom=asked).apply(net, context(net, data("residual"), target(isa=isa)))
        whole = Quantize().apply(net, context(net, data("residual"), target(isa=isa)))
        for name in weights(formats := {key: chain[-1] for key, chain in done.formats.items()}):
            fmt = formats[name]
            assert isinstance(fmt, IntQuant)
            assert (fmt.headroom, fmt.width) == (unused, 8)
            levels = fmt.quantize(net.parameters[name].detach())
            assert levels.abs().max() == fmt.quant_max == 2 ** (7 - unused) - 1
        for name in values(formats):
            assert formats[name].headroom == 0  # type: ignore[attr-defined]
        assert set(done.formats) == set(whole.formats)

    def test_unused_bits_of_a_layer(self) -> None:
        formats = quantize(folded("residual"), data("residual"), headroom=3, layers={"head": {"headroom": 0}})
        unused = {name: formats[name].headroom for name in weights(formats)}
        assert unused.pop("head.weight") == 0
        assert set(unused.values()) == {3}

    @pytest.mark.parametrize(
        "asked",
        [
            {"headroom": 3, "weights": "int4"},
            {"headroom": 1, "weights": "ternary"},
            {"headroom": 2, "layers": {"head": {"weights": "int3"}}},
            {"layers": {"head": {"weights": "binary", "headroom": 1}}},
        ],
    )
    def test_two_bits_at_least_are_used(self, asked: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="two at least are needed"):
            Quantize.model_validate(asked)

    def test_per_tensor(self) -> None:
        formats = quantize(
            folded("linear3d"), data("linear3d"), granularity="per_tensor", weight_range="minmax"
        )
        fmt = formats["fc1.weight"]
        weight = folded("linear3d").parameters["fc1.weight"]
        assert fmt.granularity == PerTensor()
        assert (fmt.low, fmt.high) == (weight.min(), weight.max())

    def test_asymmetric_weights_per_tensor(self) -> None:
        formats = quantize(
            folded("linear3d"), data("linear3d"), granularity="per_tensor", symmetric_weights=False
        )
        assert not formats["fc1.weight"].symmetric
        with pytest.raises(TargetError, match="asymmetric weights per channel") as told:
            quantize(folded("linear3d"), data("linear3d"), symmetric_weights=False)
        assert told.value.where == "'fc1.weight', asked for by quantize"

    def test_symmetric_activations(self) -> None:
        formats = quantize(folded("residual"), data("residual"), symmetric_activations=True)
        _, zero_point = formats["input:x"].grid()
        assert int(zero_point) == 128
        scale, zero_point = formats["stem.2#0:0"].grid()  # nothing is below zero behind ReLU
        assert int(zero_point) == 0
        assert float(scale) * 255 == pytest.approx(float(formats["stem.2#0:0"].high), rel=1e-5)

    def test_weight_ranges(self) -> None:
        weight = folded("residual").parameters["stem.0.weight"].detach().flatten(1)
        whole = quantize(folded("residual"), data("residual"), weight_range="minmax")["stem.0.weight"]
        assert torch.equal(whole.low, weight.amin(1).clamp(max=0))
        assert torch.equal(whole.high, weight.amax(1).clamp(min=0))
        some = quantize(folded("residual"), data("residual"), weight_range="percentile", percentile=80)
        assert (some["stem.0.weight"].high <= whole.high).all()
        assert (some["stem.0.weight"].high < whole.high).any()
        best = quantize(folded("residual"), data("residual"))["stem.0.weight"]

        def error(fmt: IntQuant) -> Tensor:
            return (fmt.project(weight) - weight).square().sum(1)

        assert (error(best) <= error(whole) * 1.0001).all()


class TestRanges:
    @pytest.mark.parametrize("name", ["input:x", "stem.2#0:0", "layer1.conv2#0:0", "pool#0:0"])
    def test_minmax_is_what_calibration_saw(self, name: str) -> None:
        formats = quantize(folded("residual"), data("residual"), range="minmax")
        value = seen(folded("residual"), data("residual"), name)
        assert ends(formats[name]) == pytest.approx((float(value.min()), float(value.max())), rel=1e-6)

    def test_percentile_is_inside(self) -> None:
        formats = quantize(folded("residual"), data("residual"), range="percentile", percentile=95)
        value = seen(folded("residual"), data("residual"), "input:x")
        wanted = np.quantile(value.numpy(), [0.025, 0.975])
        assert ends(formats["input:x"]) == pytest.approx(tuple(wanted), abs=0.02)

    def test_least_squares_is_not_worse_than_minmax(self) -> None:
        best = quantize(folded("residual"), data("residual"), range="mse")
        whole = quantize(folded("residual"), data("residual"), range="minmax")
        for name in values(best):
            value = seen(folded("residual"), data("residual"), name)
            errors = [float((fmt.project(value) - value).square().sum()) for fmt in (best[name], whole[name])]
            assert errors[0] <= errors[1] * 1.01

    def test_samples_are_as_many_as_asked_for(self) -> None:
        read: list[int] = []

        class Counting(Silent):
            def track(
                self, items: Iterable[Any], description: str, total: int | None = None
            ) -> Iterator[Any]:
                for item in items:
                    read.append(len(item[0]))
                    yield item

        net = folded("linear3d")
        base = context(net, data("linear3d").evolve(batch_size=5))
        counted: Context = replace(base, progress=Counting())
        Quantize(samples=12).apply(net, counted)
        assert read == [5, 5, 2]

    def test_nan_in_calibration_is_told(self) -> None:
        x = np.full((4, 9, 12), np.inf, np.float32)
        broken = model_of(nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 4)), torch.randn(2, 9, 12))
        with torch.no_grad():
            broken.module[0].bias[0] = torch.nan  # type: ignore[index]
        with pytest.raises(DataError, match="'0#0:0' is NaN or infinite"):
            quantize(broken, Data.of(x_train=np.zeros_like(x)))

    def test_no_examples_at_all_are_told(self) -> None:
        with pytest.raises(DataError, match="calibration") as told:
            quantize(folded("linear3d"), Data.of())
        assert told.value.fix is not None
        assert quantize(folded("linear3d"), Data.of(), activations="none")


class TestWhere:
    def test_an_excluded_layer_stays_float(self) -> None:
        formats = quantize(folded("residual"), data("residual"), where={"exclude": ["layer1"]})
        assert not [name for name in weights(formats) if name.startswith("layer1")]
        assert "layer1.relu#0:0" not in formats
        assert "layer1.conv2#0:0" not in formats
        assert "layer2.conv1.weight" in formats

    def test_by_type(self) -> None:
        formats = quantize(folded("residual"), data("residual"), where={"include": ["Linear"]})
        assert set(formats) == {"head.weight", "pool#0:0", "/flatten#0:0"} or set(formats) == {
            "head.weight", "/flatten#0:0"
        }  # fmt: skip

    def test_the_last_rule_wins(self) -> None:
        where = [{"exclude": ["layer2"]}, {"include": ["layer2.conv2"]}]
        formats = weights(quantize(folded("residual"), data("residual"), where=where))
        assert {name for name in formats if name.startswith("layer2")} == {"layer2.conv2.weight"}

    @pytest.mark.parametrize("excluded", ["first", "second"])
    def test_a_weight_that_an_excluded_layer_shares_stays_float(self, excluded: str) -> None:
        formats = quantize(folded("shared"), data("shared"), where={"exclude": [excluded]})
        assert "first.weight" not in formats
        assert "block.weight" in formats

    def test_everything_excluded_is_an_error(self) -> None:
        with pytest.raises(RecipeError, match="no layer to quantize for onnxruntime") as told:
            quantize(folded("residual"), data("residual"), where={"exclude": ["*"]})
        assert told.value.fix is not None
        assert "where" in told.value.fix

    def test_nothing_that_the_runtime_has_integers_for_is_an_error(self) -> None:
        net = model_of(nn.Sequential(nn.LayerNorm(4), nn.Tanh()), torch.randn(2, 4))
        with pytest.raises(RecipeError, match="no layer"):
            quantize(net)


@pytest.fixture(scope="module")
def uneven() -> Model:
    """Two layers that lose much, since one weight of each channel is far out."""
    module = folded("residual").copy_module()
    with torch.no_grad():
        module.layer2.conv1.weight[:, 0, 0, 0] = 40.0  # type: ignore[union-attr,index,operator]
        module.layer1.conv2.weight[:, 0, 0, 0] = 9.0  # type: ignore[union-attr,index,operator]
    return folded("residual").evolve(module=module)


class TestFallback:
    def test_spares_the_layers_that_lose_most(self, uneven: Model) -> None:
        plain = {"range": "minmax", "weight_range": "minmax"}
        every = quantize(uneven, data("residual"), **plain)
        batches = [tuple(map(torch.from_numpy, batch)) for batch in data("residual").calibration()]
        errors = layer_errors(uneven.evolve(formats={n: (f,) for n, f in every.items()}), batches)
        layers = {node.name: node.layer for node in trace(uneven) if "weight" in node.parameters}
        worst = sorted((decibels, layers[name]) for name, decibels in errors.items() if name in layers)
        for count in (1, 2):
            some = quantize(uneven, data("residual"), fallback=count, **plain)
            spared = {f"{layer}.weight" for _, layer in worst[:count]}
            assert weights(every) - weights(some) == spared

    def test_leaves_everything_when_there_are_not_so_many(self) -> None:
        with pytest.raises(RecipeError, match="no layer"):
            quantize(folded("lstm"), data("lstm"), fallback=5)


class TestTwice:
    def test_a_second_step_leaves_the_first_ones_weights(self) -> None:
        net = folded("residual")
        first = Quantize.model_validate({"granularity": "per_tensor", "where": {"include": ["stem"]}})
        once = first.apply(net, context(net, data("residual"), VNNI))
        twice = Quantize().apply(once, context(net, data("residual"), VNNI))
        assert twice.formats["stem.0.weight"] == once.formats["stem.0.weight"]
        assert "head.weight" in twice.formats


class TestParameters:
    @pytest.mark.parametrize(
        "parameters",
        [
            {"weights": "int9"},
            {"activations": "uint8"},
            {"granularity": "per_block"},
            {"group": 1},
            {"range": "entropy"},
            {"percentile": 50},
            {"percentile": 101},
            {"samples": 0},
            {"fallback": -1},
            {"bits": 8},
        ],
    )
    def test_that_mean_nothing_are_refused(self, parameters: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Quantize.model_validate(parameters)

    def test_holes_are_parameters_with_values_that_it_takes(self) -> None:
        holes = Quantize.holes(folded("residual"), context(folded("residual"), data("residual")))
        for name, hole in holes.items():
            for value in hole.ends():
                Quantize.model_validate({name: value})
        few = Quantize.holes(folded("lstm"), context(folded("lstm"), data("lstm")))
        assert few["fallback"].size == 1  # one layer: nothing would be left


class Masked(nn.Module):
    """Attention with the mask that exporters write: the smallest float where nothing may be looked at."""

    def __init__(self, least: float) -> None:
        super().__init__()
        self.qk, self.out = nn.Linear(8, 16), nn.Linear(8, 8)
        self.register_buffer("mask", torch.triu(torch.full((6, 6), least), 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return self.out((q @ k.transpose(1, 2) + self.mask).softmax(-1) @ x)


@pytest.mark.parametrize("least", [-1e4, torch.finfo(torch.float32).min])
def test_a_mask_leaves_the_scores_their_steps(least: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6, 8)
    net = model_of(Masked(least), x[:2])
    done = Quantize().apply(net, context(net, Data.of(x_train=x.numpy()), VNNI))
    assert not any(float(fmt.low.min()) < -1e3 for chain in done.formats.values() for fmt in chain)  # type: ignore[attr-defined]
    errors = layer_errors(done, [(x,)])
    assert min(errors.values()) > 20


def on_torch(name: str, **parameters: Any) -> dict[str, TensorFormat]:
    """The formats that a step gives to a golden net where every kernel is simulated."""
    net = folded(name)
    done = Quantize.model_validate(parameters).apply(net, context(net, data(name), TORCH))
    assert all(len(chain) == 1 for chain in done.formats.values())
    return {key: chain[0] for key, chain in done.formats.items()}


def notes(net: Model, examples: Data, on: Any = VNNI, **parameters: Any) -> list[str]:
    told = Heard()
    asked = replace(context(net, examples, on), progress=told)
    Quantize.model_validate(parameters).apply(net, asked)
    return told.notes


class TestWeights:
    @pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
    @pytest.mark.parametrize("kind", ["int8", "int7", "int6", "int5", "int4", "int3", "int2"])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_of_every_width(self, kind: str, granularity: str, symmetric: bool) -> None:
        asked = {"weights": kind, "granularity": granularity, "symmetric_weights": symmetric, "group": 8}
        formats = on_torch("residual", activations="none", **asked)
        assert weights(formats) == set(formats)
        for name, fmt in formats.items():
            weight = folded("residual").parameters[name].detach()
            assert isinstance(fmt, IntQuant)
            assert (fmt.width, fmt.symmetric) == (int(kind[3:]), symmetric)
            assert len(fmt.project(weight).unique()) <= 2**fmt.width * fmt.low.numel()
            groups = -(-weight[0].numel() // 8)
            wanted = {"per_tensor": (), "per_channel": (len(weight),), "per_group": (len(weight), groups)}
            assert fmt.low.shape == wanted[granularity]

    @pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
    @pytest.mark.parametrize(("kind", "made", "levels"), [("ternary", Ternary, 3), ("binary", Binary, 2)])
    def test_of_signs(self, kind: str, made: type, levels: int, granularity: str) -> None:
        formats = on_torch("residual", weights=kind, granularity=granularity, group=16)
        fmt = formats["layer1.conv1.weight"]
        assert isinstance(fmt, made)
        weight = folded("residual").parameters["layer1.conv1.weight"].detach()
        if granularity == "per_channel":
            assert all(len(row.unique()) == levels for row in fmt.project(weight))
        assert fmt.bits(weight.numel()) < {Ternary: 2, Binary: 1}[made] + 32 / 8.9

    @pytest.mark.parametrize("kind", ["int8", "int4", "int3", "ternary", "binary"])
    @pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
    def test_on_grid_weights_stay_what_they_are(self, kind: str, granularity: str) -> None:
        """Rounding relies on it: a second projection, also behind JSON, changes no bit."""
        for name, fmt in on_torch("depthwise", weights=kind, granularity=granularity).items():
            if name in folded("depthwise").parameters:
                stored = fmt.project(folded("depthwise").parameters[name].detach())
                for again in (fmt, decode(encode(fmt))):
                    assert torch.equal(again.project(stored), stored)

    def test_groups_of_a_transposed_convolution_lie_along_its_inputs(self) -> None:
        net = model_of(nn.Sequential(nn.ConvTranspose2d(4, 6, 2)), torch.randn(2, 4, 5, 5))
        examples = Data.of(x_train=torch.randn(20, 4, 5, 5).numpy())
        done = Quantize(granularity="per_group", group=8).apply(net, context(net, examples, TORCH))
        (fmt,) = done.formats["0.weight"]
        assert isinstance(fmt, IntQuant)
        assert fmt.granularity == PerGroup(0, 8)
        assert fmt.low.shape == (2, 6)  # 4 inputs of 2 x 2 for each of 6 outputs

    def test_float_weights_read_integers_where_a_runtime_does(self) -> None:
        formats = on_torch("residual", weights="none")
        assert weights(formats) == set()
        assert values(formats) == values(quantized("residual", "torch").formats)

    def test_recurrent_ones(self) -> None:
        formats = on_torch("lstm")
        assert {name for name in weights(formats) if name.startswith("lstm")} == {
            f"lstm.weight_{side}_l{layer}" for side in ("ih", "hh") for layer in (0, 1)
        }
        assert formats["input:x"] == Dynamic(8, per="token", readers=frozenset({"lstm"}))
        alone = on_torch("lstm", activations="none")
        assert values(alone) == set()
        assert "lstm.weight_hh_l1" in alone

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_that_are_not_finite_are_named(self, bad: float) -> None:
        module = folded("linear3d").copy_module()
        with torch.no_grad():
            module.get_parameter("fc1.weight")[0, 0] = bad
        net = folded("linear3d").evolve(module=module)
        with pytest.raises(DataError, match=r"'fc1.weight' holds NaN or infinite weights"):
            quantize(net, data("linear3d"), activations="none")


class TestDynamic:
    def test_ranges_are_found_at_run_time_for_layers_with_weights_alone(self) -> None:
        formats = on_torch("attention", activations="dynamic")
        assert weights(formats) == {f"{layer}.weight" for layer in LAYERS_OF_ATTENTION}
        inputs = {node.inputs[0] for node in trace(folded("attention")) if node.op == "linear"}
        assert values(formats) == inputs
        for name in inputs:
            assert formats[name] == Dynamic(8, per="token", readers=frozenset({"linear"}))

    def test_it_needs_no_calibration(self) -> None:
        net = folded("attention")
        done = Quantize(activations="dynamic").apply(net, context(net, Data.of(), TORCH))
        assert "input:x" in done.formats

    def test_the_simulation_rounds_for_its_readers_alone(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8, bias=False)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(x) + x

        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        net = model_of(Net(), x)
        done = Quantize(activations="dynamic").apply(net, context(net, Data.of(), TORCH))
        weight = done.formats["fc.weight"][0].project(net.parameters["fc.weight"].detach())
        rounded = torch.stack([IntQuant(row.min(), row.max()).project(row) for row in x])
        (made,) = simulate(done)(x)
        assert torch.allclose(made, rounded @ weight.T + x, atol=1e-6)

    def test_weights_alone_where_a_runtime_has_no_such_kernel(self) -> None:
        """Per token, else per tensor, else the layer's input stays float."""
        net, asked = folded("residual"), []

        class Some:
            float_outputs = one_grid = joined = frozenset[str]()
            fixed_ranges: ClassVar[dict[str, tuple[float, float]]] = {}
            width_multiple = 8

            def integers_pay(self, node: Any, graph: Any) -> bool:
                return True

            def __call__(self, op: str, weight: Any, activation: Any) -> bool:
                asked.append((op, activation))
                per_tensor = activation is not None and activation.per == "tensor"
                return per_tensor if op == "linear" else activation is None

            def realise(self, fmt: TensorFormat, role: str) -> TensorFormat:
                return replace(fmt, signed=True)  # type: ignore[type-var]

        done = Quantize(activations="dynamic").apply(
            net, replace(context(net, Data.of(), TORCH), supports=Some())
        )
        assert ("linear", Dynamic(8, per="token")) in asked
        assert values(done.formats) == {"/flatten#0:0"}
        (fmt,) = done.formats["/flatten#0:0"]
        assert fmt == Dynamic(8, signed=True, per="tensor", readers=frozenset({"linear"}))
        assert "stem.0.weight" in done.formats


LAYERS_OF_ATTENTION = ("embed", "qkv", "project", "fc1", "fc2", "head")


class TestLayers:
    def test_have_formats_of_their_own_and_the_last_rule_wins(self) -> None:
        layers = {
            "layer1": {"weights": "int4", "granularity": "per_group", "group": 16},
            "layer1.conv2": {"weights": "ternary"},
            "Linear": {"weights": "int3", "symmetric_weights": False},
        }
        formats = on_torch("residual", layers=layers)
        first = formats["layer1.conv1.weight"]
        assert isinstance(first, IntQuant)
        assert (first.width, first.granularity) == (4, PerGroup(1, 16))
        second = formats["layer1.conv2.weight"]
        assert isinstance(second, Ternary)
        assert second.granularity == PerChannel(0)
        head = formats["head.weight"]
        assert isinstance(head, IntQuant)
        assert (head.width, head.symmetric) == (3, False)
        assert formats["stem.0.weight"].width == 8

    def test_read_inputs_of_their_own(self) -> None:
        ends = {"weights": "int8", "activations": "int8"}
        formats = on_torch(
            "residual", weights="int4", activations="int4", layers={"stem.0": ends, "head": ends}
        )
        net = trace(folded("residual"))
        read = {node.layer: node.inputs[0] for node in net if "weight" in node.parameters}
        assert {layer: formats[value].width for layer, value in read.items()} == {
            layer: 8 if layer in ("stem.0", "head") else 4 for layer in read
        }
        moved = net.producer[read["head"]].inputs[0]  # what flatten only moves shares its grid
        assert encode(formats[moved]) == encode(formats[read["head"]])

    @pytest.mark.parametrize(
        "runtime",
        ["onnxruntime", "openvino", "litert", "coreml", "mnn", "ncnn", "executorch", "tensorrt"],
    )
    def test_stay_float_where_kernels_read_no_such_inputs(self, runtime: str) -> None:
        net = folded("residual")
        layers = {"head": {"activations": "int4"}}
        told = Heard()
        asked = replace(context(net, data("residual"), target(runtime)), progress=told)
        done = Quantize.model_validate({"layers": layers}).apply(net, asked).formats
        plain = Quantize().apply(net, asked).formats
        assert weights(done) == weights(plain) - {"head.weight"}
        assert {fmt.width for chain in done.values() for fmt in chain} == {8}
        (note,) = told.notes
        assert note.startswith(f"warning: 1 layer stays float, since {runtime} has no kernel of linear")
        assert note.endswith("or what layers says: head")

    @pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "mnn"])
    def test_are_integers_where_kernels_read_these_alone(self, runtime: str, tmp_path: Path) -> None:
        net = folded("residual")
        parameters = {"activations": "int4", "layers": {"layer2.*": {"activations": "int8"}}}
        told = Heard()
        asked = replace(context(net, data("residual"), target(runtime)), progress=told)
        done = Quantize.model_validate(parameters).apply(net, asked)
        assert weights(done.formats) == {
            name for name in weights(Quantize().apply(net, asked).formats) if "layer2." in name
        }
        assert {fmt.width for chain in done.formats.values() for fmt in chain} == {8}
        assert "layer2" not in told.notes[0].rpartition(":")[2]
        if find_runtime(runtime).installed():
            artifact = find_runtime(runtime).lower(done, target(runtime), tmp_path)
            x = net.entries["forward"].example_inputs[0]
            (ours,) = find_runtime(runtime).open(artifact, target(runtime))(x.numpy())
            assert decibels(net.module(x).detach(), ours) > 20

    def test_own_inputs_need_static_integers(self) -> None:
        with pytest.raises(ValueError, match="layers asks for int8 inputs, and activations is none"):
            Quantize.model_validate({"activations": "none", "layers": {"fc": {"activations": "int8"}}})

    def test_float_is_as_if_it_were_excluded(self) -> None:
        some = on_torch("residual", layers={"layer2.*": "float"})
        same = on_torch("residual", where={"exclude": ["layer2.*"]})
        assert {name: encode(fmt) for name, fmt in some.items()} == {
            name: encode(fmt) for name, fmt in same.items()
        }
        back = on_torch("residual", layers={"layer2.*": "float", "layer2.conv1": {}})
        assert "layer2.conv1.weight" in back
        assert "layer2.conv2.weight" not in back

    def test_survive_a_recipe(self) -> None:
        asked = Quantize.model_validate({"layers": {"a.*": {"weights": "int4"}, "b": "float"}})
        plain = asked.model_dump(mode="json")
        assert plain["layers"] == {"a.*": {"weights": "int4"}, "b": "float"}
        assert Quantize.model_validate(plain) == asked

    def test_a_rule_that_means_no_layer_is_told(self) -> None:
        found = notes(folded("residual"), data("residual"), layers={"layer7": "float", "head": "float"})
        assert found == ["warning: layers of quantize names 'layer7', which is no layer or type of the model"]

    def test_weight_formats_are_those_of_apply_without_calibration(self) -> None:
        net = folded("residual")
        for parameters in (
            {},
            {"weights": "int4", "granularity": "per_group"},
            {"layers": {"head": "float"}},
        ):
            step = Quantize.model_validate(parameters)
            whole = step.apply(net, context(net, data("residual"), TORCH)).formats
            alone = step.weight_formats(net, context(net, Data.of(), TORCH))
            assert set(alone) == weights(whole)
            for name, (fmt,) in alone.items():
                assert encode(fmt) == encode(whole[name][0])


class TestRefusals:
    def test_layers_without_a_kernel_are_counted_and_named(self) -> None:
        """ONNX Runtime has 4-bit kernels for matrices alone."""
        asked = {"weights": "int4", "activations": "none", "granularity": "per_group"}
        (note,) = notes(folded("residual"), data("residual"), **asked)
        assert note.startswith("warning: 6 layers stay float, since onnxruntime has no kernel of conv2d")
        assert "weights int4 per group with activations none" in note
        assert "stem.0, layer1.conv1, layer1.conv2, layer2.conv1, ..." in note

    @pytest.mark.parametrize("asked", [{"weights": "int3"}, {"weights": "ternary"}, {"activations": "int4"}])
    def test_nothing_at_all_says_what_there_is(self, asked: dict[str, str]) -> None:
        with pytest.raises(RecipeError, match="no layer that onnxruntime takes as asked") as told:
            quantize(folded("residual"), data("residual"), **asked)
        assert told.value.fix is not None
        assert "int8 per_channel" in told.value.fix
        assert "int4 per_group" in told.value.fix
        assert "int3" not in told.value.fix

    def test_an_infinite_range_is_named(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(self.a(x))

        x = torch.tensor([[3e38, -3e38]] * 20)
        net = model_of(Net(), x[:2])
        with torch.no_grad():
            net.parameters["a.weight"].copy_(torch.eye(2))
        with pytest.raises(DataError, match="the range of 'input:x' is infinite in float32") as told:
            quantize(net, Data.of(x_train=x.numpy()))
        assert told.value.fix is not None


class TestCalibration:
    @pytest.mark.parametrize("range", ["moving_average", "kl", "l1"])
    def test_every_rule_makes_ranges_inside_what_was_seen(self, range: str) -> None:
        examples = data("residual").evolve(batch_size=5)
        formats = quantize(folded("residual"), examples, range=range)
        whole = quantize(folded("residual"), examples, range="minmax")
        for name in values(formats):
            low, high = ends(formats[name])
            assert min(ends(whole[name])[0], 0) <= low <= high <= max(ends(whole[name])[1], 0)
        assert any(ends(formats[name]) != ends(whole[name]) for name in values(formats))

    def test_what_is_odd_is_told_once(self) -> None:
        net = folded("linear3d")
        zeros = np.zeros((20, *net.entries["forward"].example_inputs[0].shape[1:]), np.float32)
        found = notes(net, Data.of(x_train=zeros), fallback=1)
        assert len([note for note in found if "'input:x' is 0 in all 20 calibration examples" in note]) == 1
        assert all(note.startswith("warning: ") for note in found)
        few = notes(net, Data.of(x_train=zeros[:4] + np.arange(4, dtype=np.float32)[:, None, None]))
        assert any("4 calibration examples" in note for note in few)

    def test_ordinary_data_is_no_news(self) -> None:
        assert notes(folded("residual"), data("residual")) == []
