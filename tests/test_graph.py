"""The graph: names that are the same whenever the same call is made."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from featherweight.errors import LoadError
from featherweight.graph import Graph, trace
from featherweight.model import Entry, Model
from featherweight.tools.simulate import Replay
from golden import model, model_of
from nets import NETS

X = torch.randn(2, 3, 8, 8)


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph]


def consistent(graph: Graph) -> None:
    """Every name is unique and every value that a node reads or makes is known."""
    assert len(set(names(graph))) == len(graph.nodes)
    made = [output for node in graph for output in node.outputs]
    assert len(set(made)) == len(made)
    assert set(graph.values) == {*made, *graph.inputs}
    seen = set(graph.inputs)
    for node in graph:
        assert set(node.inputs) <= seen
        seen |= set(node.outputs)
    assert set(graph.outputs) <= seen


@pytest.mark.parametrize("name", NETS)
def test_golden_nets_are_read_whole(name: str) -> None:
    graph = trace(model(name))
    consistent(graph)
    assert graph.inputs == ("input:x",)
    assert graph.outputs == ("head#0:0",)
    known = {*dict(model(name).module.named_parameters()), *dict(model(name).module.named_buffers())}
    assert {parameter for node in graph for parameter in node.parameters.values()} <= known
    assert set(graph.parameter_shapes) >= {p for node in graph for p in node.parameters.values()}


class TestNames:
    def test_a_layer_by_its_path_and_call(self) -> None:
        graph = trace(model("shared"))
        calls = [node for node in graph if node.layer == "block"]
        assert [node.name for node in calls] == ["block#0", "block#1"]
        assert [node.outputs for node in calls] == [("block#0:0",), ("block#1:0",)]
        assert {node.parameters["weight"] for node in calls} == {"block.weight"}
        assert {node.layer_type for node in calls} == {"Conv2d"}

    def test_a_tied_parameter_by_its_first_name(self) -> None:
        graph = trace(model("shared"))
        weights = [node.parameters["weight"] for node in graph if node.layer in ("first", "second")]
        assert weights == ["first.weight", "first.weight"]
        biases = [node.parameters["bias"] for node in graph if node.layer in ("first", "second")]
        assert biases == ["first.bias", "second.bias"]

    def test_a_function_by_its_owner_operator_and_order(self) -> None:
        graph = trace(model("shuffle"))
        own = [node.name for node in graph if node.layer == "unit1"]
        assert own == [
            "unit1/chunk#0", "unit1/cat#0", "unit1/view#0", "unit1/transpose#0", "unit1/reshape#0"
        ]  # fmt: skip
        adds = [node.name for node in trace(model("attention")) if node.op == "add"]
        assert adds == ["/add#0", "/add#1", "/add#2"]

    def test_a_layer_that_is_registered_twice(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one = nn.Conv2d(3, 3, 1)
                self.two = self.one

            def forward(self, x: Tensor) -> Tensor:
                return self.two(F.relu(self.one(x)))

        graph = trace(model_of(Net(), X))
        consistent(graph)
        assert {node.parameters["weight"] for node in graph if node.op == "conv2d"} == {"one.weight"}

    def test_several_outputs_of_one_operator(self) -> None:
        graph = trace(model("shuffle"))
        split = next(node for node in graph if node.op == "chunk")
        assert split.outputs == ("unit1/chunk#0:0", "unit1/chunk#0:1")
        assert [graph.values[name].shape for name in split.outputs] == [(2, 8, 4, 4)] * 2
        cat = next(node for node in graph if node.op == "cat")
        assert cat.inputs[0] == "unit1/chunk#0:0"

    def test_a_recurrent_layer(self) -> None:
        graph = trace(model("lstm"))
        node = next(node for node in graph if node.op == "lstm")
        assert node.outputs == ("lstm#0:0", "lstm#0:1", "lstm#0:2")
        assert set(node.parameters.values()) >= {"lstm.weight_ih_l0", "lstm.weight_hh_l1", "lstm.bias_ih_l1"}
        assert graph.values["lstm#0:0"].shape == (2, 7, 16)

    def test_outputs_that_nobody_reads(self) -> None:
        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(12, 8, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.lstm(x)[1][0][-1]

        graph = trace(model_of(Last(), torch.randn(2, 5, 12)))
        consistent(graph)

    def test_a_leaf_that_returns_several_tensors(self) -> None:
        class Both(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                y = torch.relu(x)
                return y, y.sigmoid()

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.both = Both()

            def forward(self, x: Tensor) -> Tensor:
                a, b = self.both(x)
                c, d = self.both(a + b)
                return c * d

        graph = trace(model_of(Net(), X))
        consistent(graph)
        assert names(graph)[:2] == ["both#0", "both/sigmoid#0"]
        assert names(graph)[3:5] == ["both#1", "both/sigmoid#1"]

    def test_the_inside_of_a_leaf(self) -> None:
        class Swish(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * torch.sigmoid(x)

        graph = trace(model_of(nn.Sequential(Swish(), Swish()), X))
        consistent(graph)
        assert names(graph) == ["0/sigmoid#0", "0#0", "1/sigmoid#0", "1#0"]

    def test_are_the_same_in_every_trace(self) -> None:
        for name in ("shuffle", "shared", "attention"):
            module, example = NETS[name]()
            again = trace(model_of(module, example))
            assert names(again) == names(trace(model(name)))
            assert list(again.values) == list(trace(model(name)).values)

    def test_survive_an_unrelated_layer(self) -> None:
        class Wider(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, _ = NETS["residual"]()
                self.extra = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x + self.extra(x))

        inner = [
            name.removeprefix("net") for name in names(trace(model_of(Wider(), torch.randn(2, 3, 16, 16))))
        ]
        kept = [name.removeprefix(".") for name in inner if not name.startswith(("extra", "/add"))]
        assert kept == names(trace(model("residual")))


class TestEntries:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def encode(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x))

        def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            y = self.encode(x) + other
            return self.head(y), y

    def test_another_method_than_forward(self) -> None:
        x = torch.randn(2, 4)
        encode = Entry((x,), ("x",), ("y",), {"x": {0: "batch"}}, method="encode")
        forward = Entry((x, x), ("x", "other"), ("a", "b"), {})
        both = Model(self.Net().eval(), {"forward": forward, "encode": encode})
        graph = trace(both, "encode")
        assert names(graph) == ["body#0", "/relu#0"]
        assert graph.nodes[0].parameters == {"weight": "body.weight", "bias": "body.bias"}
        assert graph.nodes[0].layer_type == "Linear"
        assert graph.nodes[1].layer_type == "Net"
        whole = trace(both)
        assert names(whole) == ["body#0", "/relu#0", "/add#0", "head#0"]
        assert whole.inputs == ("input:x", "input:other")
        assert whole.outputs == ("head#0:0", "/add#0:0")
        assert set(both.traced) == {"forward", "encode"}

    def test_another_method_with_several_inputs_and_a_dynamic_batch(self) -> None:
        class Two(nn.Module):
            def mix(self, a: Tensor, b: Tensor) -> Tensor:
                return a + b * 2

        x = torch.randn(2, 4)
        graph = trace(model_of(Two(), x, x.clone(), method="mix"))
        assert graph.inputs == ("input:x", "input:x1")
        assert all(symbolic(graph, name) for name in (*graph.inputs, *graph.outputs))

    def test_nested_inputs(self) -> None:
        class Nested(nn.Module):
            def forward(self, pair: dict[str, Tensor], c: Tensor) -> Tensor:
                return pair["a"] * pair["b"] + c

        x = torch.randn(2, 4)
        flat, tree = pytree.tree_flatten(({"a": x, "b": x + 1}, x + 2))
        axes = {name: {0: "batch"} for name in "abc"}
        entry = Entry(tuple(flat), ("a", "b", "c"), ("y",), axes, tree=tree)
        graph = trace(Model(Nested(), {"forward": entry}))
        assert graph.inputs == ("input:a", "input:b", "input:c")
        assert names(graph) == ["/mul#0", "/add#0"]


def symbolic(graph: Graph, value: str) -> bool:
    """Whether the first axis has no fixed size."""
    fx_name = graph.values[value].fx_name
    node = next(node for node in graph.program.graph.nodes if node.name == fx_name)
    return not isinstance(node.meta["val"].shape[0], int)


class TestShapes:
    @pytest.mark.parametrize("name", NETS)
    def test_the_batch_stays_dynamic(self, name: str) -> None:
        graph = trace(model(name))
        assert graph.batch == 2
        assert symbolic(graph, "input:x")
        assert symbolic(graph, graph.outputs[0])

    def test_are_those_of_the_example(self) -> None:
        graph = trace(model("residual"))
        assert graph.values["input:x"].shape == (2, 3, 16, 16)
        assert graph.values["layer2.conv1#0:0"].shape == (2, 16, 8, 8)
        assert graph.values["head#0:0"].dtype == torch.float32
        assert graph.parameter_shapes["layer2.conv1.weight"] == (16, 8, 3, 3)

    def test_a_fixed_axis_is_a_number(self) -> None:
        fixed = replace(model("linear3d").entries["forward"], dynamic_axes={})
        module, _ = NETS["linear3d"]()
        graph = trace(Model(module, {"forward": fixed}))
        assert not symbolic(graph, "input:x")


class TestReads:
    def test_attributes_parameters_and_readers(self) -> None:
        graph = trace(model("residual"))
        conv = graph.producer["layer2.conv1#0:0"]
        assert conv.attributes["stride"] == [2, 2]
        assert conv.parameters == {"weight": "layer2.conv1.weight"}
        assert conv.inputs == ("layer1.relu#1:0",)
        readers = graph.consumers["layer1.relu#1:0"]
        assert [node.name for node in readers] == ["layer2.conv1#0", "layer2.shortcut.0#0"]
        norm = graph.producer["layer2.bn1#0:0"]
        assert norm.parameters["running_mean"] == "layer2.bn1.running_mean"

    def test_a_constant_made_in_forward(self) -> None:
        class Net(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)

        graph = trace(model_of(Net(), X))
        consistent(graph)


class InPlace(nn.Module):
    """As torchvision writes its networks, and worse: what is written to is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.relu(self.a(self.relu(x)))
        z = self.b(y)
        z += y
        z = self.relu(z)
        w = self.c(z)
        r = F.hardtanh_(w, 0.0, 6.0)
        return w + r, w


class Masked(nn.Module):
    """Writes through a view."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :1] = 0.0
        y[:, 1].mul_(3)
        return y


class TestInPlace:
    def test_writes_become_new_values(self) -> None:
        module = InPlace()
        graph = trace(model_of(module, X.clone(), outputs=2))
        consistent(graph)
        assert names(graph) == [
            "relu#0", "a#0", "relu#1", "b#0", "/add#0", "relu#2", "c#0", "/hardtanh#0", "/add#1"
        ]  # fmt: skip
        assert graph.producer["/add#1:0"].inputs == ("/hardtanh#0:0",)
        assert graph.outputs == ("/add#1:0", "/hardtanh#0:0")
        given = X.clone()
        with torch.no_grad():
            seen = Replay(model_of(module, X.clone(), outputs=2))((given,))
            assert torch.equal(given, X)  # the module itself would have changed its input
            for one, two in zip(seen, module(given.clone()), strict=True):
                assert torch.equal(one, two)

    def test_names_are_those_of_the_same_net_without_them(self) -> None:
        plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU6())
        other = nn.Sequential(
            nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.ReLU6(inplace=True)
        )
        one, two = trace(model_of(plain, X)), trace(model_of(other, X.clone()))
        assert [(node.name, node.op, node.inputs) for node in one] == [
            (node.name, node.op, node.inputs) for node in two
        ]

    def test_a_write_through_a_view(self) -> None:
        graph = trace(model_of(Masked(), X))
        consistent(graph)
        assert not [node.op for node in graph if node.op in ("copy_", "mul_")]
        with torch.no_grad():
            (seen,) = Replay(model_of(Masked(), X))((X,))
        assert torch.equal(seen, Masked()(X))

    @pytest.mark.parametrize("part", [True, False])
    def test_a_buffer_that_is_written_to_is_told(self, part: bool) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("seen", torch.zeros(3))

            def forward(self, x: Tensor) -> Tensor:
                if part:
                    self.seen[:1] += 1
                else:
                    self.seen += 1
                return x + self.seen.sum()

        with pytest.raises(LoadError, match="writes into its inputs or buffers"):
            trace(model_of(Counting(), X))


class TestTracing:
    def test_leaves_training_modes_alone(self) -> None:
        module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout())
        module.train()
        module[1].eval()
        entry = Entry((X,), ("x",), ("y",), {"x": {0: "batch"}})
        graph = trace(Model(module, {"forward": entry}))
        assert [layer.training for layer in module.modules()] == [True, True, False, True]
        norm = next(node for node in graph if node.op == "batch_norm")
        assert norm.attributes["training"] is False

    def test_changes_no_buffer(self) -> None:
        module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        trace(Model(module, {"forward": Entry((X,), ("x",), ("y",))}))
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())

    def test_is_done_once(self) -> None:
        net = model_of(nn.Linear(4, 4), torch.randn(2, 4))
        assert trace(net) is trace(net)
        assert trace(net.evolve(formats={})) is trace(net)
        assert trace(net.evolve(module=net.copy_module())) is not trace(net)

    def test_what_cannot_be_followed_is_told(self) -> None:
        class Branch(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x if x.sum() > 0 else -x

        module = Branch().train()
        with pytest.raises(LoadError, match=r"torch\.export cannot follow Branch\.forward") as told:
            trace(Model(module, {"forward": Entry((X,), ("x",), ("y",))}))
        assert told.value.fix is not None
        assert told.value.__cause__ is not None
        assert module.training


class TestOtherValues:
    """A module that differs in values alone takes over the graph of a known one."""

    @staticmethod
    def changed(known: Model) -> Model:
        """The model with other values, buffers among them."""
        module = known.copy_module()
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor))
        return known.evolve(module=module)

    @pytest.mark.parametrize("name", NETS)
    def test_nothing_is_exported_and_the_new_values_count(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = model(name)
        first = trace(known)
        monkeypatch.setattr("featherweight.graph.export", None)
        other = self.changed(known)
        graph = trace(other)
        assert names(graph) == names(first)
        inputs = other.entries["forward"].example_inputs
        torch.testing.assert_close(Replay(other)(inputs)[0], other.module.eval()(*inputs))
        unlifted = graph.program.module(check_guards=False)
        torch.testing.assert_close(unlifted(*inputs), other.module(*inputs))
        torch.testing.assert_close(Replay(known)(inputs)[0], known.module.eval()(*inputs))

    def test_a_buffer_that_is_not_saved(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("scale", torch.tensor(2.0), persistent=False)

            def forward(self, x: Tensor) -> Tensor:
                return x * self.get_buffer("scale")

        known = model_of(Scaled(), X)
        trace(known)
        other = self.changed(known)
        unlifted = trace(other).program.module(check_guards=False)
        inputs = other.entries["forward"].example_inputs
        torch.testing.assert_close(unlifted(*inputs), other.module(*inputs))

    def test_another_setting_is_another_structure(self) -> None:
        known = model_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), X)
        trace(known)
        module = known.copy_module()
        module.get_submodule("0").stride = (2, 2)  # type: ignore[assignment]
        assert trace(known.evolve(module=module)).values["0#0:0"].shape[-1] == 3
        module = known.copy_module()
        module.set_submodule("1", nn.Sigmoid())
        assert [node.op for node in trace(known.evolve(module=module))] == ["conv2d", "sigmoid"]

    def test_no_value_is_held(self) -> None:
        known = model("residual")
        trace(known)
        kept = [graph.program.state_dict for graph in known.structures.values()]
        assert kept and all(tensor.is_meta for state in kept for tensor in state.values())
