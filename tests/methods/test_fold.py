"""Fold: the same outputs with fewer layers, and never where it would change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.data import Data
from featherweight.graph import trace
from featherweight.methods.fold import Fold
from featherweight.model import Entry, Model, Remove, SetAttr
from featherweight.recipe import Where
from golden import context, data, folded, inputs, model, model_of
from nets import NETS

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold(net: Model, where: dict[str, list[str]] | None = None) -> Model:
    method = Fold(where=Where.model_validate(where or {}))
    return method.apply(net, context(net, Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())))


def norms(module: nn.Module) -> list[str]:
    return [path for path, layer in module.named_modules() if isinstance(layer, NORMS)]


def settled(module: nn.Module) -> nn.Module:
    """With statistics as training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, NORMS):
            for tensor, low, high in (
                (layer.running_mean, -1, 1), (layer.running_var, 0.3, 3),
                (layer.weight, -2, 2), (layer.bias, -1, 1),
            ):  # fmt: skip
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return module.eval()


def same(before: Model, after: Model, *examples: Tensor) -> None:
    with torch.no_grad():
        one, two = before.module(*examples), after.module(*examples)
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-5), (one - two).abs().max()


class TestGoldenNets:
    LEFT: ClassVar = {
        "concat": ["norms.0", "norms.1", "norms.2", "transition.0"]
    }  # before the convolution, not after

    @pytest.mark.parametrize("name", NETS)
    def test_give_the_same_outputs_without_batch_norm(self, name: str) -> None:
        same(model(name), folded(name), torch.from_numpy(inputs(name, 5)))
        assert norms(folded(name).module) == self.LEFT.get(name, [])
        assert not [layer for layer in folded(name).module.modules() if isinstance(layer, nn.Dropout)]

    @pytest.mark.parametrize("name", NETS)
    def test_are_rebuilt_from_the_original_exactly(self, name: str) -> None:
        after = folded(name)
        rebuilt = model(name).rebuild(after.edits, after.module.state_dict())
        x = torch.from_numpy(inputs(name, 3))
        with torch.no_grad():
            assert torch.equal(rebuilt(x), after.module(x))
        assert str(rebuilt) == str(after.module)
        assert [n for n, _ in rebuilt.named_parameters()] == [n for n, _ in after.module.named_parameters()]

    def test_say_what_was_done(self) -> None:
        edits = folded("residual").edits
        assert edits[:2] == (SetAttr("stem.0", "bias", shape=(8,)), Remove("stem.1"))
        assert Remove("dropout") in folded("depthwise").edits
        assert folded("lstm").edits == ()

    def test_fold_once_and_for_all(self) -> None:
        again = Fold().apply(folded("residual"), context(folded("residual"), data("residual")))
        assert again.edits == folded("residual").edits
        assert trace(folded("residual")).nodes[1].op == "relu"


FOLDABLE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), X),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), X),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), X.flatten(2)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)), X.reshape(2, 4, 4, 4, 4)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)), X),
    "transposed in groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        X,
    ),
    "transposed depthwise": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 12, 2, 2, groups=4, bias=False), nn.BatchNorm2d(12)),
        X,
    ),
    "transposed 1d": (
        lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)),
        X.flatten(2),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), X[0, 0]),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6)), X[0, 0]),
    "without gain": (lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), X),
    "two in a row": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.BatchNorm2d(6)),
        X,
    ),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_folds(name: str) -> None:
    build, x = FOLDABLE[name]
    before = model_of(settled(build()), x)
    after = fold(before)
    same(before, after, x)
    assert len(norms(after.module)) < len(norms(before.module))
    if name != "two in a row":
        assert norms(after.module) == []


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)


class SharedConv(_Net):
    """The convolution is called again behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(self.conv(x))))


class SharedNorm(_Net):
    """One norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.other(F.relu(self.bn(self.conv(x)))))


class AnotherReader(_Net):
    """Somebody else reads the convolution before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class ReturnedBefore(_Net):
    """The convolution's own output is returned."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.bn(y)
        return y


class PreActivation(_Net):
    """The norm comes first."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class BehindRelu(_Net):
    """Something stands between."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.relu(self.conv(x)))


class WeightReadElsewhere(_Net):
    """The convolution's weight is used by a function as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class NormReadElsewhere(_Net):
    """The norm's gain is used by a function as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.weight.reshape(1, -1, 1, 1)


class TiedWeight(_Net):
    """Two layers own the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.relu(self.bn(self.conv(x))))


class Parametrized(_Net):
    """The weight is computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2 + 1


class UsersOwnConv(_Net):
    """A subclass of Conv2d does more than a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Scaled(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class NoStatistics(_Net):
    """The norm uses those of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class LinearAlongLength(nn.Module):
    """On three axes a batch norm's channels are the positions, not the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x.flatten(0, 1)))


KEPT = [
    SharedConv, SharedNorm, AnotherReader, ReturnedBefore, PreActivation, BehindRelu, WeightReadElsewhere,
    NormReadElsewhere, TiedWeight, Parametrized, UsersOwnConv, NoStatistics, LinearAlongLength,
]  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_does_not_fold(kind: type[nn.Module]) -> None:
    """One line of why is the docstring of each module."""
    before = model_of(settled(kind()), X)
    after = fold(before)
    same(before, after, X)
    assert norms(after.module) == ["bn"]
    assert after.edits == ()


def test_one_entry_that_needs_the_norm_keeps_it() -> None:
    class Net(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

        def raw(self, x: Tensor) -> Tensor:
            return self.conv(x)

    module = settled(Net())
    entries = {name: Entry((X,), ("x",), ("y",), {"x": {0: "n"}}, name) for name in ("forward", "raw")}
    after = fold(Model(module, entries))
    assert after.edits == ()
    same(Model(module, entries), after, X)


def test_a_dropout_that_only_holds_a_rate_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Dropout(0.3)
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), self.rate.p, self.training)

    net = model_of(Net(), X)
    same(net, fold(net), X)


class TestWhere:
    def test_leaves_what_is_excluded(self) -> None:
        net = model("residual")
        after = fold(net, {"exclude": ["layer1"]})
        assert norms(after.module) == ["layer1.bn1", "layer1.bn2"]
        same(net, after, torch.from_numpy(inputs("residual", 2)))

    def test_takes_what_is_included(self) -> None:
        after = fold(model("residual"), {"include": ["layer2.conv1", "layer2.bn1", "layer2.bn2"]})
        assert set(norms(model("residual").module)) - set(norms(after.module)) == {"layer2.bn1"}

    def test_a_layer_that_is_excluded_is_not_folded_into(self) -> None:
        after = fold(model("residual"), {"exclude": ["layer2.conv1"]})
        assert norms(after.module) == ["layer2.bn1"]

    def test_by_type(self) -> None:
        after = fold(model("depthwise"), {"include": ["Dropout"]})
        assert after.edits == (Remove("dropout"),)


def test_the_input_is_untouched() -> None:
    net = model_of(settled(FOLDABLE["conv"][0]()), X)
    before = {name: tensor.clone() for name, tensor in net.module.state_dict().items()}
    fold(net)
    after = net.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_training_mode_makes_no_difference() -> None:
    """A module in training mode is folded with its running statistics, and stays in training mode."""
    net = model_of(settled(FOLDABLE["conv"][0]()), X)
    net.module.train()
    after = fold(net)
    assert net.module.training
    assert after.module.training
    with torch.no_grad():
        wanted = net.module.eval()(X)
        assert torch.allclose(after.module.eval()(X), wanted, atol=1e-5)
