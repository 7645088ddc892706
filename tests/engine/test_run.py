"""A run: each step is computed once, and what the store gives back is what was computed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from featherweight.data import Data
from featherweight.engine.run import Run, TargetSupports, write_model
from featherweight.engine.store import Store
from featherweight.errors import DataError, MissingRuntime, RecipeError, TargetError
from featherweight.formats import encode
from featherweight.method import Context, Method
from featherweight.methods.fold import Fold
from featherweight.methods.quantize import Quantize
from featherweight.model import Entry, Model, Remove, SetAttr
from featherweight.plugins import find_runtime
from featherweight.recipe import Recipe
from featherweight.runtime import Json, Target
from featherweight.tools.integers import weight_draft
from golden import data, inputs, model, target

INT8 = Recipe.parse("version: 1\nsteps:\n  - fold: {}\n  - quantize: {samples: 16}\n")
Calls = list[str]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Names of the methods that really computed, in order."""
    done: Calls = []

    def watched(name: str, apply: Callable[..., Model]) -> Callable[..., Model]:
        def call(self: Any, reached: Model, context: Any) -> Model:
            done.append(name)
            return apply(self, reached, context)

        return call

    monkeypatch.setattr(Fold, "apply", watched("fold", Fold.apply))
    monkeypatch.setattr(Quantize, "apply", watched("quantize", Quantize.apply))
    return done


def run(store: Store, name: str = "shared", seed: int = 0, **changed: Any) -> Run:
    settings: dict[str, Any] = {"original": model(name), "data": data(name), "target": target(), **changed}
    return Run(settings["original"], settings["data"], settings["target"], store, seed=seed)


def journal(store: Store) -> list[str]:
    return [json.loads(line)["kind"] for line in (store.folder / "journal.jsonl").read_text().splitlines()]


def formats(net: Model) -> dict[str, Any]:
    return {name: [encode(fmt) for fmt in chain] for name, chain in net.formats.items()}


class TestSteps:
    def test_are_computed_once(self, store: Store, calls: Calls) -> None:
        first = run(store).apply(INT8)
        assert calls == ["fold", "quantize"]
        again = run(store).apply(INT8)
        assert calls == ["fold", "quantize"]
        assert journal(store) == ["steps", "steps"]
        assert again.key == first.key
        assert again.edits == first.edits
        assert formats(again) == formats(first)
        one, two = first.module.state_dict(), again.module.state_dict()
        assert list(one) == list(two)
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())

    def test_from_the_store_keep_tied_weights_tied(self, store: Store) -> None:
        run(store).apply(INT8)
        again = run(store).apply(INT8)
        assert again.module.second.weight is again.module.first.weight
        assert again.module.first.weight is not model("shared").module.first.weight

    def test_a_shared_beginning_is_not_computed_again(self, store: Store, calls: Calls) -> None:
        run(store).apply(INT8)
        other = Recipe.parse("version: 1\nsteps:\n  - fold: {}\n  - quantize: {activations: none}\n")
        run(store).apply(other)
        assert calls == ["fold", "quantize", "quantize"]

    def test_a_kill_between_two_steps_costs_the_second_only(self, store: Store, calls: Calls) -> None:
        class Killed(BaseException):
            pass

        first = run(store)
        put = store.put

        def dies(kind: str, key: str, write: Callable[[Path], None]) -> Path:
            if calls[-1:] == ["quantize"]:
                raise Killed
            return put(kind, key, write)

        store.put = dies  # type: ignore[method-assign]
        with pytest.raises(Killed):
            first.apply(INT8)
        store.put = put  # type: ignore[method-assign]
        resumed = run(store).apply(INT8)
        assert calls == ["fold", "quantize", "quantize"]
        fresh = run(Store(store.folder.with_name("fresh"))).apply(INT8)
        assert formats(resumed) == formats(fresh)
        assert resumed.key == fresh.key

    def test_do_not_depend_on_what_ran_before(self, store: Store, tmp_path: Path) -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        one = run(store).apply(INT8)
        torch.manual_seed(2)
        np.random.seed(2)
        two = run(Store(tmp_path / "other")).apply(INT8)
        assert formats(one) == formats(two)

    def test_tell_how_long_they_trained(self, store: Store) -> None:
        recipe = "version: 1\nsteps: [fold: {}, finetune: {steps: 2, batch_size: 8, teacher: original}]\n"
        one, again = run(store, "residual"), run(store, "residual")
        one.apply(Recipe(Recipe.parse(recipe).steps[:1]))
        assert one.training_s == 0
        one.apply(Recipe.parse(recipe))
        assert one.training_s > 0
        again.apply(Recipe.parse(recipe))
        assert again.training_s == 0, "the store had it"

    def test_leave_the_original_alone(self, store: Store) -> None:
        before = {name: tensor.clone() for name, tensor in model("shared").module.state_dict().items()}
        run(store).apply(INT8)
        after = model("shared").module.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_no_steps_are_the_original(self, store: Store) -> None:
        assert run(store).apply(Recipe(())) is model("shared")

    def test_without_training_import_no_lightning(self, tmp_path: Path) -> None:
        steps = "[prune: {samples: 16}, fold: {}, finetune: {steps: 1}, quantize: {}, rounding: {}]"
        code = (
            "import sys\n"
            f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
            "from pathlib import Path\n"
            "from featherweight.engine.run import Run\n"
            "from featherweight.engine.store import Store\n"
            "from featherweight.recipe import Recipe\n"
            "from golden import data, model, target\n"
            f"recipe = Recipe.parse('version: 1\\nsteps: {steps}')\n"
            f"run = Run(model('residual'), data('residual'), target(), Store(Path({str(tmp_path)!r})))\n"
            "run.apply(Recipe(tuple(step for step in recipe.steps if step.method != 'finetune')))\n"
            "assert 'lightning_fabric' not in sys.modules\n"
            "run.apply(recipe)\n"
            "assert 'lightning_fabric' in sys.modules\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class TestKeys:
    """What a step is kept under."""

    @staticmethod
    def key(store: Store, method: Any, **changed: Any) -> str:
        made = run(store, **changed)
        return made._step_key(made.original, "m", method)

    def test_change_with_what_decides_the_result(self, store: Store) -> None:
        other = Data.of(x_train=inputs("shared", 8, 9))
        keys = [
            self.key(store, Quantize()),
            self.key(store, Quantize(samples=7)),
            self.key(store, Quantize(), seed=1),
            self.key(store, Quantize(), data=other),
            self.key(store, Quantize(), target=target(isa="armv8")),
            self.key(store, Quantize(), target=target("torch")),
            self.key(store, Quantize(), original=model("residual")),
            self.key(store, Fold()),
        ]
        assert len(set(keys)) == len(keys)

    def test_do_not_change_with_what_does_not(self, store: Store) -> None:
        assert self.key(store, Quantize()) == self.key(
            store, Quantize(), data=data("shared").evolve(batch_size=3)
        )
        other = Data.of(x_train=inputs("shared", 8, 9))
        assert self.key(store, Fold()) == self.key(store, Fold(), data=other)  # it reads no examples
        threads = Target("onnxruntime", target().isa, 4)
        assert self.key(store, Quantize()) == self.key(store, Quantize(), target=threads)

    def test_two_models_that_were_made_by_hand_do_not_share_steps(self, store: Store) -> None:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        examples = Data.of(x_train=x.numpy())
        found = []
        for value in (1.0, 2.0):
            layer = nn.Linear(8, 4)
            nn.init.constant_(layer.weight, value)
            net = Model(layer.eval(), {"forward": Entry((x,), ("x",), ("y",), {"x": {0: "n"}})})
            done = run(store, original=net, data=examples).apply(
                Recipe.parse("version: 1\nsteps: [quantize: {}]")
            )
            found.append(done.module.weight[0, 0].item())  # type: ignore[index,union-attr,operator]
        assert found == [1.0, 2.0]


class TestArtifacts:
    def test_are_lowered_once(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        first = run(store)
        artifact = first.lower(first.apply(INT8))
        monkeypatch.setattr(type(first.runtime), "lower", None)
        again = run(store)
        kept = again.lower(again.apply(INT8))
        assert kept == artifact
        assert kept.sha256 == artifact.sha256
        assert journal(store) == ["steps", "steps", "artifacts"]
        assert "artifact.json" not in kept.files
        (y,) = again.runtime.open(kept, target())(inputs("shared", 2))
        assert y.shape == (2, 10)

    def test_say_what_they_cost(self, store: Store) -> None:
        made = run(store, "linear3d")
        details = made.lower(model("linear3d")).details
        assert details["params"] == sum(p.numel() for p in model("linear3d").module.parameters())
        assert details["macs"] == 9 * 12 * 24 + 9 * 24 * 24 + 24 * 10

    def test_of_another_target_are_others(self, store: Store) -> None:
        narrow = run(store, "linear3d", target=target(isa="avx2"))
        wide = run(store, "linear3d", target=target(isa="vnni"))
        step = Recipe.parse("version: 1\nsteps: [quantize: {}]")
        assert narrow.lower(narrow.apply(step)).sha256 != wide.lower(wide.apply(step)).sha256

    def test_without_the_runtime_are_told_and_leave_nothing(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = run(store)
        monkeypatch.setattr(type(made.runtime), "module", "not_installed_here")
        with pytest.raises(MissingRuntime):
            made.lower(model("shared"))
        assert not store.folder.exists()


class TestErrors:
    def test_name_the_step(self, store: Store) -> None:
        recipe = Recipe.parse("version: 1\nsteps:\n  - fold: {}\n  - quantize: {where: {exclude: ['*']}}\n")
        with pytest.raises(RecipeError, match="no layer to quantize") as told:
            run(store).apply(recipe)
        assert told.value.where == "step 2 (quantize)"
        assert journal(store) == ["steps"]

    def test_keep_a_nearer_place(self, store: Store) -> None:
        recipe = Recipe.parse("version: 1\nsteps: [quantize: {symmetric_weights: false}]")
        with pytest.raises(TargetError) as told:
            run(store, "linear3d").apply(recipe)
        assert told.value.where is not None
        assert "fc1.weight" in told.value.where

    def test_of_the_data_pass_through(self, store: Store) -> None:
        bad = inputs("linear3d", 8).copy()
        made = run(store, "linear3d", data=Data.of(x_train=bad))
        broken = made.original.copy_module()
        nn.init.constant_(broken.fc1.bias, float("nan"))  # type: ignore[union-attr,arg-type]
        with pytest.raises(DataError, match="NaN") as told:
            made.step(made.original.evolve(module=broken, key="broken"), Quantize())
        assert told.value.where == "step 1 (quantize)"


class TestWritten:
    def test_models_are_json_and_safetensors_only(self, store: Store) -> None:
        run(store).apply(INT8)
        files = [path for path in store.folder.glob("steps/*/*") if path.is_file()]
        assert {path.name for path in files} == {"model.json", "weights.safetensors"}

    def test_every_kind_of_edit_comes_back(self, store: Store, tmp_path: Path) -> None:
        from featherweight.engine.run import _read_model

        net = model("depthwise")
        edits = (
            Remove("dropout"),
            SetAttr("stem.0", "padding_mode", "zeros"),
            SetAttr("stem.0", "bias", shape=(8,)),
            SetAttr("stem.1", "eps", 1e-4),
        )
        module = net.rebuild((), net.module.state_dict())
        for edit in edits:
            from featherweight.model import make_edit

            make_edit(module, edit)
        nn.init.normal_(module.get_parameter("stem.0.bias"))
        changed = net.evolve(module=module, edits=edits)
        write_model(tmp_path, changed)
        again = _read_model(tmp_path, net, "k")
        assert again.edits == edits
        assert again.key == "k"
        x = torch.from_numpy(inputs("depthwise", 2))
        with torch.no_grad():
            assert torch.equal(again.module(x), changed.module(x))


def test_supports_are_the_runtimes_answers_for_the_target() -> None:
    runtime = find_runtime("onnxruntime")
    asked = TargetSupports(runtime, target(isa="avx2"))
    fmt = weight_draft("int8", True, "per_channel", 32)
    assert fmt is not None
    assert asked.float_outputs == runtime.float_outputs
    assert asked("conv2d", fmt, None)
    assert asked("lstm", fmt, None) and not asked("softmax", fmt, None)
    assert asked.realise(fmt, "weight").headroom == 1  # type: ignore[attr-defined]


def test_the_context_is_what_the_run_was_given(store: Store) -> None:
    made = run(store, seed=7)
    context = made.context()
    assert context.seed == 7
    assert context.models == {"original": model("shared")}
    assert context.data is data("shared")
    assert context.target == target()
    assert context.scratch is made.scratch


class TestTheFloatModel:
    """What a step may hold formats against: the network as it reached the first format step."""

    @pytest.fixture
    def seen(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Model | None]]:
        """Each step that computed, and the float model in its context."""
        found: list[tuple[str, Model | None]] = []

        def watched(method: type[Method]) -> None:
            apply = method.apply

            def call(self: Any, reached: Model, context: Context) -> Model:
                found.append((type(self).__name__, context.models.get("float")))
                return apply(self, reached, context)

            monkeypatch.setattr(method, "apply", call)

        for method in (Fold, Quantize):
            watched(method)
        return found

    @pytest.mark.parametrize(
        ("steps", "first"),
        [
            ("[fold: {}, quantize: {samples: 16}]", 1),
            ("[quantize: {samples: 16}]", 0),
            ("[quantize: {activations: none, where: {exclude: [first]}}, quantize: {activations: none}]", 0),
            ("[fold: {}, quantize: {activations: none, where: {exclude: [head]}}, quantize: {}]", 1),
            ("[fold: {}]", None),
        ],
    )
    def test_is_what_reached_the_first_format_step(
        self, store: Store, seen: list[tuple[str, Model | None]], steps: str, first: int | None
    ) -> None:
        recipe = Recipe.parse(f"version: 1\nsteps: {steps}\n")
        made = run(store, "shared")
        prefix = made.original
        for number, method in enumerate(recipe.methods()):
            if number == first:
                break
            prefix = made.step(prefix, method, number + 1)
        seen.clear()
        again = Run(made.original, made.data, made.target, Store(store.folder.with_name("other")))
        again.apply(recipe)
        assert len(seen) == len(recipe.steps)
        for number, (_, base) in enumerate(seen):
            if first is None or number < first:
                assert base is None
            else:
                assert base is not None
                assert base.key == prefix.key
                assert not base.formats

    def test_is_there_for_a_step_behind_those_from_the_store(
        self, store: Store, seen: list[tuple[str, Model | None]]
    ) -> None:
        one = Recipe.parse("version: 1\nsteps: [fold: {}, quantize: {where: {exclude: [head]}}]")
        two = Recipe.parse(
            "version: 1\nsteps: [fold: {}, quantize: {where: {exclude: [head]}}, quantize: {}]"
        )
        folded = run(store).apply(Recipe.parse("version: 1\nsteps: [fold: {}]"))
        run(store).apply(one)
        seen.clear()
        run(store).apply(two)
        assert [name for name, _ in seen] == ["Quantize"]
        base = seen[0][1]
        assert base is not None
        assert base.key == folded.key
        assert not base.formats

    def test_of_other_chains_is_another(self, store: Store) -> None:
        made = run(store)
        folded = made.step(made.original, Fold())
        of_folded = made.step(folded, Quantize(samples=16))
        of_original = made.step(made.original, Quantize(samples=16))
        assert made.context(of_folded).models["float"].key == folded.key
        assert made.context(of_original).models["float"].key == made.original.key
        assert "float" not in made.context(folded).models

    def test_is_not_the_one_of_a_shorter_chain(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same network once goes to quantize at once, and once through a values step before."""
        made = run(store)
        made.step(made.original, Quantize(samples=16))
        monkeypatch.setattr(Fold, "kind", "values")
        changed = made.step(made.original, Fold())
        quantized = made.step(changed, Quantize(samples=16))
        assert made.context(quantized).models["float"].key == changed.key

    @pytest.mark.parametrize("how", ["nearest", "gptq", "adaround"])
    def test_training_under_formats_is_not_undone(self, store: Store, how: str) -> None:
        recipe = Recipe.parse(
            f"""
version: 1
steps:
  - fold: {{}}
  - quantize: {{weights: int4, activations: none}}
  - finetune: {{steps: 10, batch_size: 16, learning_rate: 0.003, teacher: float}}
  - correct_bias: {{}}
  - rounding: {{how: {how}, correct_bias: false, iterations: 20}}
"""
        )
        made = run(store, "residual")
        reached = [made.original]
        for number, method in enumerate(recipe.methods(), 1):
            reached.append(made.step(reached[-1], method, number))
        _, folded, quantized, trained, _, rounded = reached
        for name in quantized.formats:
            assert not torch.equal(trained.parameters[name], quantized.parameters[name])
            assert torch.allclose(rounded.parameters[name], trained.parameters[name], atol=1e-6)
        assert made.context(rounded).models["float"].key == folded.key  # a teacher, and what reports show
        stored = run(store, "residual")
        assert stored.apply(Recipe(recipe.steps[:4])).key == reached[4].key
        others = Run(made.original, made.data, made.target, Store(store.folder.with_name("other")))
        again = others.apply(recipe).parameters
        last = stored.step(reached[4], recipe.methods()[-1].model_copy(update={"samples": 127}), 5).parameters
        for name in quantized.formats:
            assert torch.equal(again[name], rounded.parameters[name])
            assert torch.allclose(last[name], trained.parameters[name], atol=1e-6)


class TestTheMemory:
    """What methods found out about a model."""

    def test_is_asked_before_anything_is_computed_again(self, store: Store) -> None:
        calls: list[int] = []

        def compute() -> Json:
            calls.append(1)
            return {"sensitivity": [1.5, None]}

        for _ in range(2):
            made = run(store)
            memo = made.context(made.original).memo
            assert memo("table", {"samples": 4}, compute) == {"sensitivity": [1.5, None]}
        assert len(calls) == 1
        made.context(made.original).memo("table", {"samples": 5}, compute)
        made.context(made.step(made.original, Fold())).memo("table", {"samples": 4}, compute)
        run(store, seed=1).context(made.original).memo("table", {"samples": 4}, compute)
        assert len(calls) == 4

    def test_holds_nothing_too(self, store: Store) -> None:
        made = run(store)
        assert made.context(made.original).memo("none", {}, lambda: None) is None
        assert made.context(made.original).memo("none", {}, lambda: 1) is None
