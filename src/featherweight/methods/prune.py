"""Prune: whole channels, heads, neurons and hidden units go; what is left is solved anew on unlabelled data.

Three acts, each on the groups of channels that belong together (tools/groups.py): the channels of every group
are ranked (tools/rankings.py), so many of each are chosen that little is lost for what is saved
(tools/selection.py), and they are cut out (tools/cutting.py). Then every layer that reads fewer channels is
solved by least squares so that it gives what it gave before (tools/reconstruction.py; He et al. 2017,
arXiv:1707.06168), so the statistics of batch norms hold on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field, model_validator
from torch import Tensor

from featherweight.errors import DataError, RecipeError
from featherweight.graph import Node
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.recipe import Choice, Hole, Range
from featherweight.tools.batch_norms import reestimate
from featherweight.tools.batches import calibration_batches, entry_of
from featherweight.tools.costs import totals
from featherweight.tools.cutting import cut
from featherweight.tools.excluded import free_channels, held_tensors
from featherweight.tools.groups import Channels, GroupKind
from featherweight.tools.rankings import DATA_FREE, Importance, Ranked, rank
from featherweight.tools.reconstruction import Settings, reconstruct
from featherweight.tools.selection import Limits, Ranking, Scope, below, select
from featherweight.tools.widths import Candidate, Unit, terms_of

_KEEP = 0.5  # of the multiply-accumulates, where nothing is asked
_MOST = 0.8  # of a group that goes while others can still give: what little is left is a narrow passage
_NAMED = 3  # reasons that are told
_CLOSE = 0.02  # what is foretold of a cost may be off by
_UNITS: tuple[Unit, ...] = ("macs", "parameters", "bytes", "latency")
_WORDS = {
    "channels": "channels",
    "macs": "multiply-accumulates",
    "parameters": "parameters",
    "bytes": "bytes",
    "latency": "predicted latency",
}
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Prune(Method, frozen=True, extra="forbid"):
    """Remove whole channels, heads and hidden units, and solve what is left anew. No labels are needed.

    One of ``ratio``, ``threshold``, ``macs``, ``parameters``, ``bytes`` and ``latency`` is given; without any
    half of the multiply-accumulates go, or as many as can.

    Attributes:
        importance: What a channel's worth is told by: the sizes of its weights (l1, l2), the scale of its
            norm (batch_norm), gradient times weight (taylor; with labels where there are), the size of what
            it carries (activation), or the error of the layers that read it once they are solved anew
            (reconstruction). ``auto``: reconstruction with calibration examples, l2 without.
        scope: Channels are ranked in one list over all groups (global), over groups of equal shape
            (isomorphic), or in each group (layer).
        ratio: Fraction of the channels to remove.
        threshold: Remove channels that score below this share of the mean score of their group.
        macs: Fraction of the multiply-accumulates to keep.
        parameters: Fraction of the parameters to keep.
        bytes: Fraction of the parameters' bytes to keep.
        latency: Fraction of the latency on the target to keep, by its measured costs of layers.
        kinds: What may go: channel, head, head_dim (a position in all heads), hidden (units of recurrent
            layers), group (of a grouped convolution).
        round_to: Widths are multiples of it, where a group is wide enough; None: what the target's kernels
            like.
        min_channels: So many stay in each group.
        max_ratio: Largest fraction of a group that may go; None: 0.8, or more where an amount needs it.
        reconstruct: Solve the layers that are left anew; ``norms``: only take batch-norm statistics anew;
            None: solve where there are calibration examples.
        samples: Calibration examples to read.
        ridge: How much solved weights are held where they were, as a share of what they read.
    """

    kind: ClassVar[Kind] = "structure"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    importance: Importance | Literal["auto"] = "auto"
    scope: Scope = "global"
    ratio: Fraction | None = None
    threshold: Annotated[float, Field(gt=0)] | None = None
    macs: Fraction | None = None
    parameters: Fraction | None = None
    bytes: Fraction | None = None
    latency: Fraction | None = None
    kinds: tuple[GroupKind, ...] = get_args(GroupKind)
    round_to: Annotated[int, Field(ge=1)] | None = None
    min_channels: Annotated[int, Field(ge=1)] = 1
    max_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    reconstruct: bool | Literal["norms"] | None = None
    samples: Annotated[int, Field(ge=1)] = 512
    ridge: Annotated[float, Field(gt=0)] = 1e-3

    @model_validator(mode="after")
    def _one_amount(self) -> Prune:
        given = [name for name in ("ratio", "threshold", *_UNITS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"prune takes one amount, and {' and '.join(given)} are given: leave out all but one"
            )
        return self

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        known = context.data.calibration_source in ("calibration", "training")
        found: dict[str, Hole] = {"macs": Range(0.2, 0.9, default=0.5)}
        found["importance"] = Choice(("reconstruction", "taylor", "l2") if known else ("l2", "l1"))
        found["scope"] = Choice(("global", "isomorphic", "layer"))
        return found

    def apply(self, model: Model, context: Context) -> Model:
        channels = free_channels(model, self.where, self.kinds)
        if not channels.groups:
            return self._nothing(model, channels, context)
        batches = self._batches(context)
        solve = self._solves(context)
        entry = entry_of(model, batches)
        candidate = self._candidate(model, channels, batches, context, entry)
        drop = {name: tuple(sorted(gone)) for name, gone in candidate.dropped.items() if gone}
        if not drop:
            return self._nothing(model, channels, context)
        done = cut(model, channels, drop)
        self._check(model, done, candidate, context)
        return self._solved(model, done, batches, entry, context) if solve else done

    # ---- what may go

    def _nothing(self, model: Model, channels: Channels, context: Context) -> Model:
        """Nothing can go: an error where something was asked for."""
        reasons = [f"'{layer}' is fixed: {why}" for layer, why in channels.fixed.items()][:_NAMED]
        what = "prune finds no channels that may go"
        if self._asked() and self.threshold is None:
            fix = "channels tied to an excluded layer stay: check where, kinds, round_to and min_channels"
            raise RecipeError(what, where="; ".join(reasons) or None, fix=fix)
        context.progress.note(f"warning: {'; '.join((what, *reasons))}")
        return model.evolve(module=model.copy_module())

    # ---- data

    def _importance(self, context: Context) -> Importance:
        if self.importance != "auto":
            return self.importance
        return "reconstruction" if _calibrated(context) else "l2"

    def _solves(self, context: Context) -> bool | Literal["norms"]:
        if self.reconstruct and not _calibrated(context):
            raise DataError(
                "prune found no calibration examples to reconstruct layers with",
                fix="give x_calibration or x_train, or reconstruct: false",
            )
        return _calibrated(context) if self.reconstruct is None else self.reconstruct

    def _batches(self, context: Context) -> list[tuple[Tensor, ...]]:
        if not self._solves(context) and self._importance(context) in DATA_FREE:
            return []
        return calibration_batches(context, self.samples, "prune") if _calibrated(context) else []

    # ---- how many go

    def _candidate(
        self,
        model: Model,
        channels: Channels,
        batches: Sequence[tuple[Tensor, ...]],
        context: Context,
        entry: str,
    ) -> Candidate:
        unit, keep = self._amount()
        terms = terms_of(model, channels, unit, context.costs if unit == "latency" else None)
        if not terms:
            raise RecipeError(
                f"prune cannot choose by latency: {context.target.runtime} tells nothing of what layers cost",
                fix="take a runtime that does (onnxruntime on this machine), or give macs",
            )
        ranked = self._ranked(model, channels, batches, context, entry)
        multiple = self.round_to or context.supports.width_multiple
        if self.threshold is not None:
            candidate = Candidate(model, channels, terms)
            limits = Limits(multiple, self.min_channels, self.max_ratio or 1.0)
            below(candidate, channels, ranked.rankings, self.threshold, limits)
            return candidate
        for most in (_MOST, 1.0) if self.max_ratio is None else (self.max_ratio,):
            candidate = Candidate(model, channels, terms)
            limits = Limits(multiple, self.min_channels, most)
            if select(
                candidate, channels, ranked.rankings, keep, limits, scope=self.scope, priced=ranked.priced
            ):
                return candidate
        self._short(candidate, unit, keep, context)
        return candidate

    def _ranked(
        self,
        model: Model,
        channels: Channels,
        batches: Sequence[tuple[Tensor, ...]],
        context: Context,
        entry: str,
    ) -> Ranked:
        """Which channels go first; what solving tells of it is remembered, since all amounts share it."""
        importance = self._importance(context)
        if importance != "reconstruction":
            return rank(model, channels, importance, batches, context, entry)
        settings: dict[str, Any] = {"groups": list(channels.groups), "samples": self.samples, "entry": entry}

        def compute() -> Any:
            found = rank(model, channels, importance, batches, context, entry).rankings
            return {name: [list(one.order), list(one.losses)] for name, one in found.items()}

        known: Any = context.memo("prune", settings, compute)
        rankings = {name: Ranking(tuple(order), tuple(losses)) for name, (order, losses) in known.items()}
        return Ranked(rankings, priced=True)

    def _amount(self) -> tuple[Unit, float]:
        """What is counted, and the fraction of it that stays."""
        if self.ratio is not None or self.threshold is not None:
            return "channels", 1 - (self.ratio or 0.0)
        for unit in _UNITS:
            keep = getattr(self, unit)
            if keep is not None:
                return unit, float(keep)
        return "macs", _KEEP

    def _short(self, candidate: Candidate, unit: Unit, keep: float, context: Context) -> None:
        """Say how far it goes; an error where so much was asked for."""
        least = candidate.cost / candidate.whole
        what = (
            f"prune can keep no less than {least:.3f} of the {_WORDS[unit]} here, and {keep:.3f} is asked for"
        )
        if self._asked():
            raise RecipeError(
                what,
                fix=f"ask for more than {least:.3f}, or let groups become narrower: round_to, min_channels, "
                "max_ratio, kinds, where",
            )
        context.progress.note(f"warning: {what}")

    def _asked(self) -> bool:
        return any(getattr(self, name) is not None for name in ("ratio", "threshold", *_UNITS))

    def _check(self, model: Model, done: Model, candidate: Candidate, context: Context) -> None:
        """Say it where the cut network costs another amount than was foretold."""
        unit, _ = self._amount()
        key = {"macs": "macs", "parameters": "params", "bytes": "bytes"}.get(unit)
        if key is None:
            return
        real, foretold = totals(done)[key] / totals(model)[key], candidate.cost / candidate.whole
        if abs(real - foretold) > _CLOSE * foretold:
            context.progress.note(
                f"warning: {foretold:.3f} of the {_WORDS[unit]} were to stay, and {real:.3f} do"
            )

    # ---- values

    def _solved(
        self,
        model: Model,
        done: Model,
        batches: Sequence[tuple[Tensor, ...]],
        entry: str,
        context: Context,
    ) -> Model:
        held = held_tensors(model, self.where)

        def selects(node: Node) -> bool:
            return not held & set(node.parameters.values())

        if self._solves(context) == "norms":
            tracked = context.progress.track(batches, "batch-norm statistics", len(batches))
            found = reestimate(done, tracked, self.where.selects, entry)
        else:
            found = reconstruct(
                done,
                model,
                batches,
                selects=selects,
                settings=Settings(ridge=self.ridge),
                seed=context.seed,
                entry=entry,
                progress=context.progress,
                scratch=context.scratch,
            )
        state: dict[str, Any] = dict(done.module.named_parameters()) | dict(done.module.named_buffers())
        with torch.no_grad():  # in place: the module is the cut's own, and its trace stays true
            for name, value in found.items():
                state[name].copy_(value)
        return done


PLUGIN = Prune


def _calibrated(context: Context) -> bool:
    return context.data.calibration_source in ("calibration", "training")
