"""Factorize: linear layers and convolutions become products of smaller ones.

A linear layer of rank r takes r (inputs + outputs) multiply-accumulates instead of inputs x outputs::

    y = W x + b   ->   y = A (B x) + b,      A B = the product of rank r with the least output error

on calibration examples (weighted truncated SVD; SVD-LLM, Wang et al. 2024, arXiv:2403.07378;
tools/low_rank.py). Convolutions become two or three: a narrow one and a 1x1 (Zhang et al. 2016,
arXiv:1505.06798), a vertical and a horizontal one (Jaderberg et al. 2014, arXiv:1405.3866), or 1x1, narrow
and 1x1 (Tucker-2, Kim et al. 2016, arXiv:1511.06530). Ranks are chosen for all layers at once: of what keeps
within the budget, that with the largest product of kept energies (Zhang et al. 2016), as an integer program
(tools/assign.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from featherweight.errors import RecipeError
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model, Replace, make_edit
from featherweight.recipe import Hole, Range
from featherweight.tools.assign import Option, OutOfReachError, assign
from featherweight.tools.batches import calibration_batches
from featherweight.tools.costs import totals
from featherweight.tools.decompose import Examples, Solution, losses, solve
from featherweight.tools.factors import Candidate, candidates, fill, parts_of
from featherweight.tools.forms import Form, Way
from featherweight.tools.pace import Pace, fitted_pace

_NAMED = 4  # layers that a note names
_WIDE = 12  # ranks of a form with two stages that are tried
_LOST = 30.0  # the loss of a layer of which nothing is kept
_SOFT = 0.75  # of the MACs, without an amount

Amount = Annotated[float, Field(gt=0, lt=1)]
Forms = Mapping[str, Form]


class Factorize(Method, frozen=True, extra="forbid"):
    """Products of low rank instead of linear layers and convolutions, where that saves something.

    One of energy, rank, parameters, macs and latency says how far to go; without any, as near to three
    quarters of the MACs as ranks that pay allow.

    Attributes:
        energy: Share of each layer's output energy to keep at least.
        rank: Of every layer.
        parameters: Fraction of the network's parameters to keep.
        macs: Fraction of the network's multiply-accumulates to keep.
        latency: Fraction of the network's measured seconds to keep, as predicted from its layers' prices.
        by: ``activations``: the least error of the output on calibration examples; ``weights``: the plain
            truncated SVD.
        convolutions: Form of convolutions with more than one tap: ``channel`` (narrow, then 1x1), ``spatial``
            (vertical, then horizontal), ``tucker`` (1x1, narrow, 1x1), whichever loses least (``auto``), or
            ``none``.
        multiple: Ranks are multiples of this, as kernels like them; smaller ones are halves of it.
        faster: Whether forms must also be faster than their layer, as predicted from prices that are measured
            on the target; ``latency`` asks for it in any case.
        follow: Whether layers make up for what the layers before them lost.
        damping: Ridge of the inputs' second moments, as a share of their mean square.
        samples: Calibration examples to read.
    """

    kind: ClassVar[Kind] = "structure"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    energy: Amount | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    parameters: Amount | None = None
    macs: Amount | None = None
    latency: Amount | None = None
    by: Literal["activations", "weights"] = "activations"
    convolutions: Literal["auto", "channel", "spatial", "tucker", "none"] = "auto"
    multiple: Annotated[int, Field(ge=1)] = 8
    faster: bool = False
    follow: bool = True
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    samples: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="after")
    def _one_amount(self) -> Factorize:
        given = [name for name in _AMOUNTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how far to go: give one of them")
        return self

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        found, _ = candidates(model, lambda path, kind: True)
        return {"macs": Range(0.3, 0.9, default=0.7)} if found else {}

    def apply(self, model: Model, context: Context) -> Model:
        if model.formats:
            raise RecipeError("factorize cannot change a model with formats", fix="move it before them")
        found, refused = candidates(model, self.where.selects)
        found = [one for one in found if self._ways(one)]
        pace = self._pace(model, context)
        offered = self._offered(model, found, pace, context)
        found = [one for one in found if offered[one.path]]
        if not found:
            raise _nothing(refused)
        forms = self._chosen(model, found, offered, pace, context)
        if not forms:
            raise _nothing(refused)
        examples = self._examples(context)
        done = _factorized(model, forms, solve(model, forms, found, examples))
        self._tell(forms, found, refused, context)
        return done

    # ---- what there is to choose from

    def _ways(self, one: Candidate) -> tuple[Way, ...]:
        """The forms that a layer may take."""
        if len(one.ways) == 1 or self.convolutions == "auto":
            return one.ways
        asked: dict[str, Way] = {"channel": "product", "spatial": "spatial", "tucker": "tucker"}
        way = asked.get(self.convolutions)
        return (way,) if way in one.ways else ()

    def _pace(self, model: Model, context: Context) -> Pace | None:
        """Seconds of layers that are yet to be; None: nobody asks."""
        asked = "latency" if self.latency is not None else "faster" if self.faster else None
        if asked is None:
            return None
        known = context.models.get("original", model)
        pace = None if context.costs is None else fitted_pace(known, context.costs)
        if pace is None:
            raise RecipeError(
                f"{asked} of factorize needs seconds of layers, which {context.target.runtime} does not tell",
                fix="give macs: instead of latency:" if asked == "latency" else "leave faster: out",
            )
        return pace

    def _ranks(self, one: Candidate, way: Way) -> tuple[int, ...]:
        """Ranks to try of a form."""
        taps = math.prod(one.kernel)
        first = one.shape[1] * {"product": taps, "tucker": 1}.get(way, one.kernel[0] if one.kernel else 1)
        most = min(one.shape[0] * taps, first) if way == "spatial" else min(max(one.shape[0], 1), first)
        if way == "tucker":
            most = max(one.shape[:2])
        if self.rank is not None:
            return (self.rank,) if self.rank <= most else ()
        small = [self.multiple >> shift for shift in range(1, self.multiple.bit_length())]
        ranks = sorted({*small, *range(self.multiple, most + 1, self.multiple)} - {0})
        ranks = [rank for rank in ranks if rank <= most and _may_pay(one, way, rank)]
        if way == "product" or len(ranks) <= _WIDE:
            return tuple(ranks)
        picks = {0, *(round((len(ranks) - 1) ** (place / (_WIDE - 1))) for place in range(_WIDE))}
        return tuple(ranks[pick] for pick in sorted(picks))

    def _offered(
        self, model: Model, found: Sequence[Candidate], pace: Pace | None, context: Context
    ) -> dict[str, dict[Form, float]]:
        """Layer -> forms that pay -> the share of its output's energy that they lose."""
        asked = {one.path: {way: self._ranks(one, way) for way in self._ways(one)} for one in found}
        told: Any = {path: {way: list(ranks) for way, ranks in ways.items()} for path, ways in asked.items()}
        settings = {"asked": told, "by": self.by, "samples": self.samples, "damping": self.damping}

        def compute() -> Any:
            lost = losses(model, asked, found, self._examples(context))
            return {
                path: [[form.way, list(form.ranks), loss] for form, loss in forms.items()]
                for path, forms in lost.items()
            }

        known: Any = context.memo("factorize", settings, compute)
        by_path = {one.path: one for one in found}
        return {
            path: {
                form: loss
                for way, ranks, loss in forms
                if _pays(by_path[path], form := Form(way, tuple(ranks)), pace)
            }
            for path, forms in known.items()
        }

    def _examples(self, context: Context) -> Examples:
        batches = [] if self.by == "weights" else calibration_batches(context, self.samples, "factorize")
        return Examples(batches, self.damping, self.follow, context.seed, context.progress, context.scratch)

    # ---- choosing

    def _chosen(
        self,
        model: Model,
        found: Sequence[Candidate],
        offered: Mapping[str, Mapping[Form, float]],
        pace: Pace | None,
        context: Context,
    ) -> Forms:
        if self.rank is not None:
            return {
                one.path: min(forms, key=forms.__getitem__) for one in found if (forms := offered[one.path])
            }
        if self.energy is not None:
            return _by_energy(found, offered, 1 - self.energy)
        name = next((name for name in _BUDGETS if getattr(self, name) is not None), None)
        price = _price(name or "macs", pace)
        whole = _total(name or "macs", model, context)
        limit = whole * (getattr(self, name) if name else _SOFT)
        fixed = whole - sum(price(one, None) for one in found)
        items = [_options(one, offered[one.path], price) for one in found]
        least = sum(min(option.prices["price"] for _, option in options) for options in items)
        if fixed + least > limit:
            if name is not None:
                raise RecipeError(
                    f"factorize cannot keep {getattr(self, name):.0%} of the {name}: "
                    f"{(fixed + least) / whole:.1%} is the least that its layers leave",
                    fix=f"give {name} a larger fraction, or prune before",
                )
            limit = fixed + least
        try:
            (best,) = assign([[o for _, o in options] for options in items], {"price": limit - fixed})
        except OutOfReachError as error:
            raise RecipeError(f"factorize cannot keep so little of the {name}: {error}") from error
        picked = {
            one.path: options[at][0] for one, options, at in zip(found, items, best.chosen, strict=True)
        }
        return {path: form for path, form in picked.items() if form is not None}

    # ---- what is told

    @staticmethod
    def _tell(forms: Forms, found: Sequence[Candidate], refused: Mapping[str, str], context: Context) -> None:
        kept = [one.path for one in found if one.path not in forms]
        if kept:
            context.progress.note(f"factorize leaves whole what would lose too much: {_named(kept)}")
        for reason in dict.fromkeys(refused.values()):
            names = [path for path, other in refused.items() if other == reason]
            context.progress.note(f"factorize passes {_named(names)} by: {reason}")


PLUGIN = Factorize
_BUDGETS = ("parameters", "macs", "latency")
_AMOUNTS = ("energy", "rank", *_BUDGETS)


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_NAMED]) + (f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else "")


def _nothing(refused: Mapping[str, str]) -> RecipeError:
    why = "".join(f"; '{path}': {reason}" for path, reason in list(refused.items())[:2])
    return RecipeError(
        f"factorize found no layer that would be cheaper as a product{why}",
        fix="leave it out, or ask for less energy, a smaller rank or another where",
    )


def _pays(one: Candidate, form: Form, pace: Pace | None) -> bool:
    """Whether a form is smaller, takes fewer multiply-accumulates and, where that is known, less time."""
    whole, parts = one.work(), one.work(form)
    if parts.parameters >= whole.parameters or parts.macs >= whole.macs:
        return False
    return pace is None or pace.seconds(one, form) < pace.seconds(one, None)


def _may_pay(one: Candidate, way: Way, rank: int) -> bool:
    """Whether some form of this rank pays; of Tucker-2 beside the smallest other one."""
    forms = [Form(way, (rank, 1)), Form(way, (1, rank))] if way == "tucker" else [Form(way, (rank,))]
    return any(_pays(one, form, None) for form in forms)


def _by_energy(found: Sequence[Candidate], offered: Mapping[str, Mapping[Form, float]], lost: float) -> Forms:
    """The smallest form of each layer that keeps enough."""
    chosen: dict[str, Form] = {}
    for one in found:
        enough = [form for form, loss in offered[one.path].items() if loss <= lost]
        if enough:
            chosen[one.path] = min(enough, key=lambda form: (one.work(form).macs, one.work(form).parameters))
    return chosen


def _price(name: str, pace: Pace | None) -> Any:
    """What a layer takes of a budget, in a form or whole."""
    if name == "latency":
        assert pace is not None
        return pace.seconds
    return lambda one, form: float(getattr(one.work(form), name))


def _total(name: str, model: Model, context: Context) -> float:
    """What the network takes of a budget."""
    if name != "latency":
        return float(totals(model)["params" if name == "parameters" else name])
    assert context.costs is not None
    seconds = context.costs.total(False)
    assert seconds is not None
    return seconds


def _options(one: Candidate, forms: Mapping[Form, float], price: Any) -> list[tuple[Form | None, Option]]:
    """The whole layer, and those forms that lose less than each cheaper one."""
    found: list[tuple[Form | None, Option]] = [(None, Option(0.0, {"price": price(one, None)}))]
    best = math.inf
    for form in sorted(forms, key=lambda form: (price(one, form), forms[form])):
        if forms[form] < best:
            best = forms[form]
            loss = min(-math.log(max(1 - best, 0.0) or 1e-300), _LOST)
            found.append((form, Option(loss, {"price": price(one, form)})))
    return found


def _factorized(model: Model, forms: Forms, solutions: Mapping[str, Solution]) -> Model:
    module = model.copy_module()
    edits = []
    for path, form in forms.items():
        layer = module.get_submodule(path)
        frozen = not any(parameter.requires_grad for parameter in layer.parameters())
        edits.append(Replace(path, parts_of(layer, form)))
        make_edit(module, edits[-1])
        made = module.get_submodule(path)
        fill(made, form, solutions[path].factors, solutions[path].bias)
        made.requires_grad_(not frozen)
        made.to(next(layer.parameters()))
    return model.evolve(module=module, edits=tuple(edits))
