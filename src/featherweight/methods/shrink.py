"""Shrink: whole residual blocks go, kernels become smaller, costly activations cheap.

Channels that are cut leave a network as deep as it was, and kernels hardly notice a few channels less; whole
blocks take their time with them (He et al. 2016, arXiv:1603.05027: ``y = x + f(x)`` becomes ``y = x``). Which
blocks go is measured: each one is removed alone, statistics of batch norms are re-estimated, and the error of
the outputs on calibration data, without labels, is taken against the whole network's::

    importance_i = |y - y_i|^2 / |y|^2     or the mean of KL(softmax y || softmax y_i)

(greedy, re-measured after each; in the spirit of Veit et al. 2016, arXiv:1605.06431, and of ShortGPT, Men et
al. 2024, arXiv:2403.03853).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from featherweight.errors import RecipeError
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.recipe import Choice, Hole
from featherweight.tools.batch_norms import reestimate
from featherweight.tools.batches import calibration_batches
from featherweight.tools.costs import totals
from featherweight.tools.kernels import Kernel, cuttable_kernels, with_smaller_kernel
from featherweight.tools.output_error import Batches, Measure
from featherweight.tools.prices import Prices
from featherweight.tools.removal import removed
from featherweight.tools.replacements import CHEAP, COSTLY, activations, replaced
from featherweight.tools.residuals import ResidualBlock, residual_blocks
from featherweight.tools.resolution import with_smaller_input
from featherweight.tools.savings import Greedy, Saving, Taken, Unit, with_buffers

Share = Annotated[float, Field(gt=0, le=1)]
_AMOUNTS = ("blocks", "macs", "parameters", "latency")
_AUTO = {"Hardswish": "ReLU", "GELU": "ReLU", "SiLU": "ReLU", "Mish": "ReLU"}
_LARGEST = 31  # kernel that is looked at
_RIMS = {size: size - 2 for size in range(3, _LARGEST + 1)}
_PAYS = 0.02  # of the network's time that costly activations must take before they are replaced
_SHARES = (0.75, 0.5, 0.35, 0.25)  # of the multiply-accumulates: what a search tries
_NAMED = 4  # parts that a note names


class Shrink(Method, frozen=True, extra="forbid"):
    """Fewer blocks, smaller kernels, cheaper activations. Without any amount, the least important block goes.

    Attributes:
        blocks: How many residual blocks go.
        macs: Fraction of the multiply-accumulates to keep; blocks go and kernels shrink, what costs least.
        parameters: Fraction of the parameters to keep, likewise.
        latency: Fraction of the target's measured time to keep, likewise.
        kernels: Size -> smaller size of convolutions' kernels, e.g. ``{5: 3}``; all of them, or with a
            fraction to keep those that it takes. ``auto``: with a fraction, each may lose its rim.
        activations: Activation -> cheaper one, e.g. ``{Hardswish: ReLU}``; ``auto`` makes ReLU of them where
            they take a part of the target's measured time.
        input: Fraction of each side of the input pictures to keep; they are averaged down inside of the
            artifact, so callers give what they gave before.
        importance: What removing a part costs: ``error`` of the outputs, or ``kl`` of the classes.
        samples: Calibration examples that it is measured on.
    """

    kind: ClassVar[Kind] = "structure"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    blocks: Annotated[int, Field(ge=0)] | None = None
    macs: Share | None = None
    parameters: Share | None = None
    latency: Share | None = None
    kernels: dict[str, Annotated[int, Field(ge=1)]] | Literal["auto"] = "auto"
    activations: dict[str, str] | Literal["auto"] = Field(default_factory=dict)
    input: Share | None = None
    importance: Measure = "error"
    samples: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="before")
    @classmethod
    def _sizes_as_text(cls, data: object) -> object:
        """Recipes hold text as names: sizes may be given as numbers."""
        if isinstance(data, dict) and isinstance(data.get("kernels"), Mapping):
            return {**data, "kernels": {str(size): smaller for size, smaller in data["kernels"].items()}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Shrink:
        if len(given := [name for name in _AMOUNTS if getattr(self, name) is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} are two amounts: give one")
        named = {} if self.kernels == "auto" else self.kernels
        for size, smaller in named.items():
            if not size.isdigit() or int(size) <= smaller or (int(size) - smaller) % 2:
                raise ValueError(
                    f"a kernel of {size} cannot become one of {smaller}: give a smaller odd or even size"
                )
        for kind, cheap in {} if self.activations == "auto" else self.activations.items():
            if kind not in COSTLY or cheap not in CHEAP or kind == cheap:
                raise ValueError(
                    f"{kind} cannot become {cheap}: from {', '.join(COSTLY)} to {', '.join(CHEAP)}"
                )
        return self

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        found: dict[str, Hole] = {}
        least = _least_macs(model)
        shares = [share for share in _SHARES if share > least]
        if shares:
            found["macs"] = Choice(tuple(shares))
        if activations(model).layers:
            found["activations"] = Choice(({}, "auto"))
        return found

    def apply(self, model: Model, context: Context) -> Model:
        batches = calibration_batches(context, self.samples, "shrink")
        entry = "forward" if "forward" in model.entries else next(iter(model.entries))
        smaller = self.input is not None and self.input < 1
        made = with_smaller_input(model, self.input or 1.0) if smaller else model
        made = self._with_cheap_activations(made, context)
        amount = self._amount
        if amount is None or amount[0] == "parts":
            made = self._with_all_kernels(made, batches, entry)
        if amount is not None:
            made = self._without_parts(made, amount, batches, entry, context)
        return self._refreshed(made, batches, entry) if made.edits != model.edits else model.evolve()

    @property
    def _amount(self) -> tuple[Unit, float] | None:
        """What is counted, and how many parts go or which fraction stays; None: no parts go."""
        if self.blocks is not None:
            return "parts", self.blocks
        units: dict[Unit, float | None] = {
            "macs": self.macs,
            "parameters": self.parameters,
            "latency": self.latency,
        }
        for unit, share in units.items():
            if share is not None:
                return unit, share
        named = self.kernels and self.kernels != "auto"
        return None if named or self.activations or self.input else ("parts", 1)

    # ---- activations

    def _with_cheap_activations(self, model: Model, context: Context) -> Model:
        if not self.activations:
            return model
        wanted = _AUTO if self.activations == "auto" else self.activations
        seen = activations(model)
        layers = {
            path: wanted[kind]
            for path, kind in seen.layers.items()
            if kind in wanted and self._selects(model, path)
        }
        stay = [name for name, kind in seen.functions.items() if kind in wanted]
        if stay:
            context.progress.note(
                f"{len(stay)} activations are functions in the model's code and stay: {_some(stay)}"
            )
        if self.activations == "auto":
            layers = _paying(layers, context)
        elif not layers:
            raise RecipeError(
                f"the model has no layer {' or '.join(wanted)} that may be replaced",
                fix="use activations: auto, or widen where",
            )
        return replaced(model, layers) if layers else model

    # ---- kernels

    @property
    def _sizes(self) -> dict[int, int]:
        if self.kernels == "auto":
            return _RIMS
        return {int(size): smaller for size, smaller in self.kernels.items()}

    def _kernels(self, model: Model) -> list[Kernel]:
        return [one for one in cuttable_kernels(model, self._sizes) if self._selects(model, one.path)]

    def _with_all_kernels(self, model: Model, batches: Batches, entry: str) -> Model:
        if not self.kernels or self.kernels == "auto":
            return model
        found = self._kernels(model)
        if not found:
            raise RecipeError(
                f"no convolution has a kernel of {' or '.join(self.kernels)} that can be cut",
                fix="its padding must shrink with it; name the sizes that the model has, or widen where",
            )
        for kernel in found:
            model = with_smaller_kernel(model, kernel, batches, entry)
        return model

    # ---- blocks

    def _blocks(self, model: Model) -> list[ResidualBlock]:
        return [
            block
            for block in residual_blocks(model)
            if all(self._selects(model, path) for path in (block.path, *block.layers) if path)
        ]

    def _without_parts(
        self, model: Model, amount: tuple[Unit, float], batches: Batches, entry: str, context: Context
    ) -> Model:
        unit, share = amount
        prices = Prices.of(model, context) if unit == "latency" else None
        if unit == "latency" and prices is None:
            raise RecipeError(
                f"{context.target.runtime} tells no times of layers, so latency is no amount here",
                fix="give macs or parameters",
            )

        def offers(current: Model) -> list[Saving]:
            found = [_of_block(block, prices) for block in self._blocks(current)]
            if unit != "parts":
                found += [_of_kernel(one, batches, entry, prices) for one in self._kernels(current)]
            return found

        def track(parts: list[Saving]) -> Iterator[Saving]:
            return context.progress.track(parts, "measuring what each part is worth", len(parts))

        whole = {"parts": share, **_wholes(model, prices)}[unit]
        needed = share if unit == "parts" else whole * (1 - share)

        def refresh(changed: Model) -> Model:
            return self._refreshed(changed, batches, entry)

        greedy = Greedy(offers, refresh, batches, entry, self.importance, unit, track)
        made, taken = greedy.take(model, needed)
        for name, why in greedy.refused.items():
            context.progress.note(f"warning: {name} stays: {why}")
        saved = sum(one.saved for one in taken)
        if saved < needed * (1 - 1e-9):
            self._tell_too_little(unit, saved, whole, context)
        if taken:
            context.progress.note(_told(taken, self.importance))
        return made

    def _tell_too_little(self, unit: Unit, saved: float, whole: float, context: Context) -> None:
        if unit != "parts":
            raise RecipeError(
                f"{unit}: {getattr(self, unit):g} is out of reach: without all blocks that can go "
                f"{1 - saved / whole:.3g} stays",
                fix=f"{unit}: {math.ceil(100 * (1 - saved / whole)) / 100:g}, or prune as well",
            )
        if self.blocks is not None:
            raise RecipeError(
                f"{self.blocks} blocks shall go, but {saved:g} can",
                fix=f"blocks: {saved:g}; strided and projected blocks stay, and what where leaves out",
            )
        context.progress.note("warning: shrink found no residual block that can go and changed nothing")

    # ---- common

    def _selects(self, model: Model, path: str) -> bool:
        return self.where.selects(path, type(model.module.get_submodule(path)).__name__)

    def _refreshed(self, model: Model, batches: Batches, entry: str) -> Model:
        return with_buffers(model, reestimate(model, batches, self.where.selects, entry))


PLUGIN = Shrink


def _least_macs(model: Model) -> float:
    """The fraction of multiply-accumulates that stays when all blocks and rims of kernels are gone."""
    blocks = residual_blocks(model)
    gone = {path for block in blocks for path in block.layers}
    kernels = (one.macs for one in cuttable_kernels(model, _RIMS) if one.path not in gone)
    whole = max(totals(model)["macs"], 1)
    return 1 - (sum(block.macs for block in blocks) + sum(kernels)) / whole


def _wholes(model: Model, prices: Prices | None) -> dict[str, float]:
    told = totals(model)
    return {
        "macs": told["macs"],
        "parameters": told["params"],
        "latency": 0.0 if prices is None else prices.total,
    }


def _of_block(block: ResidualBlock, prices: Prices | None) -> Saving:
    seconds = 0.0 if prices is None else sum(map(prices.seconds, block.layers))
    name = block.path or f"{block.layers[0]} to {block.layers[-1]}"
    saved: dict[Unit, float] = {
        "parts": 1,
        "macs": block.macs,
        "parameters": block.params,
        "latency": seconds,
    }
    return Saving(name, saved, lambda model: removed(model, block))


def _of_kernel(kernel: Kernel, batches: Batches, entry: str, prices: Prices | None) -> Saving:
    size, smaller = ("x".join(map(str, sides)) for sides in (kernel.size, kernel.smaller))
    share = 1 - math.prod(kernel.smaller) / math.prod(kernel.size)
    seconds = 0.0 if prices is None else share * prices.seconds(kernel.path)
    saved: dict[Unit, float] = {"macs": kernel.macs, "parameters": kernel.params, "latency": seconds}
    return Saving(
        f"{kernel.path} from {size} to {smaller}",
        saved,
        lambda model: with_smaller_kernel(model, kernel, batches, entry),
    )


def _paying(layers: dict[str, str], context: Context) -> dict[str, str]:
    """The layers, if they take a part of the target's time that is worth the change; else none."""
    total = None if context.costs is None else context.costs.total(integers=False)
    if context.costs is None or not total:
        context.progress.note(
            f"activations: auto replaces none, since {context.target.runtime} tells no times of layers"
        )
        return {}
    spent = sum(context.costs.seconds(path, integers=False) or 0.0 for path in layers)
    verb = "are replaced" if spent >= _PAYS * total else "stay"
    context.progress.note(f"costly activations take {100 * spent / total:.2g} % of the time and {verb}")
    return layers if spent >= _PAYS * total else {}


def _told(taken: list[Taken], measure: Measure) -> str:
    names = ", ".join(f"{one.name} ({measure} {one.error:.2g})" for one in taken)
    return f"removed, with the error of the outputs from then on: {names}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
