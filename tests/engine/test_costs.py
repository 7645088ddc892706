"""Prices of layers: from the profiles of a float and an int8 network, measured once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featherweight.engine import costs
from featherweight.engine.costs import MeasuredCosts, layer_seconds, profiled
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from golden import data, folded, model, target

NET = "residual"


def run(folder: Path, runtime: str = "onnxruntime") -> Run:
    return Run(model(NET), data(NET), target(runtime), Store(folder))


def weighted() -> set[str]:
    return {
        name
        for name, layer in folded(NET).module.named_modules()
        if type(layer).__name__ in ("Conv2d", "Linear")
    }


def test_every_layer_with_weights_has_a_price_in_both_forms(tmp_path: Path) -> None:
    prices = MeasuredCosts(run(tmp_path))
    for integers in (False, True):
        seen = [prices.seconds(layer, integers) for layer in weighted()]
        total = prices.total(integers)
        assert total is not None
        assert total > 0
        assert sum(one or 0.0 for one in seen) <= total * 1.001
        assert sum(one is not None and one > 0 for one in seen) == len(seen)
    borders = [prices.conversion(layer) for layer in weighted()]
    assert all(one is not None and one >= 0 for one in borders)
    assert prices.seconds("no.such.layer", True) is None
    assert prices.conversion("no.such.layer") is None


def test_they_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(tmp_path)
    first = MeasuredCosts(made).total(integers=True)
    monkeypatch.setattr(costs, "profiled", lambda *_: pytest.fail("measured again"))
    assert MeasuredCosts(made).total(integers=True) == first
    lines = [json.loads(line)["kind"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert lines.count("costs") == 1


def test_a_runtime_that_tells_no_times_has_none(tmp_path: Path) -> None:
    prices = MeasuredCosts(run(tmp_path, "torch"))
    assert prices.seconds(min(weighted()), True) is None
    assert prices.total(integers=False) is None
    assert prices.conversion(min(weighted())) is None
    assert not (tmp_path / "journal.jsonl").exists()


def test_times_of_kernels_are_shared_among_the_layers_that_they_stand_for(tmp_path: Path) -> None:
    made = run(tmp_path / "store")
    net = folded(NET)
    artifact = made.lower(net.evolve(key="folded"))
    place = tmp_path / "place"
    place.mkdir()
    seen = profiled(artifact, net, "forward", made.target, place)
    layers = layer_seconds(seen)
    assert weighted() <= set(layers) <= weighted() | {"pool"}  # and what has kernels of its own
    alone = {
        name: sum(share.values()) * seen.kernels.get(name, 0.0) for name, share in seen.found.shares.items()
    }
    assert sum(layers.values()) == pytest.approx(sum(alone.values()), rel=0.5)
    assert sum(layers.values()) <= seen.kernel_s * 1.001


def test_what_the_mixed_network_takes_beyond_its_layers_is_the_borders() -> None:
    table = {
        "float": {"layers": {"a": 5.0, "b": 3.0}, "total": 8.0},
        "int8": {"layers": {"a": 2.0, "b": 1.0}, "total": 4.0},
        "mixed": {"layers": {"a": 5.0, "b": 1.0}, "total": 9.0},
    }
    assert costs._excess(table, ["a"]) == pytest.approx(2.0)  # 9, less 4 + (5 - 2)
    table["mixed"]["total"] = 6.0
    assert costs._excess(table, ["a"]) == 0
