"""What of a network a training step trains, and how fast, where a recipe leaves it open."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.errors import RecipeError
from featherweight.formats import Binary, IntQuant, Palette, TensorFormat, Ternary, zeros_alone
from featherweight.model import Model
from featherweight.tools.optimizers import OptimizerName
from featherweight.where import Where

_FEW = 2  # bits of a palette


def trained_entry(model: Model, step: str) -> str:
    """The way of calling that is trained.

    Args:
        model: With one way of calling it, or one that is called ``forward``.
        step: Of the recipe, for the error.

    Raises:
        RecipeError: There are several.
    """
    if "forward" in model.entries:
        return "forward"
    if len(model.entries) == 1:
        return next(iter(model.entries))
    raise RecipeError(
        f"{step} trains one way of calling a network, and this one has {', '.join(sorted(model.entries))}",
        fix="train with featherweight.simulated(model, entry) and a loop of your own",
    )


def frozen_parameters(model: Model, where: Where) -> frozenset[str]:
    """Parameters that a layer holds which ``where`` leaves out, by their first name."""
    held = {
        id(parameter)
        for path, layer in model.module.named_modules(remove_duplicate=False)
        if not where.selects(path, type(layer).__name__)
        for parameter in layer.parameters(recurse=False)
    }
    return frozenset(name for name, one in model.parameters.items() if id(one) in held)


def still_layers(model: Model, where: Where, norms: bool = False) -> tuple[str, ...]:
    """Layers that run as in inference: those that ``where`` leaves out, and where asked all batch norms."""
    return tuple(
        path
        for path, layer in model.module.named_modules()
        if not where.selects(path, type(layer).__name__) or (norms and isinstance(layer, _BatchNorm))
    )


def auto_optimizer(model: Model) -> OptimizerName:
    """sgd for float networks with batch norms, else adamw."""
    norms = any(isinstance(layer, _BatchNorm) for layer in model.module.modules())
    learned = any(fmt.learned() for chain in model.formats.values() for fmt in chain)  # at Adam's rates
    return "sgd" if norms and is_float(model) and not learned else "adamw"


def auto_rate(optimizer: OptimizerName, model: Model) -> float:
    """A rate for what is trained: less for transformers, and where weights are on a grid."""
    if optimizer == "sgd":
        return 0.03 if is_float(model) else 0.01
    if any(isinstance(layer, nn.LayerNorm | nn.RMSNorm) for layer in model.module.modules()):
        return 1e-4 if is_float(model) else 3e-5
    formats = [fmt for name in model.parameters for fmt in model.formats.get(name, ())]
    codes = any(_has_few_values(fmt) for fmt in formats)  # which must change
    return 5e-4 if any(isinstance(fmt, IntQuant | Palette) for fmt in formats) and not codes else 1e-3


def is_float(model: Model) -> bool:
    """Whether nothing is on a grid: at most some weights are zero."""
    return all(map(zeros_alone, model.formats.values()))


def _has_few_values(fmt: TensorFormat) -> bool:
    return isinstance(fmt, Ternary | Binary) or (isinstance(fmt, Palette) and fmt.width <= _FEW)
