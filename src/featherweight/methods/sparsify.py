"""Sparsify: single weights become zero, those that matter least.

A mask M of zeros and ones stands before the weight, and stays there for the steps that follow::

    w ≈ w * M,      M = 0 for the lowest scores

By magnitude (Han et al. 2015, arXiv:1506.02626), by first-order change of the loss (Molchanov et al. 2019,
arXiv:1906.10771), or by scores that finetune learns (movement; Sanh et al. 2020, arXiv:2005.07683); in
patterns 2:4 (Mishra et al. 2021, arXiv:2104.08378) or blocks. In a finetune after it the sparsity rises along
a cubic curve (Zhu and Gupta 2017, arXiv:1710.01878), or hard-concrete gates are learned under an L0 penalty
(Louizos et al. 2018, arXiv:1712.01312). Zeros shrink nothing by themselves: runtimes store them like others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from featherweight.errors import RecipeError
from featherweight.formats import Sparse
from featherweight.masks import largest, pattern_of
from featherweight.method import Context, Kind, Method, Need
from featherweight.model import Model
from featherweight.recipe import Hole, Range
from featherweight.tools.batches import calibration_batches
from featherweight.tools.objectives import task_objective
from featherweight.tools.sparsity import (
    global_sparsities,
    prunable,
    sensitivities,
    sparsities_below,
)

_DEFAULT = 0.5
_USUAL, _OPEN = 0.1, 0.02  # learned scores at first: of weights of usual size, of gates
_NAMED = 3  # layers that a note names
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Sparsify(Method, frozen=True, extra="forbid"):
    """Zeros for the weights that matter least; biases and norms never. Fine-tune afterwards.

    Attributes:
        sparsity: Share of zeros; without it and a threshold that of the pattern, else one half.
        threshold: Weights whose score is below this become zero.
        scope: Whether scores are ranked over all layers (``global``) or in each ``layer``.
        criterion: ``magnitude``; ``gradient``: change of the loss, without labels of the outputs;
            ``movement``: scores that finetune learns.
        pattern: ``none``; ``N:M``: of M neighbours along the inputs N stay, as 2:4; ``RxC``: blocks of R
            outputs by C inputs.
        schedule: Whether finetune begins dense and reaches the sparsity on a ``cubic`` curve, or the mask
            stays as it is (``none``).
        end: Share of the finetune after which the mask stays.
        regrow: While the sparsity rises, weights that are zero learn too and may come back. Adam moves them
            as far as those that matter, so with adamw ``false`` is better; movement and gates always regrow.
        regularisation: ``l0``: finetune learns gates under a penalty for those that are open.
        penalty: What they add to the loss when all are open.
        limit: Largest share of zeros of one layer, for ``global``.
        samples: Examples to read, for ``gradient``.
    """

    kind: ClassVar[Kind] = "format"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})

    sparsity: Fraction | None = None
    threshold: Annotated[float, Field(gt=0)] | None = None
    scope: Literal["global", "layer"] = "global"
    criterion: Literal["magnitude", "gradient", "movement"] = "magnitude"
    pattern: str = "none"
    schedule: Literal["none", "cubic"] = "cubic"
    end: Annotated[float, Field(gt=0, le=1)] = 0.7
    regrow: bool = True
    regularisation: Literal["none", "l0"] = "none"
    penalty: Annotated[float, Field(gt=0)] = 1.0
    limit: Fraction = 0.98
    samples: Annotated[int, Field(ge=1)] = 256

    @field_validator("pattern")
    @classmethod
    def _known(cls, text: str) -> str:
        pattern_of(text)
        return text

    @model_validator(mode="after")
    def _agrees(self) -> Sparsify:
        own = pattern_of(self.pattern).sparsity
        if self.sparsity is not None and self.threshold is not None:
            raise ValueError("sparsity and threshold both say how much: give one of them")
        if own is not None and (self.threshold is not None or self.sparsity not in (None, own)):
            raise ValueError(f"the pattern {self.pattern} has a sparsity of {own:g}: give no other")
        if self.regularisation == "l0" and self.pattern != "none":
            raise ValueError("gates are learned for single weights: leave the pattern out")
        return self

    @classmethod
    def holes(cls, model: Model, context: Context) -> dict[str, Hole]:
        names = prunable(model, lambda path, kind: True)
        return {"sparsity": Range(0.3, 0.9, default=0.6)} if names else {}

    def apply(self, model: Model, context: Context) -> Model:
        names = prunable(model, self.where.selects)
        pattern = pattern_of(self.pattern)
        parameters = model.parameters
        fits = [name for name in names if pattern.fits(tuple(parameters[name].shape))]
        if not fits:
            raise RecipeError(
                "sparsify found no weight that may become sparse"
                + (f" in the pattern {self.pattern}" if names else ""),
                fix="check where and pattern: weights of linear, convolutional and recurrent layers count",
            )
        scores = self._scores(model, fits, context)
        wanted = self._sparsities(scores)
        formats: dict[str, tuple[Any, ...]] = {
            name: (self._format(parameters[name].detach(), scores[name], sparsity, len(fits), scores),)
            for name, sparsity in wanted.items()
        }
        self._tell(formats, [name for name in names if name not in fits], context)
        return model.evolve(formats={**model.formats, **formats})

    # ---- what matters

    def _scores(self, model: Model, names: list[str], context: Context) -> dict[str, Tensor]:
        magnitudes = {name: model.parameters[name].detach().abs() for name in names}
        if self.criterion != "gradient":
            return magnitudes
        total = {name: torch.zeros_like(one) for name, one in magnitudes.items()}
        for entry in model.entries:
            labels = context.data.train is not None and context.data.train.targets is not None
            loss = task_objective(model, context.data, entry=entry) if labels else None

            def judged(outputs: tuple[Tensor, ...], targets: Tensor, own: Any = loss) -> Tensor:
                made: Tensor = own(outputs, (), targets)
                return made

            found = sensitivities(
                model,
                names,
                self._examples(context, labels=loss is not None),
                None if loss is None else judged,
                seed=context.seed,
                entry=entry,
            )
            for name, one in found.items():
                total[name] += one
        return total

    def _examples(self, context: Context, labels: bool) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Small batches, each of which counts by itself."""
        data = context.data
        if not labels or data.train is None or data.train.targets is None:
            for batch in calibration_batches(context, self.samples, "sparsify"):
                yield batch, None
            return
        picks = np.random.default_rng(context.seed).permutation(len(data.train))[: self.samples]
        for part in np.array_split(picks, max(1, len(picks) // 16)):
            inputs = tuple(torch.from_numpy(np.ascontiguousarray(one)) for one in data.train.take(part))
            yield inputs, torch.from_numpy(np.ascontiguousarray(data.train.targets[part]))

    def _sparsities(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        pattern = pattern_of(self.pattern)
        if self.threshold is not None:
            return sparsities_below(scores, self.threshold, pattern)
        sparsity = self.sparsity if self.sparsity is not None else pattern.sparsity or _DEFAULT
        if pattern.sparsity is not None or self.scope == "layer":
            return dict.fromkeys(scores, sparsity)
        return global_sparsities(scores, sparsity, pattern, max(self.limit, sparsity))

    def _format(
        self, weight: Tensor, score: Tensor, sparsity: float, tensors: int, scores: Mapping[str, Tensor]
    ) -> Sparse:
        pattern = pattern_of(self.pattern)
        mask = largest(score, sparsity, pattern)
        sparsity = min(sparsity, 1 - 1 / max(weight.numel(), 2))
        if self.regularisation == "l0":
            rate = self.penalty / sum(one.numel() for one in scores.values())
            gates = torch.full_like(weight, _OPEN, dtype=torch.float32)
            return Sparse(
                mask, sparsity, schedule=self.schedule, by="gates", scores=gates, rate=rate, final=False
            )
        by: Literal["magnitude", "scores", "movement"] = "magnitude"
        learned: Tensor | None = None
        if self.criterion == "movement":
            usual = weight.square().mean().sqrt().clamp(min=1e-12)
            by, learned = "movement", (_USUAL * weight.abs() / usual).float()
        elif self.criterion == "gradient" and self.schedule == "cubic":
            by, learned = "scores", score.float()
        final = self.schedule == "none" and by != "movement"
        return Sparse(
            mask,
            sparsity,
            self.pattern,
            self.schedule,
            self.end,
            by,
            learned,
            final=final,
            regrow=self.regrow,
        )

    def _tell(self, formats: Mapping[str, tuple[Any, ...]], left: list[str], context: Context) -> None:
        if left:
            some = ", ".join(left[:_NAMED]) + (
                f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
            )
            context.progress.note(
                f"sparsify passes {some} by: the pattern {self.pattern} does not divide its inputs"
            )
        zeros = sum(int((~chain[-1].mask).sum()) for chain in formats.values())
        whole = sum(chain[-1].mask.numel() for chain in formats.values())
        empty = [name for name, chain in formats.items() if not chain[-1].mask.any()]
        if empty:
            context.progress.note(f"warning: sparsify leaves nothing of {', '.join(empty[:_NAMED])}")
        context.progress.note(
            f"sparsify makes {zeros / whole:.1%} of the weights zero, which shrinks nothing by itself: "
            f"{context.target.runtime} stores zeros like other values"
        )


PLUGIN = Sparsify
