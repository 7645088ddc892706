"""A whole fit on a machine that is reached by ssh; its connection is cut, once and for good."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featherweight as fw
from board import Board, Proxy
from featherweight.engine.evaluate import Scales
from featherweight.engine.timing import Limits
from featherweight.errors import DeviceError
from featherweight.runtime import host_isa

QUICK = Limits(seconds=0.3, least_seconds=0.0, rounds=6, warmup_s=0.01, throughput_s=0.02, memory_repeats=1)
NET = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)
    ).eval()
"""
INT8 = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {}\n"
SEARCHED = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {activations: {choice: [int8, none]}}\n"


@pytest.fixture
def proxy(board: Board) -> Iterator[Proxy]:
    made = Proxy(board.port)
    yield made
    made.close()


@pytest.fixture
def fit(board: Board, proxy: Proxy, tmp_path: Path) -> Any:
    """Fits a small network on the board, through the proxy."""
    (tmp_path / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((24, 3, 8, 8)).astype(np.float32), np.arange(24) % 4
    data = fw.Data.of(x[:16], labels[:16], x_train=x[16:], y_train=labels[16:])
    device = board.device.replace(f":{board.port}", f":{proxy.port}")

    def on_board(recipe: str, **more: Any) -> fw.Result:
        (tmp_path / "recipe.yaml").write_text(recipe)
        return fw.fit(
            f"{tmp_path / 'net.py'}:net",
            data,
            out=tmp_path / "out",
            recipe=str(tmp_path / "recipe.yaml"),
            device=device,
            limits=QUICK,
            tune=False,
            **more,
        )

    return on_board


def test_everything_is_measured_there(fit: Any, board: Board, proxy: Proxy) -> None:
    result = fit(INT8)
    chosen = result.trials[0].measurement
    assert chosen.latency_s.median > 0
    assert chosen.latency_ratio > 0
    assert chosen.memory_bytes > 0
    assert chosen.quality is not None
    assert result.environment.isa == host_isa()
    assert {"numpy", "onnxruntime", "torch", "featherweight"} == set(result.environment.versions)
    assert proxy.connections >= 6  # description, two of scores, latency, two of memory
    assert board.idle()
    assert {path.name for path in board.home.iterdir()} - {".cache"} == {
        path.name for path in Path("/etc/skel").iterdir()
    }


def test_a_connection_that_is_cut_in_the_middle_is_made_again(fit: Any, proxy: Proxy) -> None:
    cuts = []

    def cut() -> None:
        for wanted in (2, 5):
            while proxy.connections < wanted:
                time.sleep(0.01)
            time.sleep(0.25)
            proxy.cut()
            cuts.append(proxy.connections)

    threading.Thread(target=cut, daemon=True).start()
    result = fit(INT8)
    assert len(cuts) == 2
    assert [trial.state for trial in result.trials] == ["measured"]
    assert result.trials[0].measurement.latency_ratio > 0


def test_a_trial_whose_device_is_gone_fails_and_the_search_goes_on(
    fit: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh, weighed = Scales.weigh, []

    def interrupted(self: Scales, *arguments: Any, **more: Any) -> Any:
        weighed.append(1)
        proxy.switch(off=len(weighed) == 1)
        try:
            return weigh(self, *arguments, **more)
        finally:
            proxy.switch(off=False)

    monkeypatch.setattr(Scales, "weigh", interrupted)
    result = fit(SEARCHED, trials=2)
    assert [trial.state == "failed" for trial in result.trials] == [True, False]
    assert "was lost 3 times" in result.trials[0].reason
    assert result.trials[1].chosen


def test_a_device_that_is_gone_from_the_start_is_an_error(fit: Any, proxy: Proxy) -> None:
    proxy.switch(off=True)
    with pytest.raises(DeviceError, match="was lost 3 times") as told:
        fit(INT8)
    assert told.value.exit_code == 1
    assert proxy.connections == 3
