"""The model: changed copies, edits as data, and modules that are rebuilt from them exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.formats import IntQuant
from featherweight.model import Entry, Model, Remove, SetAttr, Unroll, make_edit

FORMAT = IntQuant(torch.tensor(-1.0), torch.tensor(1.0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout())
        self.many = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.many[1].weight = self.many[0].weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).mean((2, 3))
        for layer in self.many:
            y = layer(y)
        return y


@pytest.fixture
def model() -> Model:
    x = torch.randn(2, 3, 8, 8)
    return Model(Net().eval(), {"forward": Entry((x,), ("x",), ("y",), {"x": {0: "batch"}})}, key="root")


class TestEvolve:
    def test_leaves_the_model_as_it_was(self, model: Model) -> None:
        formats = {"body.0.weight": (FORMAT,)}
        changed = model.evolve(formats=formats, edits=(Remove("body.2"),), key="next")
        assert (changed.formats, changed.edits, changed.key) == (formats, (Remove("body.2"),), "next")
        assert (model.formats, model.edits, model.key) == ({}, (), "root")
        formats["body.1.weight"] = (FORMAT,)
        assert list(changed.formats) == ["body.0.weight"]

    def test_what_changed_has_no_key_until_it_gets_one(self, model: Model) -> None:
        assert model.evolve().key == "root"
        assert model.evolve(key="k").key == "k"
        assert model.evolve(module=model.copy_module()).key == ""
        assert model.evolve(formats={}).key == ""
        assert model.evolve(edits=(Remove("body.2"),)).key == ""

    def test_appends_edits(self, model: Model) -> None:
        first, second = Remove("body.2"), SetAttr("body.0", "stride", [1, 1])
        assert model.evolve(edits=(first,)).evolve(edits=(second,)).edits == (first, second)

    def test_what_was_traced_goes_with_the_module(self, model: Model) -> None:
        model.traced["forward"] = "a graph"
        assert model.evolve(formats={}).traced is model.traced
        assert model.evolve(module=model.copy_module()).traced == {}
        assert model.traced == {"forward": "a graph"}

    def test_is_frozen(self, model: Model) -> None:
        with pytest.raises(AttributeError):
            model.key = "other"  # type: ignore[misc]


class TestEdits:
    def test_remove_leaves_an_identity(self, model: Model) -> None:
        module = model.copy_module()
        make_edit(module, Remove("body.2"))
        make_edit(module, Remove("many.0"))
        assert isinstance(module.get_submodule("body.2"), nn.Identity)
        assert isinstance(module.get_submodule("many.0"), nn.Identity)
        assert isinstance(model.module.get_submodule("body.2"), nn.Dropout)

    def test_set_attr_sets_a_value_or_makes_a_parameter(self, model: Model) -> None:
        module = model.copy_module()
        make_edit(module, SetAttr("body.1", "eps", 0.5))
        make_edit(module, SetAttr("body.0", "bias", shape=(4,)))
        assert module.get_submodule("body.1").eps == 0.5
        bias = module.get_parameter("body.0.bias")
        assert isinstance(bias, nn.Parameter)
        assert bias.tolist() == [0.0] * 4
        assert "body.0.bias" not in model.parameters

    def test_a_path_that_is_not_there_is_an_error(self, model: Model) -> None:
        with pytest.raises(AttributeError, match="nowhere"):
            make_edit(model.copy_module(), SetAttr("nowhere", "eps", 1))


class TestRebuild:
    def test_edits_and_tensors_make_the_same_module(self, model: Model) -> None:
        edits = (Remove("body.2"), SetAttr("body.0", "bias", shape=(4,)), SetAttr("body.1", "eps", 0.25))
        module = model.copy_module()
        for edit in edits:
            make_edit(module, edit)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        rebuilt = model.rebuild(edits, module.state_dict())
        x = torch.randn(5, 3, 8, 8)
        assert torch.equal(rebuilt(x), module(x))
        assert str(rebuilt) == str(module)
        assert rebuilt.many[0].weight is rebuilt.many[1].weight
        assert not rebuilt.training

    def test_tensors_that_do_not_fit_are_refused(self, model: Model) -> None:
        tensors = dict(model.module.state_dict())
        with pytest.raises(RuntimeError, match=r"body\.0\.bias"):
            model.rebuild((SetAttr("body.0", "bias", shape=(4,)),), tensors)
        with pytest.raises(RuntimeError, match="Unexpected"):
            model.rebuild((), {**tensors, "extra": torch.zeros(1)})

    def test_the_original_is_untouched(self, model: Model) -> None:
        before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
        model.rebuild(
            (Remove("body.1"),), {k: v + 1 for k, v in before.items() if not k.startswith("body.1")}
        )
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
        assert isinstance(model.module.get_submodule("body.1"), nn.BatchNorm2d)


def test_a_tied_parameter_appears_once_by_its_first_name(model: Model) -> None:
    assert "many.0.weight" in model.parameters
    assert "many.1.weight" not in model.parameters


def test_nested_arguments_come_out_of_flat_inputs() -> None:
    a, b, c = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    flat, tree = pytree.tree_flatten(([a, {"mask": b}], c))
    entry = Entry(tuple(flat), ("a", "mask", "c"), ("y",), tree=tree)
    assert entry.arguments(tuple(flat)) == ([a, {"mask": b}], c)
    assert Entry((a, b), ("a", "b"), ("y",)).arguments((a, b)) == (a, b)


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "torch.ops",
        "operator.attrgetter",
        "operator.methodcaller",
        "load_library",
        "inductor.x.y",
        "aten.view.__init__",
        "aten.__class__.default",
        "os.system",
    ],
)
def test_programs_from_files_call_operators_alone(target: str) -> None:
    step = {"name": "y", "target": target, "args": [{"value": "x"}], "kwargs": {}, "last": []}
    program = {"names": ["x"], "inputs": ["x"], "tree": None, "outputs": [{"value": "y"}]}
    program["runs"] = [{"layer": "", "steps": [step]}]
    made = make_edit(nn.Identity(), Unroll({"forward": program}))
    with pytest.raises((ValueError, AttributeError), match=r"no operator|no attribute"):
        made(torch.zeros(2))
