"""Every family of networks is pruned, quantized, and lowered to every runtime that is there."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.methods.fold import Fold
from featherweight.methods.prune import Prune
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.nets import FAMILIES, build
from featherweight.plugins import find_runtime, runtime_names
from featherweight.runtime import Runtime, Session
from featherweight.tools.costs import totals
from featherweight.tools.simulate import simulate
from golden import context, decibels, model_of, target, typical_decibels

# Small ones: at most 60,000 parameters, on pictures of 16 pixels or signals of 96 steps.
SPECS = {
    "mobilenetv1": "width=0.1,depth=0.1",
    "mobilenetv2": "width=0.1,depth=0.1",
    "mobilenetv3-small": "width=0.1,depth=0.1",
    "mobilenetv3-large": "width=0.1,depth=0.1",
    "shufflenetv1": "width=0.125,depth=0.25",
    "shufflenetv2": "width=0.125,depth=0.25",
    "efficientnet-lite0": "width=0.1,depth=0.1",
    "ds-cnn": "width=0.25,depth=0.25",
    "ds-cnn-1d": "width=0.25,depth=0.25",
    "vit": "width=0.125,depth=0.1,heads=2,patch=4",
}
# The fast tests take the families that have an operator of their own, and integers alone where it takes long.
OWN = {"mobilenetv3-small", "shufflenetv1", "shufflenetv2", "ds-cnn", "ds-cnn-1d", "vit"}
LONG = {"coreml", "executorch", "litert", "onnxruntime-web"}


def pairs(quick: set[str]) -> list[Any]:
    """Every runtime and every family; all but the own families of quick runtimes among the slow tests."""
    return [
        pytest.param(name, family, marks=[] if name in quick and family in OWN else [pytest.mark.slow])
        for name in runtime_names()
        for family in SPECS
    ]


def shape(family: str) -> tuple[int, ...]:
    return (3, 96) if FAMILIES[family].inputs == "signal" else (3, 16, 16)


@cache
def inputs(family: str, count: int = 32) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, *shape(family))).astype(np.float32)


@cache
def examples(family: str) -> Data:
    """As many that layers solved anew do not learn them by heart."""
    labels = np.arange(256) % 10
    return Data.of(inputs(family), labels[:32], x_train=inputs(family, 256), y_train=labels)


@cache
def net(family: str) -> Model:
    """A small one whose batch norms have seen examples, as training leaves them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size = shape(family)
        resolution = size[1] if len(size) == 2 else size[1:]
        module = build(f"{family}:{SPECS[family]}", channels=3, classes=10, resolution=resolution)
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0.0, 0.2)
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.momentum = None  # the mean of what it sees
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        for name, tensor in module.named_parameters(recurse=False):  # a transformer's token and positions
            assert name in ("token", "position")
            nn.init.normal_(tensor)
        with torch.no_grad():
            module.train()(torch.randn(64, *size))
        return model_of(module, torch.randn(2, *size))


@cache
def pruned(family: str) -> Model:
    """With half of its multiply-accumulates, and without batch norms."""
    done = Prune(macs=0.5, round_to=1).apply(net(family), context(net(family), examples(family)))
    return Fold().apply(done, context(done, examples(family)))


@cache
def quantized(family: str, name: str) -> Model:
    around = context(pruned(family), examples(family), target(name))
    return Quantize().apply(pruned(family), around)


def answers(model: Model, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        (y,) = simulate(model)(torch.from_numpy(x))
    return np.asarray(y)


def opened(runtime: Runtime, model: Model, folder: Path) -> Session | None:
    """A session on the artifact; None where the runtime says that it only writes."""
    artifact = runtime.lower(model, target(runtime.name), folder)
    assert artifact.bytes > 0
    if runtime.unmeasured:
        with pytest.raises(TargetError, match="not measured"):
            runtime.open(artifact, target(runtime.name))
        return None
    return runtime.open(artifact, target(runtime.name))


@pytest.fixture
def runtime(request: pytest.FixtureRequest) -> Runtime:
    found = find_runtime(str(request.param))
    if not found.installed():
        pytest.skip(f"runtime '{found.name}' is not installed")
    return found


def test_every_builder_is_here() -> None:
    assert set(SPECS) == set(FAMILIES) - {f"efficientnet-lite{variant}" for variant in range(1, 5)}


@pytest.mark.parametrize("family", SPECS)
class TestMethods:
    def test_pruning_halves_the_multiply_accumulates(self, family: str) -> None:
        before, after = totals(net(family)), totals(pruned(family))
        assert before["params"] <= 60_000
        assert after["macs"] <= 0.51 * before["macs"]
        assert after["params"] < 0.8 * before["params"]
        y = answers(pruned(family), inputs(family))
        assert y.shape == (32, 10)
        assert np.isfinite(y).all()

    def test_every_layer_with_a_weight_becomes_integers(self, family: str) -> None:
        done = quantized(family, "onnxruntime")
        layers = [
            name
            for name, layer in done.module.named_modules()
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear)
        ]
        assert {f"{name}.weight" for name in layers} <= set(done.formats)
        noise = decibels(answers(pruned(family), inputs(family)), answers(done, inputs(family)))
        assert 12 <= noise < 60


class TestRuntimes:
    @pytest.mark.parametrize(("runtime", "family"), pairs(set(runtime_names()) - LONG), indirect=["runtime"])
    def test_float_is_the_module(self, runtime: Runtime, family: str, tmp_path: Path) -> None:
        session = opened(runtime, net(family), tmp_path)
        if session is None:
            return
        for batch in (1, 5):
            x = inputs(family)[:batch]
            (seen,) = session(x)
            np.testing.assert_allclose(seen, answers(net(family), x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("runtime", "family"), pairs(set(runtime_names())), indirect=["runtime"])
    def test_integers_of_the_pruned_one_do_what_the_formats_say(
        self, runtime: Runtime, family: str, tmp_path: Path
    ) -> None:
        done, x = quantized(family, runtime.name), inputs(family)
        session = opened(runtime, done, tmp_path)
        if session is None:
            return
        (seen,) = session(x)
        exact, wanted = answers(pruned(family), x), answers(done, x)
        # Values on an edge of integers fall to either side, and many layers follow; the noise stays as large.
        assert typical_decibels(wanted, seen) >= min(12, typical_decibels(exact, wanted) - 4)
        assert decibels(exact, seen) >= decibels(exact, wanted) - 3
