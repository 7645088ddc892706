"""What students of ``featherweight.nets`` cost on a target: counted, predicted, found by lowering them.

Parameters and multiply-accumulates are counted on shapes alone. What a file holds beside its int8 weights,
and the seconds of a call, are read from candidates that were lowered untrained, as int8 and for the target;
of those that were not yet they are predicted by the nonnegative least squares of all that were::

    bytes   = weights + a layers + b channels
    seconds = c MACs + d layers

What was found is kept in the store by target and spec.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight import nets
from featherweight.data import Data
from featherweight.engine.costs import example_call
from featherweight.engine.environment import describe_device
from featherweight.engine.measure import measure_latency, measure_memory
from featherweight.engine.run import Run
from featherweight.engine.store import Store, digest
from featherweight.engine.students import Task, build_student, module_of, task_of
from featherweight.engine.timing import Limits
from featherweight.errors import FeatherweightError
from featherweight.method import Silent
from featherweight.model import Model
from featherweight.recipe import Recipe, Step

_WIDTHS = (0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)
_DEPTHS = (1.0, 0.5, 0.25)
_NARROWER = 0.4  # of a family's narrowest usual width
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_BRIEF = Limits(seconds=1.0, least_seconds=0.1, throughput_s=0.0, memory_repeats=1)
_PLAIN: dict[str, Any] = {"range": "minmax", "weight_range": "minmax", "samples": 2}  # values do not matter


@dataclass(frozen=True)
class Counted:
    """A candidate, as far as its shapes tell.

    Attributes:
        spec: As ``--student`` takes it.
        paper: Candidates of one paper are variants of each other.
        params: Its parameters.
        weights: Those of kernels and matrices: bytes of them in int8.
        macs: Multiply-accumulates for one example.
        layers: Convolutions and linear layers.
        channels: Sum of what these make.
    """

    spec: str
    paper: str
    params: int
    weights: int
    macs: int
    layers: int
    channels: int

    @property
    def capacity(self) -> float:
        """By which candidates are ranked before any was trained: parameters, and layers to use them."""
        return float(self.params * self.layers)


@dataclass(frozen=True)
class Found:
    """What an untrained candidate costs, lowered as int8.

    Attributes:
        bytes: Of its artifact.
        latency_s: Of a call; None: it could not be measured.
        memory_bytes: Above the runtime's; None: nobody asked.
    """

    bytes: int
    latency_s: float | None = None
    memory_bytes: int | None = None


class Ladder:
    """Candidates of one family and depth, narrow ones first; what is asked for is counted.

    Args:
        family: Its name.
        depth: Multiplier of its blocks.
        widths: Multipliers of its channels, rising.
        task: What they are built for.
    """

    def __init__(self, family: str, depth: float, widths: Sequence[float], task: Task) -> None:
        self._specs = [
            f"{family}:width={width:g}" + ("" if depth == 1 else f",depth={depth:g}") for width in widths
        ]
        self._task = task
        self._counted: dict[int, Counted] = {}

    def __len__(self) -> int:
        return len(self._specs)

    def __getitem__(self, index: int) -> Counted:
        if index not in self._counted:
            self._counted[index] = count(self._specs[index], self._task)
        return self._counted[index]

    def widest(self, fits: Callable[[Counted], bool]) -> int:
        """Index of the widest that fits, where a wider one costs more; -1: not even the narrowest."""
        low, high = -1, len(self)
        while high - low > 1:
            middle = (low + high) // 2
            if fits(self[middle]):
                low = middle
            else:
                high = middle
        return low


class Table:
    """Costs of candidates on one run's target.

    Args:
        run: The original, the target and the store.
        memory: Whether memory is measured too.
    """

    def __init__(self, run: Run, *, memory: bool = False) -> None:
        self._run = run
        self._memory = memory
        self.task: Task = task_of(run.original)
        self.found: dict[str, Found] = {}
        self.failed: dict[str, str] = {}  # spec -> why it could not be lowered
        self._seen: list[Counted] = []

    @cached_property
    def ladders(self) -> list[Ladder]:
        """Candidates of each family and depth."""
        found = []
        for name in self.task.families:
            family = nets.FAMILIES[name]
            widths = tuple(one for one in _WIDTHS if one >= _NARROWER * min(family.widths))
            for depth in _DEPTHS if "depth" in family.settings else (1.0,):
                found.append(Ladder(name, depth, widths, self.task))
        return found

    def predicted(self, candidate: Counted) -> Found | None:
        """What a candidate will cost; None before any was lowered."""
        if not self._seen:
            return None
        rows = np.array([[one.layers, one.channels] for one in self._seen], float)
        beside = [self.found[one.spec].bytes - one.weights for one in self._seen]
        extra = _law(rows, beside) @ np.array([candidate.layers, candidate.channels], float)
        timed = [one for one in self._seen if self.found[one.spec].latency_s is not None]
        latency = None
        if timed:
            rows = np.array([[one.macs, one.layers] for one in timed], float)
            seconds = [self.found[one.spec].latency_s or 0.0 for one in timed]
            latency = float(_law(rows, seconds) @ np.array([candidate.macs, candidate.layers], float))
        return Found(round(candidate.weights + float(extra)), latency)

    def lower(self, candidate: Counted) -> Found | None:
        """What it costs, by lowering it untrained; None where the runtime does not take it."""
        if candidate.spec in self.found or candidate.spec in self.failed:
            return self.found.get(candidate.spec)
        run = self._run
        key = digest(
            "student", candidate.spec, asdict(self.task), run.target.to_json(), run.runtime.version(),
            run.sources, torch.__version__, describe_device(run.target).model_dump(mode="json"), self._memory,
        )  # fmt: skip
        known: dict[str, Any] | None = run.store.get_json("students", key)
        if known is None:
            try:
                known = asdict(self._measured(candidate.spec))
            except FeatherweightError as error:
                known = {"failed": error.what}
            run.store.put_json("students", key, known)
        if "failed" in known:
            self.failed[candidate.spec] = known["failed"]
            return None
        self.found[candidate.spec] = Found(**known)
        self._seen.append(candidate)
        return self.found[candidate.spec]

    def _measured(self, spec: str) -> Found:
        own = self._run
        network = _unsettled(build_student(spec, own.original, seed=own.seed), own.seed)
        entry = network.entries["forward"]
        examples = Data.of(x_train=entry.example_inputs[0].numpy())
        with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
            run = type(own)(
                network, examples, own.target, Store(Path(folder)), seed=own.seed, progress=Silent()
            )
            artifact = run.lower(run.apply(Recipe((Step("fold"), Step("quantize", _PLAIN)))))
            call, latency, memory = example_call(entry), None, None
            if not run.runtime.unmeasured:
                latency = measure_latency(artifact, None, run.target, call, limits=_BRIEF).artifact.median
                if self._memory:
                    memory = measure_memory(artifact, run.target, call, limits=_BRIEF).above_runtime
            return Found(artifact.bytes, latency, memory)


def count(spec: str, task: Task) -> Counted:
    """What the shapes of a candidate tell; nothing is computed."""
    family = nets.FAMILIES[spec.partition(":")[0]]
    with torch.device("meta"):
        module = module_of(spec, task, seed=0).eval()
        macs: list[int] = []

        def note(layer: nn.Module, _: Any, output: Tensor) -> None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            places = output.numel() // weight.shape[0]
            macs.append(places * weight.numel())

        layers = [layer for layer in module.modules() if isinstance(layer, _LAYERS)]
        for layer in layers:
            layer.register_forward_hook(note)
        with torch.no_grad():
            module(torch.empty(1, task.channels, *task.resolution))
    sizes = [value.numel() for value in module.parameters()]
    weights = sum(value.numel() for value in module.parameters() if value.dim() > 1)
    return Counted(
        spec,
        family.paper,
        sum(sizes),
        weights,
        sum(macs),
        len(layers),
        sum(layer.weight.shape[0] for layer in layers),
    )


def _unsettled(model: Model, seed: int) -> Model:
    """With biases and norms as training leaves them: a bias of zeros takes no room in a file."""
    module = model.copy_module()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            if value.dim() == 1:
                value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return model.evolve(module=module)


def _law(rows: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """Nonnegative coefficients of least squares; with one row the first feature alone explains it."""
    wanted = np.asarray(values, float)
    if len(rows) > 1:
        both, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
        if (both >= 0).all():
            return np.asarray(both)
    alone = [
        max(float(rows[:, i] @ wanted) / float(rows[:, i] @ rows[:, i]), 0.0) for i in range(rows.shape[1])
    ]
    errors = [float(np.square(rows[:, i] * one - wanted).sum()) for i, one in enumerate(alone)]
    best = 0 if len(rows) == 1 else int(np.argmin(errors))
    made = np.zeros(rows.shape[1])
    made[best] = alone[best]
    return made
