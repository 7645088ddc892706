"""Cluster: weights share a few values, so that a code of a few bits tells each of them.

The values are k-means centroids, and each weight becomes the nearest::

    argmin_c  sum_i min_j (w_i - c_j)²

Weight sharing as in Deep Compression (Han et al. 2016, arXiv:1510.00149): of a layer, of a group of its
channels, or of several layers; with bits of each layer's own chosen as mixed_precision chooses integers
(tools/palette_bits.py). Weights stay float until they are stored: finetune trains the values by the
sum of what their members would be changed by, and codes follow the weights. No runtime here computes with
palettes: they shrink the download, once a file is packed, and neither memory nor latency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.formats import Palette
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.palette import MOST_COLORS
from featherweight.tools.kmeans import Init
from featherweight.tools.palette_bits import chosen_palettes
from featherweight.tools.palettes import (
    Fit,
    own_palette,
    root_mean_squares,
    shared_palettes,
    value_of,
    weights_to_share,
)

_OFFERED = (2, 3, 4, 5, 6, 8)  # bits, for auto
_NAMED = 3  # weights that a note names


class Cluster(Method, frozen=True, extra="forbid"):
    """Weights share a few values, found by k-means; biases and norms stay as they are. Fine-tune afterwards.

    Attributes:
        bits: Of a code: a palette has two to this power values; auto: of each layer its own, chosen by what
            the outputs lose.
        mean_bits: For auto: most stored bits of a weight in the mean, codebooks included.
        colors: Values of a palette, zero included, instead of what bits says.
        granularity: Who shares a palette: ``per_tensor``; ``per_group`` of channels; ``shared``: all layers
            that ``where`` selects.
        group: Channels that share a palette, for ``per_group``.
        scale: What weights are divided by before they share values: nothing (``none``), the root mean square
            of their tensor or channel; auto: per_tensor for shared palettes, else none. With a scale of each
            channel a tensor has that many times more values, and float files pack less small.
        init: Where k-means begins: linear, density, kmeans++, or optimal (the least squared error there is).
        iterations: Of Lloyd, at most.
        zero: ``keep``: zeros stay exactly zero, which is one of the values wherever there are some;
            ``free``: zeros are values like others.
        samples: Calibration examples to read, for auto.
    """

    kind: ClassVar[Kind] = "format"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    bits: Annotated[int, Field(ge=1, le=8)] | Literal["auto"] = 4
    mean_bits: Annotated[float, Field(gt=0, le=8)] = 4.0
    colors: Annotated[int, Field(ge=2, le=MOST_COLORS)] | None = None
    granularity: Literal["per_tensor", "per_group", "shared"] = "per_tensor"
    group: Annotated[int, Field(ge=1)] = 16
    scale: Literal["auto", "none", "per_tensor", "per_channel"] = "auto"
    init: Init = "optimal"
    iterations: Annotated[int, Field(ge=0)] = 50
    zero: Literal["keep", "free"] = "keep"
    samples: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="after")
    def _one_size(self) -> Cluster:
        if self.bits == "auto" and (self.colors is not None or self.granularity == "shared"):
            raise ValueError("bits: auto gives each layer values of its own: leave out colors and shared")
        return self

    def apply(self, model: Model, context: Context) -> Model:
        axes, taken = weights_to_share(model, self.where.selects)
        if not axes:
            raise self._nothing(taken)
        values = {name: value_of(model, name) for name in axes}
        self._check_zeros(model, values)
        layouts = {name: self._layout(value, axes[name]) for name, value in values.items()}
        fit = Fit(self.init, self.iterations, context.seed)
        if self.bits == "auto":
            offers = {bits: self._own(values, layouts, 2**bits, fit, context) for bits in _OFFERED}
            kept = self._worth(values, offers[_OFFERED[0]])
            offers = {bits: {name: own[name] for name in kept} for bits, own in offers.items()}
            found = chosen_palettes(model, offers, self.mean_bits, context, self.samples)
        elif self.granularity == "shared":
            found = shared_palettes(values, layouts, self.colors or 2**self.bits, fit)
        else:
            colors = self.colors or 2**self.bits
            found = self._worth(values, self._own(values, layouts, colors, fit, context))
        self._tell(values, found, taken, context)
        formats = {name: (*model.formats.get(name, ()), fmt) for name, fmt in found.items()}
        return model.evolve(formats={**model.formats, **formats})

    def _own(
        self,
        values: Mapping[str, Tensor],
        layouts: Mapping[str, Palette],
        colors: int,
        fit: Fit,
        context: Context,
    ) -> dict[str, Palette]:
        """A palette for each weight."""
        items = context.progress.track(values.items(), f"clustering weights in {colors}", len(values))
        return {name: own_palette(value, layouts[name], colors, fit) for name, value in items}

    # ---- layout

    def _layout(self, value: Tensor, axis: int) -> Palette:
        """Everything but the centroids."""
        asked = self.scale
        if asked == "auto":
            asked = "per_tensor" if self.granularity == "shared" else "none"
        scale = None
        if asked != "none":
            scale = root_mean_squares(value, axis if asked == "per_channel" else None)
        zero = self.zero == "keep" and bool((value == 0).any())
        if self.granularity != "per_group":
            return Palette(torch.zeros(1), zero, axis, 0, scale)
        groups = -(-value.shape[axis] // self.group)
        return Palette(torch.zeros(groups, 1), zero, axis, self.group, scale)

    def _check_zeros(self, model: Model, values: Mapping[str, Tensor]) -> None:
        masked = [name for name in values if model.formats.get(name)]
        if self.zero == "free" and masked:
            raise RecipeError(
                f"zero: free would fill the zeros that sparsify put into '{masked[0]}'",
                fix="zero: keep, or leave sparsify out",
            )

    def _worth(self, values: Mapping[str, Tensor], found: Mapping[str, Palette]) -> dict[str, Palette]:
        """Without the tensors that are so small that a palette of their own is no smaller than they are."""
        sizes = {name: value.numel() for name, value in values.items()}
        kept = {name: fmt for name, fmt in found.items() if fmt.stored_bytes(sizes[name]) < 4 * sizes[name]}
        if not kept:
            raise RecipeError(
                "cluster found no weight that a palette makes smaller",
                fix="give fewer bits, or granularity: shared",
            )
        return kept

    # ---- words

    def _nothing(self, taken: list[str]) -> RecipeError:
        if taken:
            return RecipeError(
                f"cluster found no float weight: '{taken[0]}' has a format already",
                fix="put cluster before quantize, cast and other cluster steps",
            )
        return RecipeError(
            "cluster found no weight that may share values",
            fix="check where: weights of linear, convolutional, recurrent and embedding layers count",
        )

    def _tell(
        self, values: Mapping[str, Tensor], chosen: Mapping[str, Palette], taken: list[str], context: Context
    ) -> None:
        left = [name for name in values if name not in chosen]
        for names, why in ((taken, "they have formats already"), (left, "a palette is no smaller")):
            if names:
                some = ", ".join(names[:_NAMED]) + (
                    f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                )
                context.progress.note(f"cluster passes {some} by: {why}")
        whole = sum(values[name].numel() for name in chosen)
        size = sum(fmt.stored_bytes(values[name].numel()) for name, fmt in chosen.items())
        context.progress.note(
            f"cluster leaves {8 * size / whole:.2f} bits a weight, once the file is packed: "
            f"{context.target.runtime} stores the shared values as floats"
        )


PLUGIN = Cluster
