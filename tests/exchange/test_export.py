"""Export: PyTorch and ONNX Runtime agree on every golden net, and every kept name is found again."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Lowered
from featherweight.errors import TargetError
from featherweight.exchange.export import OPSET, OnnxExport, to_onnx
from featherweight.graph import Graph, trace
from featherweight.model import Entry, Model
from featherweight.plugins import find_runtime
from featherweight.tools.simulate import Replay
from golden import inputs, model, model_of, target
from nets import NETS


def run(exported: ir.Model, *arrays: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(exported).SerializeToString(), options)
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], arrays, strict=True)))


def operators(exported: ir.Model) -> list[str]:
    return [node.op_type for node in exported.graph]


def live(graph: Graph) -> list[str]:
    """Values that something depends on."""
    needed = set(graph.outputs)
    for node in reversed(graph.nodes):
        if needed & set(node.outputs):
            needed |= set(node.inputs)
    return [name for name in graph.values if name in needed]


def read(graph: Graph, net: Model) -> list[str]:
    """Parameters that some operator reads."""
    return [name for name in net.parameters if any(name in node.parameters.values() for node in graph)]


@cache
def marked(name: str) -> OnnxExport:
    """A golden net with every name kept that is alive."""
    graph = trace(model(name))
    return to_onnx(model(name), keep=[*live(graph), *read(graph, model(name))])


@pytest.mark.parametrize("name", NETS)
def test_float_is_the_module_at_any_batch(name: str, lowered: Lowered) -> None:
    artifact = lowered("onnxruntime", name, "float")
    exported = ir.load(artifact.folder / artifact.files[0])
    for batch in (1, 2, 5):
        x = inputs(name, batch)
        (seen,) = run(exported, x)
        with torch.no_grad():
            wanted = model(name).module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
class TestKept:
    def test_every_name_is_found(self, name: str) -> None:
        graph = trace(model(name))
        found = marked(name).values
        assert set(found) == {*live(graph), *read(graph, model(name))}
        for parameter in read(graph, model(name)):
            constant = found[parameter].const_value
            assert constant is not None
            assert np.array_equal(constant.numpy(), model(name).parameters[parameter].detach().numpy())

    def test_nothing_of_the_marks_is_left(self, name: str) -> None:
        exported = marked(name).model
        assert {node.domain for node in exported.graph} <= {"", "pkg.onnxscript.torch_lib"}
        assert "featherweight" not in exported.opset_imports
        inside = {id(value) for node in exported.graph for value in (*node.inputs, *node.outputs)}
        assert all(id(value) in inside for value in marked(name).values.values())

    def test_every_value_is_what_replay_sees(self, name: str) -> None:
        seen: dict[str, Tensor] = {}
        x = inputs(name, 3)
        with torch.no_grad():
            Replay(model(name))((torch.from_numpy(x),), seen.setdefault)
        extended, places = with_outputs(marked(name))
        outputs = run(extended, x)
        compared = 0
        for key, place in places.items():
            np.testing.assert_allclose(outputs[place], seen[key].numpy(), rtol=1e-4, atol=1e-5, err_msg=key)
            compared += 1
        assert compared >= len(live(trace(model(name)))) - 1  # an input cannot be an output as well


def with_outputs(export: OnnxExport) -> tuple[ir.Model, dict[str, int]]:
    """A copy of the graph that gives every kept value, and which output is which."""
    names = {key: value.name for key, value in export.values.items() if value.producer() is not None}
    copied = ir.from_proto(ir.to_proto(export.model))
    made = {value.name: value for node in copied.graph for value in node.outputs}
    for name in dict.fromkeys(names.values()):
        if made[name] not in copied.graph.outputs:
            made[name].type = ir.TensorType(ir.DataType.FLOAT)
            copied.graph.outputs.append(made[name])
    order = [value.name for value in copied.graph.outputs]
    return copied, {key: order.index(name) for key, name in names.items()}


class TestShape:
    def test_names_and_axes_are_the_entrys(self) -> None:
        class Net(nn.Module):
            def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
                y = F.relu(a) + b
                return y, a, y, y * 2

        x = torch.randn(2, 4, 6)
        axes = {"left": {0: "batch", 1: "length"}, "right": {0: "batch", 1: "length"}}
        entry = Entry((x, x + 1), ("left", "right"), ("sum", "same", "again", "relu"), axes)
        exported = to_onnx(Model(Net(), {"forward": entry})).model
        assert [value.name for value in exported.graph.inputs] == ["left", "right"]
        assert [value.name for value in exported.graph.outputs] == ["sum", "same", "again", "relu"]
        for value in (*exported.graph.inputs, *exported.graph.outputs):
            assert [str(size) for size in value.shape or ()] == ["batch", "length", "6"]
        a, b = (np.random.default_rng(i).standard_normal((3, 5, 6)).astype(np.float32) for i in (0, 1))
        y = np.maximum(a, 0) + b
        for seen, wanted in zip(run(exported, a, b), (y, a, y, y * 2), strict=True):
            np.testing.assert_allclose(seen, wanted, rtol=1e-6)

    def test_a_name_that_the_exporter_uses_itself(self) -> None:
        """Exporters call values after their operator, and so may the user call an output."""
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
        x = torch.randn(2, 3, 4, 4)
        for given, returned in (("relu", "conv2d"), ("conv2d_1", "relu"), ("0.weight", "2.bias")):
            entry = Entry((x,), (given,), (returned,), {given: {0: "batch"}})
            exported = to_onnx(Model(net, {"forward": entry})).model
            names = [v.name for node in exported.graph for v in node.outputs]
            names += [*exported.graph.initializers, *(v.name for v in exported.graph.inputs)]
            assert len(set(names)) == len(names)
            (seen,) = run(exported, x.numpy())
            np.testing.assert_allclose(seen, net(x).detach().numpy(), rtol=1e-4, atol=1e-6)
            assert (exported.graph.inputs[0].name, exported.graph.outputs[0].name) == (given, returned)

    def test_an_output_that_is_called_like_an_input(self) -> None:
        x = torch.randn(2, 4)
        entry = Entry((x,), ("hidden",), ("hidden",), {"hidden": {0: "batch"}})
        exported = to_onnx(Model(nn.ReLU(), {"forward": entry})).model
        assert exported.graph.inputs[0].name == "hidden"
        np.testing.assert_array_equal(run(exported, x.numpy())[0], x.relu().numpy())

    def test_a_constant_that_is_read_transposed_keeps_its_name(self) -> None:
        constants = {v.name: v for v in to_onnx(model("linear3d")).model.graph.initializers.values()}
        for name in ("fc1.weight", "fc2.weight", "head.weight"):
            stored = constants[name].const_value
            assert stored is not None
            weight = model("linear3d").parameters[name].detach().numpy()
            assert any(np.array_equal(stored.numpy(), turned) for turned in (weight, weight.T))

    def test_another_entry(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x)

            def scaled(self, x: Tensor, by: Tensor) -> Tensor:
                return self.layer(x) * by

        x, by = torch.randn(2, 4), torch.randn(2, 1)
        axes = {"x": {0: "batch"}, "by": {0: "batch"}}
        entry = Entry((x, by), ("x", "by"), ("y",), axes, "scaled")
        net = Model(Net().eval(), {"scaled": entry})
        export = to_onnx(net, "scaled", keep=["layer.weight", "layer#0:0"])
        assert set(export.values) == {"layer.weight", "layer#0:0"}
        a, b = np.ones((5, 4), np.float32), np.full((5, 1), 2, np.float32)
        (seen,) = run(export.model, a, b)
        with torch.no_grad():
            np.testing.assert_allclose(seen, net.module.layer(torch.ones(5, 4)).numpy() * 2, rtol=1e-5)

    def test_the_same_model_is_the_same_file(self, lowered: Lowered, tmp_path: Path) -> None:
        module, example = NETS["linear3d"]()
        artifact = lowered("onnxruntime", "linear3d", "float")
        again = find_runtime("onnxruntime").lower(model_of(module, example), target(), tmp_path)
        first, second = ((one.folder / one.files[0]).read_bytes() for one in (artifact, again))
        assert first == second

    def test_the_traced_program_stays_as_it_was(self) -> None:
        net = model_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
        before = str(trace(net).program)
        to_onnx(net, keep=["0#0:0", "0.weight"])
        assert str(trace(net).program) == before

    def test_no_metadata_is_left(self) -> None:
        exported = marked("depthwise").model
        proto = ir.to_proto(exported)
        assert not proto.metadata_props
        assert not proto.graph.metadata_props
        assert not proto.graph.value_info
        assert proto.producer_version == ""
        assert all(
            not node.doc_string and not node.metadata_props and not node.name for node in proto.graph.node
        )
        assert proto.opset_import[0].version == OPSET
        weights = sum(value.const_value.nbytes for value in exported.graph.initializers.values())  # type: ignore[union-attr]
        assert proto.ByteSize() < weights + 90 * (len(proto.graph.node) + len(proto.graph.initializer))
        assert b"Users" not in proto.SerializeToString()
        assert b"forward" not in proto.SerializeToString()


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 3, bias=False)
        self.zero = nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2, bias=False)
        self.some = nn.Conv2d(4, 4, 1)
        nn.init.zeros_(self.zero.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.some(self.up(self.zero(self.plain(x))))


def test_a_bias_of_zeros_is_dropped() -> None:
    net = model_of(Convolutions(), torch.randn(2, 3, 6, 6))
    exported = to_onnx(net).model
    biases = [len(node.inputs) == 3 for node in exported.graph if node.op_type in ("Conv", "ConvTranspose")]
    assert biases == [False, False, False, True]
    assert len(exported.graph.initializers) == 5
    x = torch.randn(2, 3, 6, 6)
    np.testing.assert_allclose(
        run(exported, x.numpy())[0], net.module(x).detach().numpy(), rtol=1e-4, atol=1e-6
    )


class Means(nn.Module):
    """Every kind of mean; only the first two are a pooling over the whole picture."""

    def forward(self, x: Tensor, short: Tensor) -> tuple[Tensor, ...]:
        return (
            x.mean((2, 3), keepdim=True),
            F.adaptive_avg_pool2d(x, 1),
            x.mean((2, 3)),
            x.mean((1, 2), keepdim=True),
            x.mean((1, 2, 3), keepdim=True),
            x.mean(3, keepdim=True),
            short.mean((1, 2), keepdim=True),
            x.unsqueeze(1).mean((2, 3), keepdim=True),
        )


def test_only_a_pooling_over_the_picture_becomes_one() -> None:
    x, short = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)
    net = model_of(Means(), x, short, outputs=8)
    exported = to_onnx(net).model
    assert operators(exported).count("GlobalAveragePool") == 2
    kept = to_onnx(net, keep=["input:x", "/mean#0:0"]).model  # a mark before and behind changes nothing
    assert operators(kept).count("GlobalAveragePool") == 2
    for graph in (exported, kept):
        for seen, wanted in zip(run(graph, x.numpy(), short.numpy()), net.module(x, short), strict=True):
            assert seen.shape == wanted.shape
            np.testing.assert_allclose(seen, wanted.numpy(), rtol=1e-5, atol=1e-6)


class TestRefusals:
    def test_an_operator_without_an_onnx_form(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.special.bessel_j0(x)

        with pytest.raises(TargetError, match="has no ONNX form") as told:
            to_onnx(model_of(Net(), torch.randn(2, 4)))
        assert "bessel_j0" in told.value.what
        assert told.value.fix is not None
        assert told.value.__cause__ is not None

    def test_a_name_that_is_not_in_the_graph(self) -> None:
        net = model_of(nn.Linear(4, 4), torch.randn(2, 4))
        with pytest.raises(TargetError, match="lost 'nowhere#0:0' and 1 more") as told:
            to_onnx(net, keep=["nowhere#0:0", "something"])
        assert told.value.fix == "exclude its layer under where"


def test_the_exporter_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    to_onnx(model_of(nn.Linear(4, 4), torch.randn(2, 4)))
    assert capsys.readouterr() == ("", "")
