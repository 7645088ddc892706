"""How many bits each layer's palette has, so that the outputs suffer least within a mean.

As mixed_precision chooses integers: what each layer alone would do to the outputs with each palette is
foretold from gradients (tools/sensitivity.py), and an integer program takes one for each (tools/assign.py)::

    minimise sum of losses   subject to   mean stored bits, codebooks included   <=   what was asked
"""

from __future__ import annotations

from collections.abc import Mapping

from featherweight.errors import RecipeError
from featherweight.formats import Palette
from featherweight.method import Context
from featherweight.model import Model
from featherweight.tools.assign import Option, OutOfReachError, assign
from featherweight.tools.batches import single_calls
from featherweight.tools.choices import Choices
from featherweight.tools.foresight import nearest_changes
from featherweight.tools.sensitivity import predicted_losses
from featherweight.tools.sparsity import with_zeros


def chosen_palettes(
    model: Model,
    offers: Mapping[int, Mapping[str, Palette]],
    mean_bits: float,
    context: Context,
    samples: int,
) -> dict[str, Palette]:
    """One palette for each weight; weights that layers share get the same bits.

    Args:
        model: With zeros or without.
        offers: Bits -> weight -> its palette.
        mean_bits: Most stored bits of a weight, in the mean over all of them.
        context: Calibration examples, and what was found before.
        samples: Examples to read.

    Raises:
        RecipeError: The mean is out of reach.
    """
    labels = {str(bits): dict(formats) for bits, formats in offers.items()}
    choices = Choices.of(with_zeros(model).evolve(formats={}), labels)
    losses = _losses(choices, context, samples)
    items = []
    for name, group in choices.groups.items():
        prices = {label: 8 * choices.bytes(group, label) / choices.elements for label in group.labels}
        items.append([Option(losses[name][label], {"bits": prices[label]}) for label in group.labels])
    try:
        (found,) = assign(items, {"bits": mean_bits})
    except OutOfReachError as error:
        least = f"{-(-error.smallest * 1000 // 1) / 1000:g}"
        raise RecipeError(
            f"mean_bits of {mean_bits:g} cannot be reached: the least is {least}, codebooks included",
            fix=f"mean_bits: {least}, or more of where",
        ) from error
    chosen: dict[str, Palette] = {}
    for group, index in zip(choices.groups.values(), found.chosen, strict=True):
        own = labels[group.labels[index]]
        chosen |= {name: own[name] for name in group.weights}
    return chosen


def _losses(choices: Choices, context: Context, samples: int) -> dict[str, dict[str, float]]:
    """What each layer alone does to the outputs, summed over the ways of calling the network."""
    changes = nearest_changes(choices.model, choices.by_weight(), context.scratch)
    total: dict[str, dict[str, float]] = {
        name: dict.fromkeys(one.labels, 0.0) for name, one in choices.groups.items()
    }
    for entry, how in choices.model.entries.items():
        examples = single_calls(context, samples, how, "cluster")
        tracked = context.progress.track(examples, "sensitivity by gradient", len(examples))
        subjects = choices.subjects(entry, changes)
        found = predicted_losses(choices.model, tracked, subjects, {}, seed=context.seed, entry=entry)
        for name, own in found.items():
            for label, loss in own.items():
                total[name][label] += loss
    return total
