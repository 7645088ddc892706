"""Nodes without a layer: run by ONNX Runtime, passed by by methods, written back as they were."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnx import helper

import featherweight
import golden
from featherweight.data import Data
from featherweight.errors import LoadError, TargetError
from featherweight.exchange import opaque
from featherweight.exchange.export import to_onnx
from featherweight.exchange.onnx_in import import_onnx_bytes
from featherweight.exchange.opaque import opaque_layers
from featherweight.methods.fold import Fold
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.plugins import find_runtime

onnxruntime = pytest.importorskip("onnxruntime")

_WEIGHT = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
_DOUBLING = """
  times = Constant <value = int64 {3}> ()
  go = Constant <value = bool {1}> ()
  y = Loop (times, go, h) <body = step (int64 i, bool on, float[N, 6] v) => (bool still, float[N, 6] w) {
    still = Identity (on)
    w = Add (v, x)
  }>
"""
_BRANCHES = """
  total = ReduceSum <keepdims = 0> (h)
  zero = Constant <value = float {0}> ()
  positive = Greater (total, zero)
  y = If (positive) <
    then_branch = yes () => (float[N, 6] a) { a = Mul (h, x) },
    else_branch = no () => (float[N, 6] b) { b = Sub (h, x) }>
"""
_SCAN = """
  s0 = ReduceMean <axes = [0], keepdims = 0> (h)
  last, y = Scan <num_scan_inputs = 1, body = step (float[6] s, float[6] v) => (float[6] t, float[6] u) {
    t = Add (s, v)
    u = Identity (t)
  }> (s0, h)
"""
_SEQUENCE = """
  parts = SplitToSequence <axis = 1> (h)
  y = ConcatFromSequence <axis = 1> (parts)
"""


def _content(body: str, opset: int = 17, extra: str = "", dims: str = "N, 6") -> bytes:
    """x [N, 6] -> MatMul -> h -> body -> y -> MatMul -> out."""
    text = f"""
<ir_version: 8, opset_import: ["" : {opset}{extra}]>
main (float[{dims}] x) => (float[M, 6] out)
<float[6, 6] w0, float[6, 6] w1> {{
  h = MatMul (x, w0)
  {body}
  out = MatMul (y, w1)
}}
"""
    model = onnx.parser.parse_model(text)
    for name, scale in (("w0", 1.0), ("w1", 0.5)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(_WEIGHT * np.float32(scale), name))
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name="out"))
    return model.SerializeToString()


def _run(content: bytes, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def _exported(model: Model) -> onnx.ModelProto:
    return ir.to_proto(to_onnx(model).model)


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


_FOREIGN = '  c = com.microsoft.CDist <metric = "sqeuclidean"> (h, h)\n  y = MatMul (c, h)'
BODIES = {"Loop": _DOUBLING, "If": _BRANCHES, "Scan": _SCAN, "SplitToSequence": _SEQUENCE, "CDist": _FOREIGN}


@pytest.mark.parametrize("operator", BODIES)
def test_what_has_no_layer_comes_back_as_it_was(operator: str) -> None:
    extra = ', "com.microsoft" : 1' if operator == "CDist" else ""
    content = _content(BODIES[operator], extra=extra)
    model = import_onnx_bytes(content, source="m")
    layers = opaque_layers(model.module)
    assert len(layers) == 1
    assert not list(next(iter(layers.values())).parameters())
    assert any("run by ONNX Runtime as it is" in note for note in model.origin.notes)

    proto = _exported(model)
    written = next(node for node in proto.graph.node if node.op_type == operator)
    read = next(node for node in onnx.load_from_string(content).graph.node if node.op_type == operator)
    assert (written.domain, len(written.input)) == (read.domain, len(read.input))
    for own, other in zip(written.attribute, read.attribute, strict=True):
        assert [n.op_type for n in own.g.node] == [n.op_type for n in other.g.node]
        assert own.type == other.type
    for rows in (2, 5):
        x = _random(rows, 6)
        expected = _run(content, x)
        with torch.no_grad():
            ours = model.module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
        again = _run(proto.SerializeToString(), x)
        np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-4)


def test_neighbours_become_one_layer_with_one_session() -> None:
    model = import_onnx_bytes(_content(_SEQUENCE), source="m")
    (layer,) = opaque_layers(model.module).values()
    assert layer.operators == ("SplitToSequence", "ConcatFromSequence")
    assert layer.program.nodes == 2


def test_copies_share_the_program_and_survive_the_original() -> None:
    model = import_onnx_bytes(_content(_DOUBLING), source="m")
    x = torch.from_numpy(_random(3, 6))
    with torch.no_grad():
        expected = model.module(x)
    copied = copy.deepcopy(model.module)
    del model
    with torch.no_grad():
        torch.testing.assert_close(copied(x), expected)


def test_methods_pass_an_opaque_layer_by() -> None:
    model = import_onnx_bytes(_content(_DOUBLING), source="m")
    data = Data.of(_random(16, 6), np.arange(16) % 6, x_train=_random(32, 6), y_train=np.arange(32) % 6)
    done = model
    for method in (Fold(), Quantize()):
        done = method.apply(done, golden.context(done, data))
    path = next(iter(opaque_layers(done.module)))
    assert done.formats
    assert not any(name.startswith(f"{path}.") for name in done.formats)


def test_a_quantized_model_with_an_opaque_layer_runs(tmp_path: Path) -> None:
    content = _content(_DOUBLING)
    model = import_onnx_bytes(content, source="m")
    data = Data.of(_random(16, 6), np.arange(16) % 6, x_train=_random(32, 6), y_train=np.arange(32) % 6)
    model = Quantize().apply(model, golden.context(model, data))
    target = golden.target()
    runtime = find_runtime("onnxruntime")
    artifact = runtime.lower(model, target, tmp_path)
    x = _random(16, 6)
    found = runtime.open(artifact, target)(x)[0]
    assert golden.decibels(_run(content, x), found) > 20


def test_inspect_tells_the_share_of_the_latency_that_is_opaque(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(_content(_DOUBLING))
    told = featherweight.inspect(str(tmp_path / "m.onnx"))
    assert 0 < told["entries"]["forward"]["opaque_share"] < 1


def test_only_onnx_runtime_takes_it(tmp_path: Path) -> None:
    model = import_onnx_bytes(_content(_DOUBLING), source="m")
    with pytest.raises(TargetError, match="only ONNX Runtime"):
        find_runtime("torch").lower(model, golden.target("torch"), tmp_path)


def test_no_gradient_passes_but_layers_behind_learn() -> None:
    model = import_onnx_bytes(_content(_DOUBLING), source="m")
    model.module(torch.from_numpy(_random(3, 6))).square().sum().backward()
    learned = {name for name, p in model.module.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(learned) == 1


def test_a_size_that_depends_on_data_stays_open() -> None:
    body = "  k = NonZero (h)\n  i = Gather <axis = 0> (k, one)\n  y = Gather <axis = 0> (x, i)"
    text = _content(body.replace("(k, one)", "(k, zero)"), extra="")
    model = onnx.load_from_string(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "zero"))
    content = model.SerializeToString()
    loaded = import_onnx_bytes(content, source="m")
    x = np.abs(_random(4, 6))
    with torch.no_grad():
        np.testing.assert_allclose(
            loaded.module(torch.from_numpy(x)).numpy(), _run(content, x), rtol=1e-4, atol=1e-4
        )


def test_an_operator_that_only_an_older_opset_has_is_converted() -> None:
    """Scan of opset 8 had other inputs; what is the same in both is left alone."""
    content = _content(_DOUBLING, opset=11)
    proto = _exported(import_onnx_bytes(content, source="m"))
    assert {item.domain: item.version for item in proto.opset_import}[""] >= 20
    x = _random(4, 6)
    np.testing.assert_allclose(_run(proto.SerializeToString(), x), _run(content, x), rtol=1e-4, atol=1e-4)


def test_an_endless_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    body = _DOUBLING.replace("int64 {3}", "int64 {9223372036854775807}")
    monkeypatch.setattr(opaque, "SECONDS", 0.5)
    with pytest.raises(LoadError, match="did not end"):
        import_onnx_bytes(_content(body), source="m")


# --- branches ------------------------------------------------------------------------------------------


def _switched() -> bytes:
    model = onnx.parser.parse_model(
        """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N, 6] x, int64 rate) => (float[N, 6] out)
{
  known = Constant <value = int64 {16000}> ()
  same = Equal (rate, known)
  out = If (same) <
    then_branch = yes () => (float[N, 6] a) { t = Exp (x)  a = Neg (t) },
    else_branch = no () => (float[N, 6] b) { t = Relu (x)  b = Neg (t) }>
}
"""
    )
    return model.SerializeToString()


def test_a_branch_that_an_input_decides_is_taken_with_a_note() -> None:
    content = _switched()
    model = import_onnx_bytes(content, source="m")
    entry = model.entries["forward"]
    assert not opaque_layers(model.module)
    assert entry.example_inputs[1].item() == 16000  # the number that the graph compares it with
    assert any("'rate'" in note and "16000" in note for note in model.origin.notes)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model.module(x, torch.tensor(1)), -torch.exp(x))

    other = import_onnx_bytes(content, source="m", examples=(torch.randn(2, 6), torch.tensor([8000, 8000])))
    torch.testing.assert_close(other.module(x, torch.tensor(1)), -torch.relu(x))


def test_a_branch_that_a_constant_decides_needs_no_note() -> None:
    model = onnx.load_from_string(_switched())
    del model.graph.input[1]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(16000), "rate"))
    loaded = import_onnx_bytes(model.SerializeToString(), source="m")
    assert loaded.origin.notes == ()
    x = torch.randn(3, 6)
    torch.testing.assert_close(loaded.module(x), -torch.exp(x))


def test_opset_names_and_metadata_survive() -> None:
    for opset in (9, 13, 21, 22, 23):
        node = helper.make_node("Relu", ["x"], ["y:0"])
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 6])],
            [helper.make_tensor_value_info("y:0", onnx.TensorProto.FLOAT, ["N", 6])],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        helper.set_model_props(proto, {"labels": "cat,dog", "stride": "32"})
        written = _exported(import_onnx_bytes(proto.SerializeToString(), source="m"))
        assert {item.key: item.value for item in written.metadata_props} == {
            "labels": "cat,dog",
            "stride": "32",
        }
        assert next(item.version for item in written.opset_import if not item.domain) >= opset
        assert [value.name for value in written.graph.input] == ["x"]
        assert [value.name for value in written.graph.output] == ["y:0"]
        onnx.checker.check_model(written)
