"""A model and its data, loaded together and checked against each other."""

from __future__ import annotations

import io
import logging
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from featherweight.data import (
    ArraySource,
    Data,
    Examples,
    check_inputs,
    check_labels,
    load_data,
    random_data,
    resolve_metric,
)
from featherweight.engine.store import code_digest
from featherweight.engine.students import AUTO, build_student, names_family
from featherweight.errors import DataError, LoadError
from featherweight.exchange.key import root_key
from featherweight.exchange.load import InputSpec, InputsRefused, load_model
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.side_by_side import flat_outputs, side_by_side
from featherweight.tasks import tasks_data, tasks_in
from featherweight.tools.distill_check import check_alike

TaskNetworks = Mapping[str, Mapping[str, Any]]  # name -> model, weights, data, metric
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Sources:
    """What a run starts from.

    Attributes:
        model: The original.
        data: In the model's dtypes, with a metric.
        notes: Warnings for the user.
    """

    model: Model
    data: Data
    notes: tuple[str, ...]


def load_sources(
    model: str | TaskNetworks,
    *,
    weights: str | None = None,
    data: str | Data | None = None,
    inputs: Sequence[str] = (),
    metric: str | None = None,
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
) -> Sources:
    """Load both and see that they fit; without data, random inputs stand in (for a model with one entry).

    Args:
        model: See ``load_model``; or the networks of several tasks, see ``load_tasks``.
        weights: For a callable's module.
        data: See ``load_data``; or the data itself.
        inputs: ``[NAME=][DTYPE:]3x224x224`` each, where no data tells.
        metric: Name or ``path.py:callable``.
        image_size: For a folder of images.
        mean: For a folder of images.
        std: For a folder of images.
        seed: Of random inputs and random choices.
        allow_pickle: Load pickled modules, which runs their code.

    Raises:
        LoadError: The model or its weights.
        DataError: The data, or both together.
    """
    if not isinstance(model, str):
        return load_tasks(model, inputs=inputs, seed=seed, allow_pickle=allow_pickle)
    given: Data | None
    if isinstance(data, str):
        given = load_data(data, metric=metric, seed=seed, image_size=image_size, mean=mean, std=std)
    else:
        given = data if data is None or metric is None else data.evolve(metric=metric)
        if (image_size, mean, std) != (None, None, None):
            raise DataError("--image-size, --mean and --std are for a folder of images", fix="--data FOLDER")
    if given is not None:
        _check_same_inputs(given)
    original = load_original(
        model,
        weights=weights,
        inputs=inputs,
        example_inputs=None if given is None else given.example_inputs(),
        allow_pickle=allow_pickle,
    )
    if "forward" not in original.entries:
        if given is not None:
            raise several_entries(original, model, "data is for one")
        return Sources(original, Data(), ())
    entry = original.entries["forward"]
    shapes = [(tuple(value.shape[1:]), _dtype(value)) for value in entry.example_inputs]
    checked = random_data(shapes, seed) if given is None else check_inputs(given, shapes)
    if metric is not None and given is None:
        checked = checked.evolve(metric=metric)
    fitted = _with_metric(checked, _outputs(original, model))
    return Sources(original, fitted, (*original.origin.notes, *fitted.notes))


def load_tasks(
    networks: TaskNetworks, *, inputs: Sequence[str] = (), seed: int = 0, allow_pickle: bool = False
) -> Sources:
    """Networks of the same inputs, side by side, and the data of all their tasks.

    Args:
        networks: By the task's name: ``model``, and ``weights``, ``data`` and ``metric``, as ``load_sources``
            takes them. A task without data is compared with its own network, on the inputs of the others.
        inputs: Where no data tells.
        seed: Of random choices.
        allow_pickle: Load pickled modules, which runs their code.

    Raises:
        LoadError: A model cannot be read, inputs differ, or a name is none.
        DataError: The examples of two tasks differ.
    """
    known = next((one["data"] for one in networks.values() if one.get("data") is not None), None)
    loaded: dict[str, Sources] = {}
    for name, one in networks.items():
        given = one.get("data")
        fitting: dict[str, Any] = {"data": known if given is None else given, "metric": one.get("metric")}
        if given is None and known is not None:
            fitting["data"] = _inputs_alone(known, seed)
        try:
            loaded[name] = load_sources(
                str(one["model"]), weights=one.get("weights"), inputs=inputs, seed=seed,
                allow_pickle=allow_pickle, **fitting,
            )  # fmt: skip
        except InputsRefused as error:
            shapes = (
                " and ".join(str(source.shape) for source in _inputs_of(fitting["data"], seed)) or "random"
            )
            raise LoadError(
                f"inputs differ: the network of '{name}' does not take what the others take, examples of "
                f"shape {shapes}: {error.what}",
                fix="merge models that take the same inputs, prepared in the same way",
            ) from error
    models = {name: one.model for name, one in loaded.items()}
    original = side_by_side(models)
    outputs = {name: len(flat_outputs(one)) for name, one in models.items()}
    data = tasks_data({name: one.data for name, one in loaded.items()}, outputs)
    notes = [f"{name}: {note}" for name, one in models.items() for note in one.origin.notes]
    return Sources(original, data, (*notes, *data.notes))


def _inputs_alone(data: str | Data, seed: int) -> Data:
    """The inputs of a task's data, for a task that has no targets."""
    whole = load_data(data, seed=seed) if isinstance(data, str) else data
    return Data(
        scored=None if whole.scored is None else replace(whole.scored, targets=None),
        train=None if whole.train is None else replace(whole.train, targets=None),
        calibration=whole.calibration_examples,
        batch_size=whole.batch_size,
        origin=whole.origin,
    )


def _inputs_of(data: str | Data | None, seed: int) -> Sequence[ArraySource]:
    whole = load_data(data, seed=seed) if isinstance(data, str) else data
    known = None if whole is None else whole.train or whole.scored
    return () if known is None else known.inputs


def several_entries(model: Model, name: str, why: str) -> LoadError:
    """The refusal of what works on one entry only."""
    return LoadError(
        f"'{name}' is called in several ways ({', '.join(model.entries)}), and {why}",
        fix="without data inspect, apply and lower take it; fit takes a model with one entry",
    )


def load_original(
    model: str,
    *,
    weights: str | None = None,
    inputs: Sequence[str] = (),
    example_inputs: tuple[np.ndarray, ...] | None = None,
    allow_pickle: bool = False,
) -> Model:
    """The model alone, with all its entries; see ``load_sources``.

    Raises:
        LoadError: It cannot be read, or is not float32.
    """
    original = load_model(
        model,
        weights=weights,
        inputs=[InputSpec.parse(text) for text in inputs] or None,
        example_inputs=example_inputs,
        allow_pickle=allow_pickle,
    )
    _check_float32(original, model)
    return original


@dataclass(frozen=True)
class Given:
    """A second network, as the user named it.

    Attributes:
        model: See ``load_model``; None: there is none.
        weights: For a callable's module.
    """

    model: str | None = None
    weights: str | None = None

    @property
    def name(self) -> str:
        """What texts call it; '' where there is none."""
        if self.model is None:
            return ""
        if self.of_family:
            return self.model
        return Path(self.model.rpartition(":")[2] or self.model).stem

    @property
    def of_family(self) -> bool:
        """Whether it names a family of ``featherweight.nets``, or is to be chosen among them."""
        return self.model is not None and names_family(self.model)

    @property
    def auto(self) -> bool:
        """Whether it is to be chosen; see ``engine/student_choice.py``."""
        return self.model == AUTO

    @property
    def fresh(self) -> bool:
        """Whether it is built with weights that nobody trained."""
        return self.of_family and self.weights is None


NOTHING = Given()
Role = Literal["student", "teacher"]


def load_beside(
    given: Given, role: Role, original: Model, *, seed: int = 0, allow_pickle: bool = False
) -> Model | None:
    """A student, which steps start from instead of the original, or a teacher, from which they learn.

    A student's inputs and outputs take the original's names, so that its artifact can stand where the
    original's stood.

    Args:
        given: What the user named.
        role: What it is for.
        original: Whose inputs it takes and whose outputs it gives.
        seed: Of the weights of a student that a family names (``engine/students.py``).
        allow_pickle: Load pickled modules, which runs their code.

    Returns:
        None where none is named.

    Raises:
        LoadError: It cannot be read, takes other inputs, or is not float32.
        RecipeError: Its outputs differ in number, shape or type.
    """
    if given.model is None:
        if given.weights is not None:
            raise LoadError(
                f"--{role}-weights are there and no {role}", fix=f"--{role} path.py:callable beside it"
            )
        return None
    if "forward" not in original.entries:
        raise several_entries(original, "the original", f"a {role} is for one")
    if role == "student" and given.auto:
        raise LoadError(
            "--student auto is chosen by a budget and a time, which only fit has",
            fix="name a family: --student mobilenetv2:width=0.35",
        )
    entry = original.entries["forward"]
    if role == "student" and given.of_family:
        built = build_student(given.model, original, weights=given.weights, seed=seed)
        check_alike(original, built, role=f"the student '{given.model}'")
        return _named_as(built, entry)
    arrays = tuple(value.numpy() for value in entry.example_inputs)
    alike = f"give a {role} that takes what the original takes, and gives what it gives"
    try:
        loaded = load_original(
            given.model, weights=given.weights, example_inputs=arrays, allow_pickle=allow_pickle
        )
    except InputsRefused as error:
        raise LoadError(
            f"the {role} takes other inputs than the original: {error.what}", fix=alike
        ) from error
    check_alike(original, loaded, role=f"the {role} '{given.model}'")
    return _named_as(loaded, entry) if role == "student" else loaded


def _named_as(model: Model, wanted: Entry) -> Model:
    """The model with the names of another entry's inputs and outputs."""
    own = model.entries["forward"]
    axes = {
        new: own.dynamic_axes.get(old, {})
        for new, old in zip(wanted.input_names, own.input_names, strict=True)
    }
    entry = replace(own, input_names=wanted.input_names, output_names=wanted.output_names, dynamic_axes=axes)
    entries = {"forward": entry}
    return replace(model, entries=entries, key=root_key(model.module, entries, (model.key,)), traced={})


def check_examples_to_learn(data: Data) -> None:
    """Refuse a student that has nothing to learn from.

    Raises:
        DataError: There are neither training nor calibration examples.
    """
    if data.train is None and data.calibration_examples is None:
        raise DataError(
            "a student learns from examples, and the data has none to train on",
            fix="add x_train (y_train is optional beside a teacher), or x_calibration, to the data",
        )


def scoring_code(data: Data) -> str:
    """Digest of the user's files that score or train; '' without any. Edited, they must be run again."""
    metrics = [data.metric, *(task.metric for task in tasks_in(data))]
    functions: list[Any] = [getattr(metric, "function", None) for metric in metrics]
    functions += [data.decode, data.loss, data.augment]
    if type(data).score is not Data.score:
        functions.append(type(data).score)
    return code_digest(functions)


def _check_same_inputs(data: Data) -> None:
    """Refuse examples of several shapes: which of them the model takes is not known yet."""
    roles = {"x": data.scored, "x_train": data.train, "x_calibration": data.calibration_examples}
    known = {
        role: [source.shape for source in examples.inputs]
        for role, examples in roles.items()
        if isinstance(examples, Examples)
    }
    first = next(iter(known), "")
    for role, shapes in known.items():
        if shapes != known[first]:
            one, other = (" and ".join(str(shape) for shape in known[name]) for name in (role, first))
            raise DataError(
                f"an example of {role} has shape {one}, and one of {first} has {other}",
                fix="prepare both in the same way",
            )


def follow(model: Model) -> None:
    """See that torch.export can follow the model, which everything that changes or lowers it needs.

    Raises:
        LoadError: It cannot; ``where`` is the user's own line.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # torch.export logs and prints the graph that it could not follow
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            for entry in model.entries:
                trace(model, entry)
    except LoadError as error:
        error.where = error.where or _users_line(error.__cause__)
        raise
    finally:
        logging.disable(level)


def _users_line(cause: BaseException | None) -> str | None:
    """'file:line: source' of the innermost frame that is neither an installed package's nor ours."""
    if cause is None:
        return None
    paths = sysconfig.get_paths()
    others = [_PACKAGE, *(Path(paths[kind]) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))]
    for frame in reversed(traceback.extract_tb(cause.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(other) for other in others):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None


def _check_float32(model: Model, name: str) -> None:
    parameters = model.module.named_parameters()
    odd = {name: value.dtype for name, value in parameters if value.dtype != torch.float32}
    floats = {name: dtype for name, dtype in odd.items() if dtype.is_floating_point or dtype.is_complex}
    for parameter, dtype in floats.items():
        raise LoadError(
            f"'{parameter}' of '{name}' is {str(dtype).removeprefix('torch.')}; methods and runtimes start "
            "from float32",
            fix="return the module in float32: module.float()",
        )


def _dtype(value: torch.Tensor) -> np.dtype[Any]:
    return np.dtype(str(value.dtype).removeprefix("torch."))


def _outputs(model: Model, name: str) -> tuple[np.ndarray, ...]:
    """The original's flat outputs on its example inputs, one example more than those where the batch is open.

    Raises:
        LoadError: The network takes the size of its batch for a constant; it is measured with others.
        DataError: The outputs are not finite.
    """
    entry = model.entries["forward"]
    inputs = entry.example_inputs
    if all(0 in entry.dynamic_axes.get(input_, {}) for input_ in entry.input_names):
        inputs = tuple(torch.cat([value, value[:1]]) for value in inputs)
    count = len(inputs[0]) if inputs[0].dim() else 1
    try:
        with torch.no_grad():
            called = getattr(model.module, entry.method)(*entry.arguments(inputs))
    except Exception as error:  # a user's network may raise anything
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise _fixed_batch(name, f"{type(error).__name__}: {first}") from error
    outputs: list[torch.Tensor] = torch.utils._pytree.tree_leaves(called)
    rows = [len(output) for output in outputs if output.dim()]
    if count == 3 and 2 in rows:  # other numbers are told when they are scored
        raise _fixed_batch(name, "it gives 2 rows")
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise DataError(
            f"the outputs of '{name}' are NaN or infinite on the first examples",
            fix="check its weights, and whether the inputs are scaled as in training",
        )
    return tuple(output.numpy() for output in outputs)


def _fixed_batch(name: str, said: str) -> LoadError:
    return LoadError(
        f"'{name}' works on 2 examples and not on 3: {said}",
        fix="let forward take the batch from its input, e.g. x.flatten(1) or x.reshape(len(x), -1)",
    )


def _with_metric(data: Data, outputs: tuple[np.ndarray, ...]) -> Data:
    """The data with a metric that suits the outputs, and labels that suit their classes."""
    if not data.has_metric:
        data = data.evolve(metric=resolve_metric(data, outputs))
    if data.metric.classes and outputs[0].ndim >= 2:
        check_labels(data, outputs[0].shape[1])
    return data
