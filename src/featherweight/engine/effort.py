"""How much work the time allows: which ways are worth trying, and with how many examples and iterations.

Everything is counted in forward passes of one example, which are timed once on this machine. A level is taken
when the way that it stands for is predicted to be ready in half of the time, since what it makes is measured
too::

    quick     up to a minute, or a network that is large for the time: fold, quantize, correct_bias
    standard  fold, equalize, quantize, rounding by GPTQ, and by the reconstruction of blocks where the time
              is enough for some iterations; what does not pay is left out by measuring
    thorough  from 15 minutes on: more of these, and mixed precision
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from featherweight.data import Data
from featherweight.engine.environment import describe
from featherweight.engine.run import Run
from featherweight.engine.store import digest
from featherweight.engine.template import EARLY, HALVES, Amounts, Shape, early, shape_of, ways
from featherweight.examples import Examples
from featherweight.graph import trace
from featherweight.holes import Choice
from featherweight.model import Model
from featherweight.outcome import LEVELS, Budget, Effort, Level, Way
from featherweight.recipe import Recipe, Step
from featherweight.runtime import Target
from featherweight.tools.costs import node_macs
from featherweight.tools.layout import layout
from featherweight.tools.simulate import Replay
from featherweight.tools.simulated import Simulated

_FROM: Mapping[Level, float] = {"quick": 0.0, "standard": 61.0, "thorough": 900.0}  # seconds
_TRIALS: Mapping[Level, int] = {"quick": 4, "standard": 9, "thorough": 17}
_STANDS_FOR: Mapping[Level, str] = {"quick": "nearest", "standard": "gptq", "thorough": "blocks"}
_READY = 0.5  # share of the time in which the strongest way must be ready
_TIGHT = 0.25  # share of the time from which on a quicker way goes first, so that an answer stands early
_LATE_PASSES, _LATE_S = 450, 10.0  # forward passes, and seconds, by which an answer is to stand
_FEWEST, _MOST = 16, 256  # calibration examples
_LEAST = 50  # iterations of a block; fewer are not worth it
_LARGEST: Mapping[Level, int] = {"quick": 0, "standard": 500, "thorough": 5000}
_RECONSTRUCTION = 0.2  # share of the time that goes to the reconstruction of blocks
# Forward passes that a step costs for each calibration example (rounding: by GPTQ), and for each iteration;
# seen on EfficientNet-Lite0, whose layers are many and small.
_PASSES = {
    **{"equalize": 6.0, "quantize": 4.0, "correct_bias": 11.0, "rounding": 4.0, "mixed_precision": 12.0},
    **{"prune": 40.0, "shrink": 40.0, "factorize": 4.0, "subnet": 60.0},
}
_OF_WEIGHTS = {"rounding": 1.0, "mixed_precision": 1.0}  # how often all weights are rounded by GPTQ
_MACS_OF_WEIGHT = 1e5  # that rounding one weight takes as long as
_PASSES_OF_ITERATION = 40.0
_PASSES_OF_TRAINING = 4.0  # forward passes that training on one example takes, a teacher's included
_LESSONS, _MOST_LESSONS = 0.4, 100.0  # share of the time in which a student learns, and epochs at most
_LESSONS_OF_FRESH = 0.75  # the share of one whose weights nobody trained
_TRAINING = 0.08  # share of the time that one fine-tuning takes at first
_EPOCHS: Mapping[Level, float] = {"quick": 0.0, "standard": 3.0, "thorough": 10.0}
_FEWEST_SEEN = 2000  # examples that a fine-tuning sees; below, it is not worth it
_ELASTIC, _FEWEST_ELASTIC, _MOST_ELASTIC = 0.3, 3.0, 60.0  # share of the time of a supernet, and its epochs
_SANDWICH = 2.0  # epochs of an ordinary training that one of a supernet takes; 1.4 to 1.9 on ResNet-20
_LATENCIES = (0.75, 0.6)  # of the float network's, which mixed precision leaves to layers in float
_TIMED = 8  # examples of the timed pass
# Of the timed updates: seconds that a forward pass may take, examples, and how many there are.
_UPDATE_S, _FEWEST_TOGETHER, _TOGETHER, _UPDATES = 0.5, 8, 128, 4
_ADDS: Mapping[Level, str] = {
    "quick": "",
    "standard": "equalization, rounding by GPTQ and by the reconstruction of blocks, more settings and, with "
    "examples to train on, smaller networks",
    "thorough": "iterations of the reconstruction of blocks, mixed precision, more settings, smaller "
    "networks without training and, with examples, fine-tuned integers and zeros, and a supernet",
}


@dataclass(frozen=True)
class Took:
    """What a way took until its model was ready.

    Attributes:
        seconds: Measured.
        predicted_s: As it had been predicted.
    """

    seconds: float
    predicted_s: float


@dataclass(frozen=True)
class Plan:
    """What a search without a recipe tries.

    Attributes:
        level: How thorough.
        time_s: Seconds that there are.
        example_s: Seconds of a float forward pass of one example, in torch on this machine.
        ways: Name -> recipe whose holes are asked of the models, in the order in which they are tried.
        predicted_s: Name -> seconds until its model is ready.
        trials: Artifacts to measure.
        longer: What more time would add.
    """

    level: Level
    time_s: float
    example_s: float
    ways: Mapping[str, Recipe]
    predicted_s: Mapping[str, float]
    trials: int
    longer: str = ""

    def seconds(self, way: str, longest: Took | None = None) -> float:
        """Until a way's model is ready.

        Args:
            way: One of ``ways``.
            longest: What the longest one so far took. What that was beyond its prediction is taken to grow as
                the root of the work, since a part of it is the same for every model.
        """
        predicted = self.predicted_s[way]
        if longest is None:
            return predicted
        more = predicted / longest.predicted_s
        if longest.seconds <= longest.predicted_s or more <= 1:
            return longest.seconds * more
        return predicted + (longest.seconds - longest.predicted_s) * math.sqrt(more)

    def told(self, trials: Mapping[str, int], seconds: float) -> Effort:
        """The same for ``result.json``.

        Args:
            trials: Way -> trials of it.
            seconds: That the search took.
        """
        return Effort(
            level=self.level,
            time_s=self.time_s,
            seconds=seconds,
            example_s=self.example_s,
            longer=self.longer,
            ways=[
                Way(
                    name=name,
                    recipe=recipe.to_dict(),
                    predicted_s=self.predicted_s[name],
                    trials=trials.get(name, 0),
                )
                for name, recipe in self.ways.items()
            ],
        )


@dataclass(frozen=True)
class Pace:
    """What work costs here.

    Attributes:
        example_s: Seconds of a forward pass of one example.
        weights_s: Seconds of rounding all weights by GPTQ, whatever the examples.
        training: Examples that there are to train with, labelled or not.
        structure: Whether there are examples of the user's own, by which layers can be made smaller.
        student: Whether steps start from a student, who learns first.
        teacher: Whose outputs are learned.
        lesson: Parameters of a student's training that differ from those of other trainings; none: its
            weights were trained before.
        training_s: Seconds that training on an example takes without its teacher, measured; 0: it is counted
            in passes.
        teacher_s: Seconds in which the teacher, which is another network, says what it has to of an example.
        asked_again: Whether it is asked in every epoch, since examples are changed.
    """

    example_s: float
    weights_s: float
    training: int = 0
    structure: bool = False
    student: bool = False
    teacher: str = "original"
    lesson: Mapping[str, Any] = field(default_factory=dict)
    training_s: float = 0.0
    teacher_s: float = 0.0
    asked_again: bool = False

    @property
    def epoch_s(self) -> float:
        """Seconds in which every training example is seen once; 0 where there is none."""
        each = self.training_s or _PASSES_OF_TRAINING * self.example_s
        return (each + (self.teacher_s if self.asked_again else 0.0)) * self.training

    @property
    def asking_s(self) -> float:
        """Seconds in which the teacher is asked of every example once, where it remembers what it said."""
        return 0.0 if self.asked_again else self.teacher_s * self.training

    def training_of(self, epochs: float) -> float:
        """Seconds of so many epochs."""
        return epochs * self.epoch_s + min(epochs, 1.0) * self.asking_s

    def of(self, recipe: Recipe) -> float:
        """Seconds until a recipe's model is ready, predicted."""
        return sum(self._of_step(step) for step in recipe.steps)

    def _of_step(self, step: Step) -> float:
        if step.method == "finetune":
            return self.training_of(float(step.parameters["epochs"]))
        if step.method == "supernet":
            return self.training_of(_SANDWICH * float(step.parameters["epochs"]))
        if step.method not in _PASSES:
            return 0.0
        passes = _PASSES[step.method] * step.parameters.get("samples", _MOST)
        if step.parameters.get("how") == "blocks":
            passes += _PASSES_OF_ITERATION * step.parameters["iterations"]
        return float(passes * self.example_s + _OF_WEIGHTS.get(step.method, 0.0) * self.weights_s)

    def amounts(self, level: Level, time_s: float, limits: Mapping[str, Any]) -> Amounts:
        """How much of everything fits into the time."""
        return Amounts(
            samples=self.samples(level, time_s),
            iterations=self.iterations(level, time_s),
            limits=limits,
            epochs=self.epochs(level, time_s),
            structure=self.structure,
            lessons=self.lessons(time_s) if self.student else 0.0,
            lesson=self.lesson,
            teacher=self.teacher,
            elastic=self.elastic(level, time_s),
        )

    def elastic(self, level: Level, time_s: float) -> float:
        """Epochs of a supernet, in the share of the time that is its; 0 where that is not worth it."""
        if level != "thorough" or not self.structure or not self.epoch_s:
            return 0.0
        count = min((_ELASTIC * time_s - self.asking_s) / (_SANDWICH * self.epoch_s), _MOST_ELASTIC)
        return round(count, 2) if count >= _FEWEST_ELASTIC else 0.0

    def lessons(self, time_s: float) -> float:
        """Epochs of a student, in the share of the time that is its; as few as one."""
        if not self.epoch_s:
            return 1.0
        share = _LESSONS_OF_FRESH if self.lesson else _LESSONS
        count = (share * time_s - self.asking_s) / self.epoch_s
        return round(min(max(count, 1.0), _MOST_LESSONS), 2)

    def epochs(self, level: Level, time_s: float) -> float:
        """Of a fine-tuning, in the share of the time that is its; 0 where that is not worth it."""
        if not self.epoch_s:
            return 0.0
        count = min(_TRAINING * time_s / (self.epoch_s + self.asking_s), _EPOCHS[level])
        return round(count, 2) if count * self.training >= min(_FEWEST_SEEN, 3 * self.training) else 0.0

    def samples(self, level: Level, time_s: float) -> int:
        """Calibration examples whose passes take a quarter of the time at most."""
        steps = ("quantize", "correct_bias") if level == "quick" else ("equalize", "quantize", "rounding")
        passes = sum(_PASSES[name] for name in steps)
        return int(min(max(_TIGHT * time_s / (passes * self.example_s), _FEWEST), _MOST))

    def iterations(self, level: Level, time_s: float) -> int:
        """Of each block, in the share of the time that is theirs; 0 where that is not worth it."""
        count = int(min(_RECONSTRUCTION * time_s / (_PASSES_OF_ITERATION * self.example_s), _LARGEST[level]))
        return count if count >= _LEAST else 0


def plan(
    run: Run,
    time_s: float,
    budget: Budget,
    trials: int | None = None,
    lesson: Mapping[str, Any] | None = None,
) -> Plan:
    """What to try in so many seconds.

    Args:
        run: The original, its data and its target.
        time_s: Seconds that there are.
        budget: What mixed precision has to keep.
        trials: Artifacts to measure; None: as many as suit the effort.
        lesson: How a student with fresh weights is trained; None: there is none.
    """
    limits: Mapping[str, Any] = {}
    if budget.bytes is not None:
        limits = {"bytes": budget.bytes}
    elif run.costs.known:
        limits = {"latency": Choice(_LATENCIES)}
    return planned(pace_of(run, lesson), shape_of(run.start), time_s, limits, trials)


def planned(
    pace: Pace,
    shape: Shape,
    time_s: float,
    limits: Mapping[str, Any] | None = None,
    trials: int | None = None,
) -> Plan:
    """The plan for a network of this pace and shape."""
    limits = limits or {}
    level: Level = [one for one in LEVELS if _fits(one, pace, shape, time_s)][-1]
    tried = ways(level, shape, pace.amounts(level, time_s, limits))
    predicted = {name: pace.of(recipe) for name, recipe in tried.items()}
    early_answer = 0
    if level != "quick" and not pace.student and _is_late(predicted[next(iter(tried))], pace):
        early_answer = 1
        tried = {EARLY: early(shape), **tried}
        predicted[EARLY] = pace.of(tried[EARLY])
    elif predicted[next(iter(tried))] > _TIGHT * time_s:  # the quickest of all
        quickest = min((name for name in predicted if name != HALVES), key=lambda name: predicted[name])
        tried = {quickest: tried[quickest], **tried}
    return Plan(
        level=level,
        time_s=time_s,
        example_s=pace.example_s,
        ways=tried,
        predicted_s=predicted,
        trials=_TRIALS[level] + early_answer if trials is None else trials,
        longer=_longer(level, pace, shape),
    )


def _is_late(seconds: float, pace: Pace) -> bool:
    """Whether somebody else's quantizer would be done long before: they see a few hundred examples once."""
    return seconds > max(_LATE_PASSES * pace.example_s, _LATE_S)


def _fits(level: Level, pace: Pace, shape: Shape, time_s: float) -> bool:
    """Whether the way that a level stands for is ready in time; something quick is always tried."""
    amounts = pace.amounts(level, time_s, {})
    recipe = ways(level, shape, amounts).get(_STANDS_FOR[level])
    learning = pace.training_of(amounts.lessons)  # which is done once, for all ways
    ready = recipe is not None and pace.of(recipe) - learning <= _READY * (time_s - learning)
    return level == "quick" or (ready and time_s >= _FROM[level])


def _longer(level: Level, pace: Pace, shape: Shape) -> str:
    """What the next level adds, and from which time on."""
    if level == LEVELS[-1]:
        return "a longer time adds iterations and trials"
    above = LEVELS[LEVELS.index(level) + 1]
    needed = _FROM[above]
    while not _fits(above, pace, shape, needed):
        needed *= 1.25
    return f"--time {math.ceil(needed / 60)}m or more adds {_ADDS[above]}"


def pace_of(run: Run, lesson: Mapping[str, Any] | None = None) -> Pace:
    """What work costs on this machine: passes are timed once and remembered.

    Args:
        run: The original, its data and what steps start from.
        lesson: How a student with fresh weights is trained; None: there is none.
    """
    master = run.teacher or run.original
    key = digest("pace", run.start.key, lesson and master.key, run.data.fingerprint, _machine(), run.sources)
    known = run.store.get_json("pace", key)
    if known is None:
        known = {"example_s": _example_seconds(run, run.start)}
        if lesson:
            known["training_s"] = _training_seconds(run, known["example_s"])
            known["teacher_s"] = _example_seconds(run, master)
        run.store.put_json("pace", key, known)
    example_s = max(known["example_s"], 1e-9)
    weights = macs = 0
    for entry in run.start.entries:
        graph = trace(run.start, entry)
        for node in graph:
            here = node_macs(graph, node)
            macs += here
            shapes = [graph.parameter_shapes[name] for name in node.parameters.values()] if here else []
            weights += sum(math.prod(shape) for shape in shapes)
    return Pace(
        example_s,
        weights_s=_MACS_OF_WEIGHT * weights * example_s / max(macs, 1),
        training=_training_examples(run.data),
        structure=run.data.calibration_source in ("calibration", "training"),
        student=run.student is not None,
        teacher="original" if run.teacher is None else "teacher",
        lesson=lesson or {},
        training_s=known.get("training_s", 0.0),
        teacher_s=known.get("teacher_s", 0.0),
        asked_again=run.data.augment is not None,
    )


def _training_examples(data: Data) -> int:
    """Examples to train with; those for calibration where there are no others: a teacher labels them."""
    examples = data.train or data.calibration_examples
    return len(examples) if isinstance(examples, Examples) else 0


def _machine() -> list[object]:
    here = describe(Target())
    return [here.cpu, here.cores, torch.__version__, torch.get_num_threads()]


def _training_seconds(run: Run, example_s: float) -> float:
    """Seconds of one example in an update of what steps start from: forward, backward, optimizer."""
    count = int(min(max(_UPDATE_S / max(example_s, 1e-9), _FEWEST_TOGETHER), _TOGETHER))
    arrays = [array for batch in run.data.calibration(count) for array in batch[:1]]
    inputs = (torch.from_numpy(np.concatenate(arrays)),)
    net = Simulated(run.start, "forward")
    ordered = layout(net, inputs)
    batch = tuple(ordered(one) for one in inputs)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9, nesterov=True)
    net.train()
    seen: list[float] = []
    while len(seen) < _UPDATES + 1:
        started = time.perf_counter()
        loss: Any = torch.stack([one.float().square().mean() for one in net(*batch)]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((time.perf_counter() - started) / len(batch[0]))
    return sum(seen[1:]) / _UPDATES  # the first one warms up


def _example_seconds(run: Run, model: Model) -> float:
    """Seconds of one example in a batch, the quicker of two passes."""
    replay = Replay(model, next(iter(model.entries)))
    seen: list[float] = []
    with torch.inference_mode():
        for arrays in islice(run.data.calibration(_TIMED), 1):
            batch = tuple(torch.from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays)
            for _ in range(2):
                started = time.perf_counter()
                replay(batch)
                seen.append((time.perf_counter() - started) / max(len(arrays[0]), 1))
    return min(seen, default=0.0)
