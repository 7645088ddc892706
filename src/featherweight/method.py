"""A method changes a model: ``apply(model, context) -> model``. An instance is one step of a recipe."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor

from featherweight.formats import TensorFormat
from featherweight.graph import Graph, Node
from featherweight.model import Model
from featherweight.recipe import Hole, Where
from featherweight.runtime import Json, Role, Target

if TYPE_CHECKING:
    from featherweight.data import Data

T = TypeVar("T")
Kind = Literal["structure", "format", "values"]
Need = Literal["calibration", "training"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]


class Supports(Protocol):
    """What the target's runtime can do, as methods may ask it."""

    @property
    def float_outputs(self) -> frozenset[str]:
        """Operators whose integer kernels can return float values."""
        ...

    @property
    def one_grid(self) -> frozenset[str]:
        """Operators whose integer inputs and output must share one scale and zero point."""
        ...

    @property
    def joined(self) -> frozenset[str]:
        """Operators that become part of the integer layer which alone makes one of their inputs."""
        ...

    def integers_pay(self, node: Node, graph: Graph) -> bool:
        """Whether a layer with weights is faster in integers than in float."""
        ...

    @property
    def fixed_ranges(self) -> Mapping[str, tuple[float, float]]:
        """Operator -> the only real range that its integer output can have."""
        ...

    @property
    def width_multiple(self) -> int:
        """Numbers of channels that are multiples of this waste no kernel's work."""
        ...

    def __call__(self, op: str, weight: TensorFormat | None, activation: TensorFormat | None) -> bool:
        """Whether the operator runs in these formats."""
        ...

    def realise(self, fmt: TensorFormat, role: Role) -> TensorFormat:
        """The grid that will be stored; TargetError where there is none."""
        ...


class Progress(Protocol):
    """Where long work says how far it is."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items while a bar with an ETA grows."""
        ...

    def note(self, message: str) -> None:
        """One line for the user, e.g. a warning."""
        ...


class Silent:
    """Progress that nobody watches."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        yield from items

    def note(self, message: str) -> None:
        return None


Scratch = Callable[[Tensor], Tensor]  # an equal tensor that lives where there is room for many


def in_memory(tensor: Tensor) -> Tensor:
    """The scratch memory of a context that has no other."""
    return tensor


class Memo(Protocol):
    """What methods found out about the step's model on its data, so that the same is not computed twice."""

    def __call__(self, name: str, parameters: Mapping[str, Json], compute: Callable[[], Json]) -> Json:
        """What was found under this name with these parameters, else what ``compute`` finds now."""
        ...


def forgetful(name: str, parameters: Mapping[str, Json], compute: Callable[[], Json]) -> Json:
    """The memory of a context that has none: everything is computed."""
    return compute()


class Costs(Protocol):
    """What the engine measured of the original on the target, once: the price of each layer."""

    def seconds(self, layer: str, integers: bool) -> float | None:
        """Seconds of one call of a layer in float or in integers; None where it was not measured."""
        ...

    def conversion(self, layer: str) -> float | None:
        """Seconds to turn what a float layer among integer ones reads and makes from one into the other."""
        ...

    def total(self, integers: bool) -> float | None:
        """Seconds of one call of the whole network in float, or in integers wherever those pay."""
        ...

    def scaled(self, layer: str, inputs: float, outputs: float, integers: bool) -> float | None:
        """Seconds of a call of a layer that keeps these fractions (0 to 1) of its channels; None: unknown."""
        ...


class Checkpoint(Protocol):
    """Where a long step keeps how far it is, so that running it again goes on from there; the engine's."""

    def load(self) -> dict[str, Any] | None:
        """What was saved last: tensors and JSON data in dictionaries and lists; None: nothing yet."""
        ...

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep a state instead of the one before; whole or not at all."""
        ...


class NoCheckpoint:
    """The checkpoint of a context that keeps nothing."""

    def load(self) -> dict[str, Any] | None:
        return None

    def save(self, state: Mapping[str, Any]) -> None:
        return None


@dataclass(frozen=True)
class Context:
    """What a step may use besides the model.

    Attributes:
        models: 'original', 'float' (the network as it reached the first format step; for steps that do not
            train, with the weights that training under formats gave it) and whatever else a recipe names
            (a teacher, tasks to merge).
        data: Calibration and training examples; the scored ones are not for methods.
        target: Where the artifact will run.
        supports: What the target's runtime can do.
        device: Where torch computes.
        seed: The only source of randomness.
        progress: Where long work says how far it is.
        scratch: Moves a tensor to where there is room for many, e.g. to a mapped file.
        costs: Measured prices of the layers; None where nothing was measured.
        memo: Remembers what was computed of this step's model before, as JSON data.
        checkpoint: Keeps how far a long step is.
        devices: Processes that train together.
        precision: Of training: 32, bf16-mixed or 16-mixed.
    """

    models: Mapping[str, Model]
    data: Data
    target: Target
    supports: Supports
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    scratch: Scratch = in_memory
    costs: Costs | None = None
    memo: Memo = forgetful
    checkpoint: Checkpoint = field(default_factory=NoCheckpoint)
    devices: int = 1
    precision: Precision = "32"

    def float_model(self, model: Model) -> Model:
        """The float network that a model with formats is held against."""
        return self.models.get("float", model)


class Method(BaseModel, frozen=True, extra="forbid"):
    """Base of every method; its fields are the parameters of a recipe's step.

    Attributes:
        kind: ``structure`` changes layers, ``format`` how tensors are stored, ``values`` their values.
            No structure step may follow a format step.
        needs: Which examples it cannot do without.
        where: Which layers it may touch.
    """

    kind: ClassVar[Kind]
    needs: ClassVar[frozenset[Need]] = frozenset()

    where: Where = Where()

    @property
    def targetless(self) -> bool:
        """Whether it gives the same for every target, so that one result serves several runtimes.

        Then it must ask nothing of ``context.target``, ``supports`` and ``costs``.
        """
        return False

    @abstractmethod
    def apply(self, model: Model, context: Context) -> Model:
        """The changed model; the input is untouched."""
        raise NotImplementedError

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        """Parameters that a search may vary on this model, with their choices or ranges."""
        return {}

    @classmethod
    def starts(
        cls, model: Model, context: Context, given: Mapping[str, Any], holes: Mapping[str, Hole]
    ) -> Sequence[Mapping[str, Any]]:
        """Values of holes that are worth trying first on this model, the best ones first.

        Args:
            model: What reaches the step.
            context: As in :meth:`apply`.
            given: The step's other parameters.
            holes: By address; those that a start leaves out take their defaults.
        """
        return ()

    def part(self, share: float) -> Method | None:
        """The same step with a share of its work, by which the whole is judged early; None: it is quick.

        Args:
            share: Of its iterations, between 0 and 1.
        """
        return None
