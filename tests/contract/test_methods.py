"""What every method promises, whoever wrote it; runs over each one that is found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.elastic import Space, mark
from featherweight.engine.run import Run
from featherweight.engine.store import Store
from featherweight.errors import RecipeError, TargetError
from featherweight.formats import FloatCast, encode
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model, make_edit
from featherweight.plugins import find_method, find_runtime, method_names, runtime_names
from featherweight.recipe import Recipe, Step
from featherweight.tools.elastic_space import find_space
from golden import beside, context, data, folded, inputs, model, target

METHODS = method_names()
NETS = ("residual", "linear3d", "shared")  # convolutions, layers on three axes, shared and tied weights


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def start(name: str, net: str) -> Model:
    """The model that would reach a step: structure comes first, so formats and values see a folded one."""
    if name == "subnet":
        return supernet(net)
    if name == "merge":
        return beside(net)
    return model(net) if find_method(name).kind == "structure" else folded(net)


@cache
def supernet(net: str) -> Model:
    """A golden net that says which networks it holds; no training is needed for that."""
    space, _, _ = find_space(model(net), widths=(0.5, 1.0), multiple=4, kernels=False)
    few = Space(dict(list(space.widths.items())[-3:]), space.depths)
    edit = mark(few)
    made = model(net).evolve(module=make_edit(model(net).copy_module(), edit), edits=(edit,))
    return made.evolve(key=f"{model(net).key} as a supernet")


def original(name: str, net: str) -> Model:
    """What the step's run began with."""
    return beside(net) if name == "merge" else model(net)


def around(name: str, net: str, begun: Model, seed: int = 0) -> Context:
    return replace(context(begun, data(net), seed=seed), models={"original": original(name, net)})


def answer(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a network gives, all its outputs in one."""
    with torch.no_grad():
        found = module(x)
    return found if isinstance(found, torch.Tensor) else torch.cat(found, 1)


@cache
def result(name: str, net: str) -> Model:
    """A method with its defaults, on a golden net."""
    begun = start(name, net)
    return find_method(name)().apply(begun, around(name, net, begun))


def fingerprint(net: Model) -> dict[str, Any]:
    """Everything that a method may change, comparable."""
    state = net.module.state_dict(keep_vars=True)
    return {
        "tensors": {
            key: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for key, t in state.items()
        },
        "layers": [
            (path, type(layer).__name__, layer.training) for path, layer in net.module.named_modules()
        ],
        "trainable": [key for key, tensor in net.module.named_parameters() if tensor.requires_grad],
        "gradients": [key for key, tensor in net.module.named_parameters() if tensor.grad is not None],
        "formats": {key: [encode(fmt) for fmt in chain] for key, chain in net.formats.items()},
        "edits": net.edits,
        "entries": list(net.entries),
        "key": net.key,
    }


def written(net: Model) -> dict[str, Any]:
    """What a step leaves: without the key, which is the engine's."""
    return {key: value for key, value in fingerprint(net).items() if key != "key"}


class TestDeclaration:
    def test_names_its_kind_and_needs(self, name: str) -> None:
        method = find_method(name)
        assert issubclass(method, Method)
        assert method.kind in get_args(Kind)
        assert method.needs <= set(get_args(Need))

    def test_every_parameter_has_a_default_and_is_documented(self, name: str) -> None:
        method = find_method(name)
        method()
        assert method.__doc__
        for parameter in set(method.model_fields) - {"where"}:
            assert f"{parameter}:" in method.__doc__, parameter

    def test_is_frozen_and_forbids_what_it_does_not_know(self, name: str) -> None:
        with pytest.raises(ValueError, match="frozen"):
            find_method(name)().where = None  # type: ignore[assignment,misc]
        with pytest.raises(ValueError, match="not permitted"):
            find_method(name)(strength=1)  # type: ignore[call-arg]

    def test_survives_a_recipe(self, name: str) -> None:
        where = {"exclude": ["head"]}
        recipe = Recipe((Step(name, {"where": where}),))
        again = Recipe.from_dict(recipe.to_dict())
        assert again == recipe
        assert Recipe.parse(recipe.to_yaml()) == recipe
        (built,) = again.methods()
        assert built == find_method(name).model_validate({"where": where})
        full = Recipe((Step(name, built.model_dump(mode="json")),))
        assert Recipe.parse(full.to_yaml()).methods() == [built]

    @pytest.mark.parametrize("net", NETS)
    def test_holes_are_parameters_and_hold_what_it_takes(self, name: str, net: str) -> None:
        method = find_method(name)
        begun = start(name, net)
        for parameter, hole in method.holes(begun, around(name, net, begun)).items():
            for value in hole.ends():
                assert hole.admits(value)
                assert getattr(method.model_validate({parameter: value}), parameter) == value


@pytest.mark.parametrize("net", NETS)
class TestApply:
    def test_leaves_its_input_alone(self, name: str, net: str) -> None:
        begun = start(name, net)
        own = begun.evolve(module=begun.copy_module())
        first = original(name, net)
        source = first.evolve(module=first.copy_module())
        before, whole = fingerprint(own), fingerprint(source)
        ctx = replace(context(own, data(net)), models={"original": source})
        done = find_method(name)().apply(own, ctx)
        assert fingerprint(own) == before
        assert fingerprint(source) == whole
        assert done is not own
        x = torch.from_numpy(inputs(net, 2))
        assert torch.equal(answer(own.module, x), answer(begun.module, x))

    def test_is_the_same_every_time(self, name: str, net: str) -> None:
        begun = start(name, net)
        own = begun.evolve(module=begun.copy_module())
        torch.manual_seed(12345)  # its own seed counts, not what ran before
        again = find_method(name)().apply(own, around(name, net, own))
        assert written(again) == written(result(name, net))

    def test_keeps_the_entries_and_the_shape_of_outputs(self, name: str, net: str) -> None:
        done = result(name, net)
        assert done.entries == start(name, net).entries
        x = torch.from_numpy(inputs(net, 3))
        assert answer(done.module, x).shape == answer(original(name, net).module, x).shape
        assert answer(done.module, x).isfinite().all()

    def test_is_rebuilt_from_edits_and_tensors(self, name: str, net: str) -> None:
        done = result(name, net)
        rebuilt = original(name, net).rebuild(done.edits, done.module.state_dict())
        x = torch.from_numpy(inputs(net, 3))
        assert torch.equal(answer(rebuilt, x), answer(done.module, x))

    def test_only_structure_steps_edit_and_only_format_steps_format(self, name: str, net: str) -> None:
        kind = find_method(name).kind
        begun, done = start(name, net), result(name, net)
        assert kind == "structure" or done.edits == begun.edits
        assert kind == "format" or done.formats == begun.formats
        assert kind == "values" or kind == "structure" or same_tensors(begun, done)
        known = {*done.parameters, *(key for key in done.formats if "#" in key or key.startswith("input:"))}
        assert set(done.formats) <= known

    def test_touches_nothing_when_everything_is_excluded(self, name: str, net: str) -> None:
        begun = start(name, net)
        method = find_method(name).model_validate({"where": {"exclude": ["*"]}})
        try:
            done = method.apply(begun, around(name, net, begun))
        except RecipeError as error:
            assert error.fix is not None
            return
        assert written(done) == written(begun)

    def test_touches_nothing_of_an_excluded_layer(self, name: str, net: str) -> None:
        begun = start(name, net)
        for layer in weighted(begun.module):
            method = find_method(name).model_validate({"where": {"exclude": [layer]}})
            done = method.apply(begun, around(name, net, begun))
            assert type(done.module.get_submodule(layer)) is type(begun.module.get_submodule(layer))
            for key, tensor in begun.module.get_submodule(layer).named_parameters(prefix=layer):
                assert torch.equal(done.module.get_parameter(key), tensor)
                assert first_name(done.module, key) not in done.formats


def weighted(module: nn.Module) -> list[str]:
    """The first and last layer of each kind that owns parameters: one step for each, so not all of them."""
    found: dict[str, list[str]] = {}
    for path, layer in module.named_modules():
        if path and any(True for _ in layer.parameters(recurse=False)):
            found.setdefault(type(layer).__name__, []).append(path)
    return [path for paths in found.values() for path in dict.fromkeys((paths[0], paths[-1]))]


def first_name(module: nn.Module, key: str) -> str:
    """The name of a parameter that is tied to others: the first one."""
    tensor = module.get_parameter(key)
    return next(name for name, other in module.named_parameters() if other is tensor)


def same_tensors(one: Model, two: Model) -> bool:
    first, second = one.module.state_dict(), two.module.state_dict()
    return list(first) == list(second) and all(torch.equal(t, second[key]) for key, t in first.items())


@pytest.mark.parametrize("net", ["residual", "shared"])
def test_a_step_from_the_store_is_the_step_that_was_computed(name: str, net: str, tmp_path: Path) -> None:
    step = find_method(name)()
    runs = [Run(original(name, net), data(net), target(), Store(tmp_path)) for _ in range(2)]
    before = [step] if step.kind == "structure" else [find_method("fold")(), step]
    made = []
    for run in runs:
        reached = supernet(net) if name == "subnet" else original(name, net)
        for method in before:
            reached = run.step(reached, method)
        made.append(reached)
    computed, read = made
    assert computed.module is not read.module
    assert fingerprint(computed) == fingerprint(read)
    journal = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "steps" for line in journal) == len(before)
    x = torch.from_numpy(inputs(net, 3))
    assert torch.equal(answer(computed.module, x), answer(read.module, x))


@pytest.mark.parametrize("runtime", runtime_names())
@pytest.mark.parametrize("net", ["residual", "shared"])
def test_the_result_runs_on_every_runtime(name: str, net: str, runtime: str, tmp_path: Path) -> None:
    engine = find_runtime(runtime)
    if not engine.installed():
        pytest.skip(f"runtime '{runtime}' is not installed")
    begun = start(name, net)
    where = target(runtime)
    asked = context(begun, data(net), where)
    if name == "cast" and not asked.supports("conv2d", FloatCast(), None):
        with pytest.raises(RecipeError, match=f"no weight that {runtime} stores as float16"):
            find_method(name)().apply(begun, asked)
        return
    done = find_method(name)().apply(begun, asked)
    artifact = engine.lower(done, where, tmp_path)
    assert artifact.bytes > 0
    if engine.unmeasured:
        with pytest.raises(TargetError, match="not measured"):
            engine.open(artifact, where)
        return
    session = engine.open(artifact, where)
    for batch in (1, 4):
        x = inputs(net, batch)
        y = np.concatenate(session(x), axis=1)
        wanted = answer(original(name, net).module, torch.from_numpy(x)).numpy()
        assert y.shape == wanted.shape
        assert y.dtype == wanted.dtype
        assert np.isfinite(y).all()
