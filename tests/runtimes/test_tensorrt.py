"""TensorRT: no GPU is here, so files are held against NVIDIA's rules, and run by ONNX Runtime for parity."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from featherweight.data import Data
from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup
from featherweight.graph import trace
from featherweight.methods.cast import Cast
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact, Signature
from featherweight.runtimes._tensorrt_rules import ENFORCED, RULES, check_rules
from featherweight.runtimes._tensorrt_sparse import is_two_to_four
from featherweight.tools.simulate import simulate
from golden import context, data, decibels, folded, inputs, model, model_of, quantized, target
from nets import NETS

ort = pytest.importorskip("onnxruntime", reason="the runtime 'onnxruntime' is not installed")
RUNTIME = find_runtime("tensorrt")
HERE = target("tensorrt")


def lower(net: Model, folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    return RUNTIME.lower(net, HERE, folder)


def quantize(net: Model, **parameters: Any) -> Model:
    examples = Data.of(x_train=net.entries["forward"].example_inputs[0].numpy())
    return Quantize.model_validate(parameters).apply(net, context(net, examples, HERE))


def answers(artifact: Artifact, x: np.ndarray) -> np.ndarray:
    """What ONNX says that the file computes; ONNX Runtime's own rewriting of integers is left out."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(artifact.folder / "model.onnx", options)
    seen: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return seen


def simulated(net: Model, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        (y,) = simulate(net)(torch.from_numpy(x))
    return y.numpy()


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return RUNTIME.lower(quantized("residual", "tensorrt"), HERE, tmp_path_factory.mktemp("residual"))


@pytest.mark.parametrize("name", NETS)
class TestGoldenNets:
    def test_float(self, name: str, tmp_path: Path) -> None:
        x = inputs(name, 3)
        with torch.no_grad():
            wanted = model(name).module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(answers(lower(model(name), tmp_path), x), wanted, rtol=1e-4, atol=1e-5)

    def test_int8_keeps_every_rule_and_is_the_simulation(self, name: str, tmp_path: Path) -> None:
        net = quantized(name, "tensorrt")
        artifact = lower(net, tmp_path)
        assert check_rules(tmp_path / "model.onnx") == []
        assert artifact.details["slower"] == []
        x = inputs(name, 4)
        assert decibels(simulated(net, x), answers(artifact, x)) >= 40
        stored = RUNTIME.stored(artifact)
        weights = [node.parameters["weight"] for node in trace(net) if node.op in ("conv2d", "linear")]
        assert {stored[weight].dtype for weight in weights} == {"int8"}
        for weight in weights:
            fmt = net.formats[weight][-1]
            assert isinstance(fmt, IntQuant)
            wanted = fmt.quantize(net.parameters[weight].detach()).numpy()
            held = initializers(tmp_path / "model.onnx")[weight]
            assert np.array_equal(held, wanted) or np.array_equal(held, wanted.T)

    def test_half_precision_is_computed_in_it(self, name: str, tmp_path: Path) -> None:
        net = Cast().apply(folded(name), context(folded(name), data(name), HERE))
        artifact = lower(net, tmp_path)
        assert {RUNTIME.stored(artifact)[weight].dtype for weight in net.formats} == {"float16"}
        x = inputs(name, 4)
        seen = answers(artifact, x)
        assert seen.dtype == np.float32
        assert 50 < decibels(simulated(net, x), seen) < 110  # half precision, not float32
        casts = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Cast"]
        assert len(casts) <= 2 * sum(node.op in ("conv2d", "linear") for node in trace(net))


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_a_residual_net_is_cast_at_its_ends_alone(tmp_path: Path) -> None:
    lower(Cast().apply(folded("residual"), context(folded("residual"), data("residual"), HERE)), tmp_path)
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("Cast") == 2
    assert (kinds[0], kinds[-1]) == ("Cast", "Cast")


class TestPlacement:
    """Where pairs stand in a residual net, as NVIDIA's guide draws it."""

    def test_residual_inputs_alone_are_rounded(self, residual: Artifact) -> None:
        graph = onnx.load(residual.folder / "model.onnx").graph
        maker = {name: node.op_type for node in graph.node for name in node.output}
        sums = [sorted(maker[name] for name in node.input) for node in graph.node if node.op_type == "Add"]
        assert sums == [["Conv", "DequantizeLinear"]] * 2

    def test_nothing_stands_between_a_layer_and_its_relu(self, residual: Artifact) -> None:
        graph = onnx.load(residual.folder / "model.onnx").graph
        maker = {name: node.op_type for node in graph.node for name in node.output}
        relus = [maker[node.input[0]] for node in graph.node if node.op_type == "Relu"]
        assert sorted(relus) == ["Add", "Add", "Conv", "Conv", "Conv"]

    def test_biases_are_float(self, residual: Artifact) -> None:
        stored = RUNTIME.stored(residual)
        assert {stored[name].dtype for name in stored if name.endswith("bias")} == {"float32"}

    def test_a_concatenation_is_not_rounded_by_itself(self, tmp_path: Path) -> None:
        net = quantized("shuffle", "tensorrt")
        assert not RUNTIME.supports("cat", None, TestRefusals.ACTIVATION, HERE)
        graph = lower(net, tmp_path) and onnx.load(tmp_path / "model.onnx").graph
        maker = {name: node.op_type for node in graph.node for name in node.output}
        concats = [node for node in graph.node if node.op_type == "Concat" and len(node.input) == 2]
        assert any("DequantizeLinear" not in {maker.get(name) for name in node.input} for node in concats)


Break = Callable[[onnx.ModelProto], None]


def node_of(proto: onnx.ModelProto, kind: str, index: int = 0) -> onnx.NodeProto:
    found: onnx.NodeProto = [node for node in proto.graph.node if node.op_type == kind][index]
    return found


def constant(proto: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    """Give a constant another value."""
    kept = [tensor for tensor in proto.graph.initializer if tensor.name != name]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend([*kept, numpy_helper.from_array(array, name)])


def scales(proto: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    constant(proto, name, change(held[name]))


def unsigned(proto: onnx.ModelProto) -> None:
    for name in [t.name for t in proto.graph.initializer if t.name.endswith(":0.zero_point")]:
        constant(proto, name, np.zeros((), np.uint8))


def shifted(proto: onnx.ModelProto) -> None:
    constant(proto, node_of(proto, "QuantizeLinear").input[2], np.array(3, np.int8))


def negative(proto: onnx.ModelProto) -> None:
    scales(proto, node_of(proto, "QuantizeLinear").input[1], lambda scale: -scale)


def computed_scale(proto: onnx.ModelProto) -> None:
    node = node_of(proto, "QuantizeLinear")
    proto.graph.node.insert(0, helper.make_node("Abs", [node.input[1]], ["computed"]))
    node.input[1] = "computed"


def another_scale(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "other"))
    reader = node_of(proto, "QuantizeLinear").output[0]
    next(node for node in proto.graph.node if reader in node.input).input[1] = "other"


def activation_per_channel(proto: onnx.ModelProto) -> None:
    node = node_of(proto, "QuantizeLinear")
    for name, array in ((node.input[1], np.full(3, 0.1, np.float32)), (node.input[2], np.zeros(3, np.int8))):
        constant(proto, name, array)


def other_axis(proto: onnx.ModelProto) -> None:
    """Scales of a square weight, told to lie along its inputs."""
    node = next(
        n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "layer1.conv1.weight"
    )
    next(item for item in node.attribute if item.name == "axis").i = 1


def integer_bias(proto: onnx.ModelProto) -> None:
    node = node_of(proto, "Conv")
    name = node.input[2]
    scales(proto, name, lambda bias: np.rint(bias * 1e4).astype(np.int32))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(1e-4, np.float32), "step"))
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", [name, "step"], ["restored bias"]))
    node.input[2] = "restored bias"


def custom_operator(proto: onnx.ModelProto) -> None:
    node = node_of(proto, "Conv")
    node.op_type, node.domain = "FusedConv", "com.microsoft"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def old_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 11


def not_onnx(proto: onnx.ModelProto) -> None:
    node_of(proto, "Conv").input[0] = "nobody makes this"


def bare_input(proto: onnx.ModelProto) -> None:
    node_of(proto, "Conv").input[0] = node_of(proto, "QuantizeLinear").input[0]


def pair(proto: onnx.ModelProto, source: str, reader: onnx.NodeProto) -> None:
    """A Q/DQ pair more, in front of one reader of a value."""
    scale, point = node_of(proto, "QuantizeLinear").input[1:3]
    names = [f"{source} as integers", f"{source} again"]
    made = [
        helper.make_node("QuantizeLinear", [source, scale, point], names[:1]),
        helper.make_node("DequantizeLinear", [names[0], scale, point], names[1:]),
    ]
    reader.input[list(reader.input).index(source)] = names[1]
    place = list(proto.graph.node).index(reader)
    for offset, node in enumerate(made):
        proto.graph.node.insert(place + offset, node)


def pair_before_relu(proto: onnx.ModelProto) -> None:
    relu = node_of(proto, "Relu")
    pair(proto, relu.input[0], relu)


def pair_before_sum(proto: onnx.ModelProto) -> None:
    maker = {name: node.op_type for node in proto.graph.node for name in node.output}
    add = node_of(proto, "Add")
    pair(proto, next(name for name in add.input if maker[name] == "Conv"), add)


def bare_sum(proto: onnx.ModelProto) -> None:
    """The residual input as it was before it was rounded."""
    maker = {name: node for node in proto.graph.node for name in node.output}
    add = node_of(proto, "Add")
    place = next(i for i, name in enumerate(add.input) if maker[name].op_type == "DequantizeLinear")
    add.input[place] = maker[maker[add.input[place]].input[0]].input[0]


def read_integers(proto: onnx.ModelProto) -> None:
    made = node_of(proto, "QuantizeLinear").output[0]
    proto.graph.node.insert(2, helper.make_node("Identity", [made], ["integers handed on"]))


BREAKS: list[tuple[str, Break]] = [
    ("valid", not_onnx), ("operators", custom_operator), ("opset", old_opset), ("signed", unsigned),
    ("zero point", shifted), ("scale", negative), ("scale", computed_scale), ("pairs", another_scale),
    ("pairs", read_integers), ("per tensor", activation_per_channel), ("per channel", other_axis),
    ("bias", integer_bias), ("inputs", bare_input), ("clamps", pair_before_relu), ("sums", pair_before_sum),
    ("sums", bare_sum),
]  # fmt: skip


class TestRules:
    @pytest.mark.parametrize(("rule", "change"), BREAKS)
    def test_a_broken_one_is_named(
        self, rule: str, change: Break, residual: Artifact, tmp_path: Path
    ) -> None:
        proto = onnx.load(residual.folder / "model.onnx")
        change(proto)
        onnx.save(proto, tmp_path / "broken.onnx")
        assert rule in {told.partition(":")[0] for told in check_rules(tmp_path / "broken.onnx")}

    def test_all_of_them_can_be_broken(self) -> None:
        assert {rule for rule, _ in BREAKS} | {"blocks"} == set(RULES)
        assert set(RULES) > ENFORCED

    @pytest.mark.parametrize("change", ["axis", "ragged", "conv"])
    def test_blocks(self, change: str, tmp_path: Path) -> None:
        lower(grouped(), tmp_path)
        assert check_rules(tmp_path / "model.onnx") == []
        proto = onnx.load(tmp_path / "model.onnx")
        node = next(node for node in proto.graph.node if any(a.name == "block_size" for a in node.attribute))
        attributes = {item.name: item for item in node.attribute}
        if change == "axis":
            attributes["axis"].i = 1 - attributes["axis"].i
        elif change == "ragged":
            attributes["block_size"].i = 24
        else:
            next(n for n in proto.graph.node if node.output[0] in n.input).op_type = "Conv"
        onnx.save(proto, tmp_path / "broken.onnx")
        assert "blocks" in {told.partition(":")[0] for told in check_rules(tmp_path / "broken.onnx")}

    def test_lowering_refuses_a_file_that_breaks_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if the writer of pairs knew nothing of TensorRT."""
        monkeypatch.setattr(type(RUNTIME), "realise", lambda self, fmt, target, role: fmt)
        with pytest.raises(TargetError, match=r"would not read 'model\.onnx': (signed|zero point)") as told:
            lower(quantized("residual", "onnxruntime"), tmp_path)
        assert told.value.where is not None

    def test_an_operator_that_it_does_not_read(self, tmp_path: Path) -> None:
        class Odd(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.linalg.det(x)  # type: ignore[no-any-return]

        with pytest.raises(TargetError, match="operators: 'y' is made by Det"):
            lower(model_of(Odd(), torch.randn(2, 3, 3)), tmp_path)

    def test_what_only_costs_time_is_told(self, tmp_path: Path) -> None:
        """A layer of integers whose input nobody has rounded."""
        formats = {**quantized("residual", "tensorrt").formats}
        kept = {name: chain for name, chain in formats.items() if name != "input:x"}
        artifact = lower(quantized("residual", "tensorrt").evolve(formats=kept), tmp_path)
        assert artifact.details["slower"] == ["inputs: 'stem.0.weight' is integers, but 'x' is not rounded"]


def grouped() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = model_of(nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)), torch.randn(8, 64))
    return quantize(net, weights="int4", activations="none", granularity="per_group", group=32)


class TestFourBits:
    def test_are_stored_in_blocks_along_the_inputs(self, tmp_path: Path) -> None:
        net = grouped()
        artifact = lower(net, tmp_path)
        proto = onnx.load(tmp_path / "model.onnx")
        assert proto.opset_import[0].version >= 21
        kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
        assert kinds["0.weight"] == kinds["2.weight"] == TensorProto.INT4
        assert RUNTIME.stored(artifact)["0.weight"].bytes == 64 * 48 // 2
        blocks = [a.i for node in proto.graph.node for a in node.attribute if a.name == "block_size"]
        assert blocks == [32, 16]  # 48 inputs: two blocks share a scale where 32 does not divide
        x = net.entries["forward"].example_inputs[0].numpy()
        assert decibels(simulated(net, x), answers(artifact, x)) > 90

    def test_zero_points_are_refused(self) -> None:
        with pytest.raises(TargetError, match="no zero point of a weight but 0"):
            quantize(model("linear3d"), symmetric_weights=False)


class TestSparse:
    @pytest.fixture
    def sparse(self) -> Model:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 8))
        with torch.no_grad():
            for index in (0, 3):
                weight: Tensor = net[index].weight  # type: ignore[assignment]
                fours = weight.movedim(1, -1)
                smallest = fours.unflatten(-1, (-1, 4)).abs().argsort(-1)[..., :2]
                mask = torch.ones_like(fours.unflatten(-1, (-1, 4))).scatter_(-1, smallest, 0)
                weight.mul_(mask.flatten(-2).movedim(-1, 1))
        return model_of(net, torch.randn(8, 8, 8, 8))

    def test_two_of_four_stay_zeros(self, sparse: Model, tmp_path: Path) -> None:
        for name, net in (("float", sparse), ("int8", quantize(sparse)), ("half", half(sparse))):
            artifact = lower(net, tmp_path / name)
            assert artifact.details["two_to_four"] == ["0.weight", "3.weight"]
            held = initializers(tmp_path / name / "model.onnx")
            assert all(is_two_to_four(held[weight]) for weight in ("0.weight", "3.weight"))
            texts = RUNTIME.loaders(artifact, HERE, SIGNATURE)
            assert "SPARSE_WEIGHTS" in texts["load.py"]
            assert "kSPARSE_WEIGHTS" in texts["load.cpp"]

    def test_a_lost_zero_is_refused(
        self, sparse: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        net = quantize(sparse)
        monkeypatch.setattr(IntQuant, "quantize", lambda self, x: torch.ones_like(x, dtype=torch.int32))
        with pytest.raises(TargetError, match=r"zeros of '0\.weight' did not stay zeros"):
            lower(net, tmp_path)

    def test_what_is_two_of_four(self) -> None:
        assert is_two_to_four(np.array([[0, 1, 0, 2, 3, 0, 0, 4]]))
        assert not is_two_to_four(np.array([[0, 1, 5, 2, 3, 0, 0, 4]]))
        assert not is_two_to_four(np.array([[0, 0, 1]]))


def half(net: Model) -> Model:
    return Cast().apply(
        net, context(net, Data.of(x_train=net.entries["forward"].example_inputs[0].numpy()), HERE)
    )


class TestRefusals:
    ACTIVATION = IntQuant(torch.tensor(-1.0), torch.tensor(1.0))

    def test_formats_that_it_does_not_read(self) -> None:
        one = torch.ones(4)
        for fmt, role in (
            (IntQuant(-one, one, 8, True, PerChannel(0)), "activation"),
            (IntQuant(-one[0], one[0], 8, False), "weight"),
            (IntQuant(-one[0], one[0], 4, True), "weight"),
            (FloatCast("bfloat16"), "weight"),
            (FloatCast("float16"), "activation"),
        ):
            with pytest.raises(TargetError, match="tensorrt") as told:
                RUNTIME.realise(fmt, HERE, role)  # type: ignore[arg-type]
            assert told.value.fix

    def test_weights_alone(self) -> None:
        eight = IntQuant(-torch.ones(1), torch.ones(1), 8, True, PerChannel(0))
        four = IntQuant(-torch.ones(1, 1), torch.ones(1, 1), 4, True, PerGroup(1, 32))
        assert not RUNTIME.supports("linear", eight, None, HERE)
        assert RUNTIME.supports("linear", four, None, HERE)
        assert not RUNTIME.supports("conv2d", four, None, HERE)

    def test_running_it_says_why_not_and_what_to_do(self, residual: Artifact) -> None:
        assert RUNTIME.installed()
        with pytest.raises(TargetError, match="written, not measured: needs an NVIDIA GPU") as told:
            RUNTIME.open(residual, HERE)
        assert "trtexec --onnx=model.onnx --stronglyTyped" in str(told.value.fix)


SIGNATURE = Signature((("x", "float32", (1, 3, 16, 16)),), ("y",))


def test_loaders(residual: Artifact) -> None:
    texts = RUNTIME.loaders(residual, HERE, SIGNATURE)
    assert set(texts) == {"load.py", "load.cpp"}
    ast.parse(texts["load.py"])
    for text in texts.values():
        assert "trtexec --onnx=model.onnx --stronglyTyped --shapes=x:1x3x16x16" in text
        assert "SPARSE" not in text
    assert texts["load.cpp"].count("{") == texts["load.cpp"].count("}")
