"""Subnet: the best network within an amount is taken out of a supernet; no training, seconds.

The supernet (``supernet``) holds networks of many widths, depths, kernels and input sizes. A search over
them (tools/subnet_search.py) finds which lose least for what they cost on the target; it runs once, and each
amount asked later is looked up. What is chosen is cut out as it was trained, and its batch norms get
statistics of their own (Cai et al. 2020, arXiv:1908.09791; Yu and Huang 2019, arXiv:1903.05134).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator

from featherweight.elastic import Subnet, mark, space_of_supernet
from featherweight.errors import RecipeError
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model, make_edit
from featherweight.recipe import Hole, Range
from featherweight.tools.batch_norms import reestimate
from featherweight.tools.batches import calibration_batches, entry_of
from featherweight.tools.elastic_cut import Extractor
from featherweight.tools.subnet_search import Seen, front, spread
from featherweight.tools.supernets import Held, held
from featherweight.tools.widths import Unit

_KEEP = 0.5  # of the multiply-accumulates, where nothing is asked
_UNITS: tuple[Unit, ...] = ("macs", "parameters", "bytes", "latency")
_WORDS: Mapping[Unit, str] = {
    "macs": "multiply-accumulates",
    "parameters": "parameters",
    "bytes": "bytes",
    "latency": "predicted latency",
}
_STARTS = 4  # amounts along the front that a search tries first
_CLOSE = 1e-9
Fraction = Annotated[float, Field(gt=0, le=1)]


class SubnetStep(Method, frozen=True, extra="forbid"):
    """Take the best network within an amount out of a supernet, or the one that is named.

    One of ``macs``, ``parameters``, ``bytes`` and ``latency`` is given, as a fraction of the supernet's; or
    the network itself by ``widths``, ``depths``, ``kernels`` and ``input``, where what is not named is whole.
    Without any, half of the multiply-accumulates go.

    Attributes:
        macs: Fraction of the multiply-accumulates to keep.
        parameters: Fraction of the parameters to keep.
        bytes: Fraction of the parameters' bytes to keep.
        latency: Fraction of the latency on the target to keep, by its measured costs of layers.
        widths: Channel group -> how many of its channels stay.
        depths: Stage -> how many of its blocks go.
        kernels: Path of a convolution -> its side length.
        input: Share of the pictures' side.
        evaluations: Networks that the search looks at.
        samples: Calibration examples: all for the batch-norm statistics of what is chosen, half to tell
            networks apart.
    """

    kind: ClassVar[Kind] = "structure"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    macs: Fraction | None = None
    parameters: Fraction | None = None
    bytes: Fraction | None = None
    latency: Fraction | None = None
    widths: dict[str, Annotated[int, Field(ge=1)]] | None = None
    depths: dict[str, Annotated[int, Field(ge=0)]] | None = None
    kernels: dict[str, Annotated[int, Field(ge=1)]] | None = None
    input: Fraction | None = None
    evaluations: Annotated[int, Field(ge=1)] = 200
    samples: Annotated[int, Field(ge=2)] = 512

    @model_validator(mode="after")
    def _one_amount(self) -> SubnetStep:
        given = [name for name in _UNITS if getattr(self, name) is not None]
        if len(given) > 1 or (given and self._named is not None):
            said = [
                *given,
                *([] if self._named is None else ["a network by its widths, depths, kernels or input"]),
            ]
            raise ValueError(
                f"subnet takes one amount, and {' and '.join(said)} are given: leave out all but one"
            )
        return self

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        if space_of_supernet(model) is None:
            return {}
        net = cls()._net(model, context, "latency")
        if net.space.is_trivial:
            return {}
        unit: Unit = "latency" if "latency" in net.costs.units else "macs"
        least = math.ceil(1000 * net.share(net.space.smallest(), unit)) / 1000
        return {unit: Range(least, 1.0, default=max(_KEEP, least))} if least < 1 else {}

    @classmethod
    def starts(
        cls, model: Model, context: Context, given: Mapping[str, Any], holes: Mapping[str, Hole]
    ) -> Sequence[Mapping[str, Any]]:
        """Amounts along the front of loss and cost, evenly spread in the logarithm of the cost."""
        unit = next((unit for unit in _UNITS if unit in holes), None)
        if unit is None or space_of_supernet(model) is None:
            return ()
        method = cls.model_validate({name: value for name, value in given.items() if name not in _UNITS})
        net = method._net(model, context, unit)
        if net.space.is_trivial or unit not in net.costs.units:
            return ()
        whole = net.costs.of(net.space.largest())[unit]
        some = spread(front(method._seen(net, unit, context), unit), unit, _STARTS)
        shares = [one.costs[unit] / whole for one in some]
        found = dict.fromkeys(min(math.ceil(share * 1e4) / 1e4, 1.0) for share in shares)
        return [{unit: share} for share in found if holes[unit].admits(share)]

    def apply(self, model: Model, context: Context) -> Model:
        net = self._net(model, context, self._amount[0])
        if net.space.is_trivial:
            return self._nothing(model, context)
        if self._named is not None:
            subnet = self._named
            wrong = next(net.space.misfits(subnet), None)
            if wrong is not None:
                raise RecipeError(
                    f"the supernet holds no such subnet: {wrong}", fix="take a number that it has"
                )
        else:
            subnet = self._best(net, context)
        made = Extractor(model, net.space, net.channels).extract(subnet)  # a new one, so that all is proven
        batches = calibration_batches(context, self.samples, "subnet")
        entry = entry_of(model, batches)
        tracked = context.progress.track(batches, "batch-norm statistics", len(batches))
        edit = mark(None)
        module = make_edit(made.module, edit)
        with torch.no_grad():
            for name, value in reestimate(made, tracked, self.where.selects, entry).items():
                module.get_buffer(name).copy_(value)
        return made.evolve(module=module, edits=(edit,))

    def _nothing(self, model: Model, context: Context) -> Model:
        """Nothing can go: an error where something was asked for."""
        what = "nothing of the supernet may be cut"
        if self._named is not None or self._amount[1] is not None:
            raise RecipeError(what, fix="check where, and what supernet made elastic")
        context.progress.note(f"warning: {what}")
        return model.evolve(module=model.copy_module())

    def _net(self, model: Model, context: Context, unit: Unit) -> Held:
        return held(model, context, self.where, unit)

    @property
    def _named(self) -> Subnet | None:
        """The network that was asked for by itself."""
        if all(one is None for one in (self.widths, self.depths, self.kernels, self.input)):
            return None
        share = 1.0 if self.input is None else self.input
        return Subnet(self.widths or {}, self.depths or {}, self.kernels or {}, share)

    @property
    def _amount(self) -> tuple[Unit, float | None]:
        """What is counted, and the fraction of it that stays; None: nothing was asked."""
        return next(
            ((unit, float(keep)) for unit in _UNITS if (keep := getattr(self, unit)) is not None),
            ("macs", None),
        )

    def _best(self, net: Held, context: Context) -> Subnet:
        """The network that loses least within the amount."""
        unit, asked = self._amount
        if unit not in net.costs.units:
            raise RecipeError(
                f"subnet cannot choose by latency: {context.target.runtime} does not tell what layers cost",
                fix="take a runtime that does (onnxruntime on this machine), or give macs",
            )
        keep = max(_KEEP, net.share(net.space.smallest(), unit)) if asked is None else asked
        limit = keep * net.costs.of(net.space.largest())[unit] * (1 + _CLOSE)
        smallest = net.space.smallest()
        least = net.costs.of(smallest)[unit]
        if least > limit:
            share = net.share(smallest, unit)
            raise RecipeError(
                f"the smallest subnet keeps {share:.3f} of the {_WORDS[unit]} ({_told(least, unit)}), and "
                f"{keep:.3f} is asked for",
                where=f"smallest subnet: {_named(smallest)}",
                fix=f"{unit}: {math.ceil(share * 1000) / 1000:g} or more, or let supernet hold smaller ones: "
                "widths, depth, kernels, inputs, round_to",
            )
        seen = self._seen(net, unit, context)
        within = [one for one in seen if one.costs[unit] <= limit]
        best = min(within, key=lambda one: one.loss, default=None)
        chosen = smallest if best is None else best.subnet
        share = net.share(chosen, unit)
        context.progress.note(
            f"of {len(seen)} subnets, the one that loses least within {keep:.3f} of the {_WORDS[unit]} "
            f"keeps {share:.3f}"
        )
        return chosen

    def _seen(self, net: Held, unit: Unit, context: Context) -> list[Seen]:
        return net.seen(unit, context, evaluations=self.evaluations, samples=self.samples)


PLUGIN = SubnetStep


def _told(cost: float, unit: Unit) -> str:
    return f"{1e3 * cost:.3g} ms" if unit == "latency" else f"{cost:,.0f} {unit}"


def _named(subnet: Subnet) -> str:
    """A subnet in a line."""
    widths = sorted(set(subnet.widths.values()))
    parts = (
        [f"widths {widths[0]} to {widths[-1]}" if len(widths) > 1 else f"widths {widths[0]}"]
        if widths
        else []
    )
    gone = sum(subnet.depths.values())
    parts += [f"{gone} blocks less"] if gone else []
    parts += [f"kernels of {min(subnet.kernels.values())}"] if subnet.kernels else []
    parts += [f"input {subnet.input:g}"] if subnet.input != 1 else []
    return ", ".join(parts)
