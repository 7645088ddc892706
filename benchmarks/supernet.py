"""One supernet for many budgets, beside networks that were trained for one (``make bench-nets``).

ResNet-20 on Fashion-MNIST is made elastic and trained once, for T minutes of one core: first random networks
of it, then those of its front and no others, all of them in each step. The subnets that the search finds are
measured through ONNX Runtime: accuracy on the 10,000 test images, latency in turn with the original's. Beside
them, with the same images, augmentation, rate and teacher:

- *alone*: networks of the front, from the same sorted start, trained by themselves for as many epochs; and
  what one more epoch, of its own, gives such a subnet of the supernet;
- *prune*: networks that are pruned and fine-tuned for T / 4 each, and the subnets that take no longer as
  measured; those are fine-tuned too, and the supernet has that much less, so both sides trained for T. (To
  find the front takes a minute more, which is in the supernet's seconds and not in T.)

How many updates a time buys is measured, by turns with updates of the original, so that other work on the
machine changes no row. Nothing is asserted; an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from common import RESULTS, Bar, Parts, Shown, finish, table, tell_load
from fine_tuned import AUGMENT, images, run_of
from interleaved import against_original
from networks import EXAMPLES

from featherweight import api
from featherweight.elastic import space_of_supernet
from featherweight.engine.store import digest
from featherweight.errors import RecipeError
from featherweight.method import Method, Silent
from featherweight.methods.finetune import Finetune
from featherweight.methods.supernet import Supernet
from featherweight.model import Model, make_edit
from featherweight.outcome import Budget
from featherweight.recipe import Recipe, Step
from featherweight.tools.costs import totals
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.elastic_space import space_channels

T = TypeVar("T")
Json = dict[str, Any]
NETWORK = "resnet20"
PRECISION: Literal["bf16-mixed"] = "bf16-mixed"  # of all that trains here, on both sides
_MINUTES = 60.0
_POINTS = 0.3  # that a subnet may be below the same one trained alone
_FRONT = 8
_SHORT = 8  # updates that are not timed
_PHASES = 4  # updates of a supernet differ, and so often they are alike
_EQUAL = 1.01  # times are as equal as this


@dataclass(frozen=True)
class Settings:
    """What the parts depend on.

    Attributes:
        minutes: T, of one core.
        tuned: Share of T that goes into fine-tuning the subnets of the four budgets.
        fronted: Share of T in which the networks of the front learn, and no others.
        front: So many networks.
        examples: Training images.
        amounts: Of the latency that costs of layers foretell, where subnets are taken.
        budgets: Likewise, where networks are pruned; subnets are as fast as those measured.
        narrow: Widths are multiples of it where those of the target's kernels leave too much.
        alone: Fractions of the multiply-accumulates; the networks of the front that are nearest to them are
            trained alone too.
        own: Epochs that those have of their own behind the supernet, in a row more.
        rate: Of learning, of the supernet and of what is trained alone.
        tuning: Of what is fine-tuned.
        widths: Of the space.
        timed: Updates that are timed, one more than a multiple of four.
        seconds: Of each timing of artifacts.
        evaluations: Subnets that the search looks at.
    """

    minutes: float = 25.0
    tuned: float = 0.66
    fronted: float = 0.29
    front: int = 9
    examples: int = 50_000
    amounts: tuple[float, ...] = (
        *(0.97, 0.94, 0.91, 0.88, 0.85, 0.81, 0.77, 0.72, 0.67, 0.64),
        *(0.61, 0.58, 0.55, 0.51, 0.48, 0.45, 0.42, 0.39, 0.36, 0.33),
    )
    budgets: tuple[float, ...] = (0.6, 0.5, 0.4, 0.3)
    narrow: int = 4
    alone: tuple[float, ...] = (0.5, 0.25)
    own: float = 1.0
    rate: float = 0.15
    tuning: float = 0.08
    widths: tuple[float, ...] = (0.5, 0.75, 1.0)
    timed: int = 33
    seconds: float = 60.0
    evaluations: int = 300


QUICK = Settings(
    minutes=0.5,
    examples=2000,
    amounts=(0.7, 0.4),
    budgets=(0.5,),
    alone=(0.5,),
    timed=5,
    seconds=5.0,
    evaluations=12,
)


class Stopwatch(Silent):
    """Progress that writes down when each update begins."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        for item in items:
            if description == "training":
                self.seen.append(time.process_time())
            yield item


def _plain(steps: int) -> Method:
    return Finetune(steps=steps, precision=PRECISION)


class Bench:
    """The rows, each from a recipe whose steps are in the store."""

    def __init__(self, settings: Settings, parts: Parts, work: Path, shown: Shown) -> None:
        torch.set_num_threads(1)
        self.settings, self.parts, self.work, self.shown = settings, parts, work, shown
        self.run = run_of(NETWORK, settings.examples, work / "store")
        self.run.progress = shown
        self.whole = totals(self.run.original)
        self.how: Json = {
            "teacher": "original",
            "alpha": 0.9,
            "temperature": 1.0,
            "augment": AUGMENT,
            "learning_rate": settings.rate,
            "precision": PRECISION,
        }

    # ---- recipes

    def supernet(self, epochs: float) -> Step:
        """The step that all subnets share."""
        return Step(
            "supernet", {"epochs": round(epochs, 4), "widths": list(self.settings.widths), **self.how}
        )

    def fronted(self, epochs: float) -> Step:
        """The step behind it, for the networks of the front."""
        how = {"epochs": round(epochs, 4), "front": self.settings.front, **self.how}
        how |= {"subnets": self.settings.front - 1, "evaluations": self.settings.evaluations}
        return Step("supernet", how)

    def subnet(self, unit: str, amount: float) -> Step:
        """The best subnet within an amount."""
        return Step("subnet", {unit: amount, "evaluations": self.settings.evaluations})

    def tuned(self, steps: int, rate: float) -> Step:
        """Fine-tuning for so many updates."""
        return Step("finetune", {"steps": steps, **self.how, "learning_rate": rate})

    def model(self, *steps: Step) -> Model:
        """What a recipe makes of the original."""
        return self.run.apply(Recipe(steps))

    # ---- how many updates a time buys

    def rate(self, name: str, method: Callable[[int], Method], model: Model) -> float:
        """Seconds of an update when nothing else runs: by turns with one of the original, which is known."""

        def compute() -> float:
            ratios = [
                self.update_s(method, model) / self.update_s(_plain, self.run.original) for _ in range(3)
            ]
            return float(np.median(ratios))

        seconds = float(self.parts.get(f"rate-{name}", compute)) * self.plain_rate()
        self.shown.note(f"{name}: {seconds:.3f} s an update")
        return seconds

    def plain_rate(self) -> float:
        """Seconds of an update of the original on labels, the least of some."""

        def compute() -> float:
            return min(self.update_s(_plain, self.run.original) for _ in range(5))

        return float(self.parts.get("rate-original", compute))

    def update_s(self, method: Callable[[int], Method], model: Model) -> float:
        """Seconds of this process's computing, after the first updates.

        The largest network runs in every fourth update, and a subnet is cut in one: medians of every fourth
        one, and of these the mean. How a network without some blocks is cut is found out once, beside it.
        """
        watch = Stopwatch()
        steps = _SHORT + self.settings.timed
        method(steps).apply(model, replace(self.run.context(model), progress=watch))
        lasted = np.diff(watch.seen[_SHORT:steps])
        return float(np.mean([np.median(lasted[phase::_PHASES]) for phase in range(_PHASES)]))

    @property
    def per_epoch(self) -> int:
        """Updates of an epoch."""
        return self.settings.examples // Supernet().batch_size

    def supernet_rate(self) -> float:
        """Of a step with the largest, the smallest and random networks."""

        def method(steps: int) -> Method:
            return Supernet.model_validate(self.supernet(steps / self.per_epoch).parameters)

        return self.rate("supernet", method, self.run.original)

    def fronted_rate(self, begun: Model) -> float:
        """Of a step with all networks of the front of a supernet."""

        def method(steps: int) -> Method:
            return Supernet.model_validate(self.fronted(steps / self.per_epoch).parameters)

        return self.rate("front", method, begun)

    def cutting(self) -> float:
        """Seconds to cut a random subnet of ResNet-20, of a depth that was seen before."""

        def compute() -> float:
            begun = self.model(Step("supernet", {**self.supernet(0).parameters, "epochs": 0}))
            space = space_of_supernet(begun)
            assert space is not None
            extractor = Extractor(begun, space, space_channels(begun, space))
            rng, times = np.random.default_rng(0), []
            for _ in range(3 * self.settings.timed):
                began = time.process_time()
                extractor.slices(extractor.extract(space.sample(rng)))
                times.append(time.process_time() - began)
            return float(np.median(times))

        return float(self.parts.get("cutting", compute))

    def updates(self, name: str, model: Model, seconds: float) -> int:
        """Of fine-tuning a network for so long."""

        def method(steps: int) -> Method:
            return Finetune.model_validate(self.tuned(steps, self.settings.tuning).parameters)

        return max(1, round(seconds / self.rate(name, method, model)))

    # ---- what is measured

    def row(self, model: Model, name: str) -> Json:
        """Accuracy, latency and size of a network's artifact."""
        artifact = self.run.lower(model)
        call = self.run.runtime.open(artifact, self.run.target)
        (rows,) = self.run.data.evolve(metric="accuracy").score(call).values()
        left = totals(model)
        return {
            "accuracy": 100 * float(np.mean(rows)),
            "macs": left["macs"] / self.whole["macs"],
            "params": left["params"] / self.whole["params"],
            "bytes": artifact.bytes,
            **self.timed(model, name),
        }

    def timed(self, model: Model, name: str, share: float = 1.0) -> Json:
        """Latency in turn with the original's, for a share of the usual time."""
        seen = against_original(self.run, model, share * self.settings.seconds, self.work / "timing" / name)
        return {"ratio": seen.ratio.median, "ci95": seen.ratio.ci95, "original_ms": 1000 * seen.original_s}

    def measured(self, name: str, *steps: Step) -> Json:
        """The row of a recipe."""
        row: Json = self.parts.get(name, lambda: self.row(self.model(*steps), name))
        self.shown.note(f"{name}: {row['accuracy']:.2f} % at {row['ratio']:.3f} of the latency")
        return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="half a minute of training, few rows")
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="of the supernet's side")
    parser.add_argument(
        "--until",
        choices=("peers", "supernet", "front", "all"),
        default="all",
        help="stop after it; peers: only what is pruned, beside a process that trains the supernet",
    )
    args = parser.parse_args()
    shown = Shown()
    tell_load(shown)
    settings = QUICK if args.quick else Settings(minutes=args.minutes)
    parts = Parts("supernet", asdict(settings), shown)
    work = RESULTS / "work" / ("supernet-quick" if args.quick else "supernet")
    bench = Bench(settings, parts, work, shown)
    rows = rows_of(bench, args.until)
    if args.until != "all":
        return
    print(f"\nFashion-MNIST, ResNet-20, {settings.minutes:g} minutes of one core, {settings.examples} images")
    print(table(HEADERS, [cells(row) for row in rows]))
    finish("supernet", rows, bars_of(rows, settings), asdict(settings), 1)
    parts.forget()


def rows_of(bench: Bench, until: str) -> list[Json]:
    """Everything, in the order in which it is needed."""
    settings = bench.settings
    seconds = 60 * settings.minutes
    if until == "peers":
        for budget in settings.budgets:
            bench.model(*_peer(bench, budget, seconds / len(settings.budgets)))  # measured when all is quiet
        return []
    tune = settings.tuned * seconds / len(settings.budgets)
    random = (1 - settings.tuned - settings.fronted) * seconds / bench.supernet_rate() / bench.per_epoch
    first = bench.supernet(random)
    took = bench.parts.get("random", lambda: _timed(bench, first))
    front_s = bench.fronted_rate(bench.model(first))
    fronted = settings.fronted * seconds / front_s / bench.per_epoch
    steps = first, bench.fronted(fronted)
    behind = bench.parts.get("supernet", lambda: _timed(bench, *steps))
    took = {name: value + behind[name] for name, value in took.items()}
    epochs = random + fronted
    took |= {"random_epochs": random, "front_epochs": fronted}
    bench.shown.note(f"supernet: {epochs:.2f} epochs in {took['cpu_s']:.0f} s of one core")
    if until == "supernet":
        return []
    speed = {"update_s": bench.supernet_rate(), "front_update_s": front_s}
    speed |= {"plain_update_s": bench.plain_rate(), "cut_s": bench.cutting()}
    rows = [{"table": "training", "what": "supernet", **took, **speed}]
    rows.append({"table": "front", "what": "supernet itself", **bench.measured("whole", *steps)})
    front: list[tuple[Step, Json]] = []
    for number, step in enumerate(_networks(bench, steps)):
        front.append(
            (step, {"what": "network of the front", **bench.measured(f"among-{number}", *steps, step)})
        )
    for amount in settings.amounts:
        step = bench.subnet("latency", amount)
        try:
            row = bench.measured(f"front-{amount:g}", *steps, step)
        except RecipeError as error:  # below the smallest one
            bench.shown.note(f"front-{amount:g}: {error.what}")
            continue
        front.append((step, {"what": "subnet", "asked": amount, **row}))
    rows += [{"table": "front", **row} for _, row in front]
    if until == "front":
        return rows
    for macs in settings.alone:
        rows += _alone(bench, macs, epochs, steps)
    for budget in settings.budgets:
        rows += _budget(bench, budget, tune, seconds / len(settings.budgets), steps, front)
    rows.append(bench.parts.get("second", partial(_second_fit, bench, steps)))
    return rows


def _timed(bench: Bench, *steps: Step) -> Json:
    """Seconds in which a recipe is trained."""
    began, wall = time.process_time(), time.monotonic()
    bench.model(*steps)
    return {"cpu_s": time.process_time() - began, "wall_s": time.monotonic() - wall}


def _networks(bench: Bench, steps: Sequence[Step]) -> list[Step]:
    """What takes each of the networks that learned in the end."""
    space = space_of_supernet(bench.model(*steps))
    assert space is not None
    found = []
    for one in space.among:
        taken: Json = {"widths": dict(one.widths), "depths": dict(one.depths)}
        found.append(Step("subnet", {key: value for key, value in taken.items() if value}))
    return found


def _nearest(bench: Bench, macs: float, steps: Sequence[Step]) -> Step:
    """Of these the one whose multiply-accumulates are nearest to a share of the original's."""

    def away(step: Step) -> float:
        return abs(float(np.log(totals(bench.model(*steps, step))["macs"] / bench.whole["macs"] / macs)))

    return min(_networks(bench, steps), key=away)


def _alone(bench: Bench, macs: float, epochs: float, steps: Sequence[Step]) -> list[Json]:
    """A network of the front as it is, and the same one, from the same start, alone for as many epochs."""
    name = f"{macs:g} of MACs"
    taken = _nearest(bench, macs, steps)
    as_it_is = bench.measured(f"alone-{macs:g}-subnet", *steps, taken)
    after = bench.tuned(round(bench.settings.own * bench.per_epoch), bench.settings.tuning)
    taught = bench.measured(f"alone-{macs:g}-after", *steps, taken, after)
    updates = round(epochs * bench.per_epoch)

    def by_itself() -> Json:
        supernet, chosen = bench.model(*steps), bench.model(*steps, taken)
        begun = bench.model(Step("supernet", {**steps[0].parameters, "epochs": 0}))
        module = begun.copy_module()
        edits = chosen.edits[len(supernet.edits) :]
        for edit in edits:  # the same cuts of the network as it was before it trained
            module = make_edit(module, edit)
        key = digest(begun.key, chosen.key)
        start = begun.evolve(module=module, edits=edits, key=key)
        tuned = bench.run.step(
            start, Finetune.model_validate(bench.tuned(updates, bench.settings.rate).parameters)
        )
        return bench.row(tuned, f"alone-{macs:g}-own")

    own = bench.parts.get(f"alone-{macs:g}-own", by_itself)
    return [
        {"table": "alone", "what": f"subnet, {name}", "asked": macs, "side": "ours", **as_it_is},
        {"table": "alone", "what": f"with its own epoch, {name}", "asked": macs, "side": "after", **taught},
        {"table": "alone", "what": f"trained alone, {name}", "asked": macs, "side": "alone", **own},
    ]


def _budget(
    bench: Bench,
    budget: float,
    tune: float,
    whole: float,
    trained: Sequence[Step],
    front: Sequence[tuple[Step, Json]],
) -> list[Json]:
    """What is pruned, and the largest of the measured subnets that is as fast, both fine-tuned."""
    steps = _peer(bench, budget, whole)
    if not steps:
        return []
    peer = bench.measured(f"peer-{budget:g}", *steps)
    taken = _as_fast(front, peer["ratio"])
    if taken is None:
        bench.shown.note(f"tuned-{budget:g}: no subnet is as fast")
        return []
    updates = bench.updates(f"tuned-{budget:g}", bench.model(*trained, taken), tune)
    ours = bench.measured(f"tuned-{budget:g}", *trained, taken, bench.tuned(updates, bench.settings.tuning))
    return [
        {"table": "budget", "what": "subnet, tuned", "asked": budget, "side": "ours", **ours},
        {"table": "budget", "what": "prune, finetune", "asked": budget, "side": "prune", **peer},
    ]


def _peer(bench: Bench, budget: float, seconds: float) -> tuple[Step, ...]:
    """Pruning to a budget and fine-tuning for so long; nothing where it cannot go so far."""
    hows: tuple[Json, ...] = ({}, {"round_to": bench.settings.narrow})
    for how in hows:
        prune = Step("prune", {"latency": budget, **how})
        try:
            pruned = bench.model(prune)
        except RecipeError as error:
            bench.shown.note(f"peer-{budget:g}: {error.what}")
            continue
        updates = bench.updates(f"peer-{budget:g}", pruned, seconds)
        return prune, bench.tuned(updates, bench.settings.tuning)
    return ()


def _as_fast(front: Sequence[tuple[Step, Json]], ratio: float) -> Step | None:
    """What takes the largest of the measured subnets whose latency is no longer."""
    fast = [(row["macs"], place) for place, (_, row) in enumerate(front) if row["ratio"] <= ratio * _EQUAL]
    return front[max(fast)[1]][0] if fast else None


def _second_fit(bench: Bench, trained: Sequence[Step]) -> Json:
    """``fit`` with one budget, then with another from the supernet that is cached."""
    os.environ["FEATHERWEIGHT_CACHE"] = str(bench.work / "store")
    subnet = {"latency": {"range": [0.15, 1.0]}, "evaluations": bench.settings.evaluations}
    steps: list[Json] = [*({"supernet": dict(step.parameters)} for step in trained), {"subnet": subnet}]
    recipe = Recipe.from_dict({"version": 1, "steps": steps})
    seen = {"table": "fit", "what": "fit, its seconds"}
    for name, drop in (("first", 0.02), ("second", 0.01)):
        began = time.monotonic()
        result = api.fit(
            f"{EXAMPLES / 'nets.py'}:{NETWORK}",
            images(bench.settings.examples),
            weights=str(EXAMPLES / f"{NETWORK}.safetensors"),
            out=bench.work / f"fit-{name}",
            budget=Budget(quality_drop=drop),
            prefer="latency",
            recipe=recipe,
            trials=4,
            tune=False,
            robustness=False,
            force=True,
        )
        seen |= {name: time.monotonic() - began, f"{name}_ratio": result.chosen.latency_ratio}
    return seen


HEADERS = ("what", "asked", "MACs", "params", "KB", "latency ratio", "95 %", "accuracy, %")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A line of the table."""
    if row["table"] in ("training", "fit"):
        words = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
        return [row["what"], words, "", "", "", "", "", ""]
    ends = row["ci95"]
    return [
        row["what"],
        f"{row['asked']:g}" if "asked" in row else "",
        f"{row['macs']:.3f}",
        f"{row['params']:.3f}",
        f"{row['bytes'] / 1000:.0f}",
        f"{row['ratio']:.3f}",
        "" if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]",
        f"{row['accuracy']:.2f}",
    ]


def pareto(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that no other one beats in latency and accuracy."""
    return [
        row
        for row in rows
        if not any(
            other is not row
            and other["ratio"] <= row["ratio"]
            and other["accuracy"] >= row["accuracy"]
            and (other["ratio"], other["accuracy"]) != (row["ratio"], row["accuracy"])
            for other in rows
        )
    ]


def bars_of(rows: Sequence[Json], settings: Settings) -> list[Bar]:
    """What the project promises."""
    took = settings.minutes
    bars = [Bar("supernet", f"trained in <= {_MINUTES:g} minutes", f"{took:g}", took <= _MINUTES)]
    front = pareto([row for row in rows if row["table"] == "front"])
    different = len({(row["ratio"], row["accuracy"]) for row in front})
    bars.append(Bar("supernet", f"a front of at least {_FRONT}", str(different), different >= _FRONT))
    for table_, side, other, most in (
        ("alone", "ours", "alone", _POINTS),
        ("budget", "ours", "prune", 0.0),
    ):
        mine = [row for row in rows if row["table"] == table_]
        for asked in dict.fromkeys(row["asked"] for row in mine):
            pair = {row["side"]: row for row in mine if row["asked"] == asked}
            lost = pair[other]["accuracy"] - pair[side]["accuracy"]
            words = f"at most {most:g} points below {other}" if most else f"not below {other} and finetune"
            bars.append(Bar(f"subnet at {asked:g} ({table_})", words, f"{-lost:+.2f}", lost <= most))
    return bars


if __name__ == "__main__":
    main()
