"""Where the cost is: the shipped ResNet-20, and small nets of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight import api
from featherweight.cli import main
from featherweight.data import Data
from featherweight.engine.costs import example_call
from featherweight.engine.inspect import inspect_model, refused
from featherweight.errors import LoadError
from featherweight.method import Silent
from featherweight.model import Entry, Model
from golden import model

_EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist"
_RESNET = (f"{_EXAMPLE / 'nets.py'}:resnet20", str(_EXAMPLE / "resnet20.safetensors"))


def _inspect(net: Model, static: bool = False) -> dict[str, object]:
    return inspect_model(net, None, examples=1, threads=1, static=static, seed=0, progress=Silent())


@pytest.fixture(scope="module")
def resnet() -> dict[str, object]:
    spec, weights = _RESNET
    return api.inspect(spec, weights=weights, inputs=["1x28x28"])


class TestResNet:
    def test_latency_goes_to_the_convolutions(self, resnet: dict[str, object]) -> None:
        rows = {row["name"]: row for row in resnet["layers"]}
        shares = {name: row["latency_share"] for name, row in rows.items()}
        assert sum(shares.values()) == pytest.approx(1)
        convolutions = [share for name, share in shares.items() if rows[name]["type"] == "Conv2d"]
        assert len(convolutions) == 21 and all(convolutions)
        assert sum(convolutions) > 0.8
        assert rows["bn1"]["fused_into"] == ["conv1"] and rows["bn1"]["latency_s"] == 0
        assert shares["other"] < 0.1

    def test_totals(self, resnet: dict[str, object]) -> None:
        seen = resnet["entries"]["forward"]
        assert resnet["params"] == 272_186 and seen["macs"] == 31_021_952
        assert seen["peak_activation_bytes"] == 3 * 16 * 28 * 28 * 4  # a block's input, and two maps of it
        assert 0 < seen["latency_s"] < 1 and 0 < seen["kernel_s"] < 1
        assert sum(row["params"] for row in resnet["layers"]) == 272_186

    def test_in_execution_order(self, resnet: dict[str, object]) -> None:
        names = [row["name"] for row in resnet["layers"]]
        assert names[:3] == ["conv1", "bn1", "relu"] and names[-3:] == ["/flatten", "fc", "other"]

    def test_what_runtimes_refuse(self, resnet: dict[str, object]) -> None:
        refusals = resnet["refused"]["onnxruntime"]
        assert refusals["float"] == {}
        assert set(refusals["int4_weights"]) == {"conv2d"}
        assert resnet["refused"]["torch"]["int8"] == {}


def test_sensitivity_is_simulated_and_4_bits_hurt_more(capsys: pytest.CaptureFixture[str]) -> None:
    spec, weights = _RESNET
    command = f"inspect {spec} --weights {weights} --data {_EXAMPLE / 'data.npz'} --examples 16 --static"
    assert main([*command.split(), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sensitivity"]["simulated"] is True and told["sensitivity"]["metric"] == "accuracy"
    seen = [row["sensitivity"] for row in told["layers"] if "sensitivity" in row]
    assert len(seen) == 22
    assert all(row["int8"]["sqnr_db"] > row["int4"]["sqnr_db"] + 10 for row in seen)
    assert "latency is not measured: --static" in told["notes"]


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    layers = "nn.Linear(6, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 3, 1), nn.Flatten()"
    Path("net.py").write_text(f"from torch import nn\ndef net():\n    return nn.Sequential({layers})\n")
    random = np.random.default_rng(0)
    np.savez("data.npz", x=random.standard_normal((40, 6), dtype=np.float32))
    assert main(["inspect", "net.py:net", "--data", "data.npz", "--metric", "agreement", "--quiet"]) == 0
    said = capsys.readouterr().out
    head = " ".join(said.split("\n0 ")[0].split())
    assert "(measured)" in head and head.count("(simulated)") == 2
    assert "onnxruntime does not store in 4 bits the weights of: conv1d (2)" in said
    assert "simulated on 40 examples: the drop of agreement (1.0000 in float)" in said


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        y: Tensor = self.decoder(z)
        return y


def test_several_entries() -> None:
    entries = {
        "encode": Entry((torch.randn(2, 6),), ("x",), ("z",), {"x": {0: "n"}}, "encode"),
        "decode": Entry((torch.randn(2, 4),), ("z",), ("y",), {"z": {0: "n"}}, "decode"),
    }
    told = _inspect(Model(_Pair().eval(), entries))
    assert set(told["entries"]) == {"encode", "decode"}
    by_entry = {name: [r["name"] for r in told["layers"] if r["entry"] == name] for name in entries}
    assert by_entry["encode"][0] == "encoder" and by_entry["decode"][0] == "decoder"
    for name in entries:
        shares = [row["latency_share"] for row in told["layers"] if row["entry"] == name]
        assert sum(shares) == pytest.approx(1)


def test_states_with_the_batch_elsewhere() -> None:
    entry = Entry(
        (torch.randn(2, 5, 3), torch.randn(4, 2, 6)), ("x", "state"), ("y",),
        {"x": {0: "n", 1: "length"}, "state": {1: "n"}},
    )  # fmt: skip
    assert [value.shape for value in example_call(entry)] == [(1, 5, 3), (4, 1, 6)]


@pytest.mark.parametrize("net", ["attention", "lstm"])
def test_every_product_is_timed(net: str) -> None:
    told = _inspect(model(net))
    working = [row for row in told["layers"] if row["macs"]]
    assert working and all(row["latency_s"] > 0 for row in working)
    assert sum(row["latency_share"] for row in told["layers"]) == pytest.approx(1)


def test_without_onnxruntime_the_rest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from featherweight.runtimes.onnxruntime import OnnxRuntime

    monkeypatch.setattr(OnnxRuntime, "installed", classmethod(lambda cls: False))
    told = _inspect(model("linear3d"))
    assert "latency_s" not in told["entries"]["forward"]
    assert told["notes"] == [
        "latency is not measured: runtime 'onnxruntime' is not installed: there is no package "
        "'onnxruntime'; pip install \"featherweight[onnxruntime]\""
    ]
    assert refused(model("linear3d"))["onnxruntime"]["installed"] is False


def test_images_settings_need_a_folder() -> None:
    with pytest.raises(Exception, match="are for a folder of images"):
        api.inspect("nothing.py:net", inputs=["4"], mean="0.5")


def test_data_for_a_model_of_several_entries_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featherweight.engine import sources

    entries = {"encode": Entry((torch.randn(2, 6),), ("x",), ("z",), {"x": {0: "n"}}, "encode")}
    monkeypatch.setattr(sources, "load_model", lambda *_, **__: Model(_Pair().eval(), entries))
    data = Data.of(np.zeros((4, 6), np.float32))
    with pytest.raises(LoadError, match=r"called in several ways \(encode\), and data is for one"):
        sources.load_sources("pair.py:net", data=data)
    assert sources.load_sources("pair.py:net").data.scored is None
    with pytest.raises(LoadError, match="and fit scores one"):
        api.fit("pair.py:net", out=tmp_path / "out")
