"""featherweight fits a trained neural network into a budget, and measures the artifact that ships.

Names are imported when they are used, so that a measuring process, which needs
only numpy and its runtime, does not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherweight.api import apply as apply
    from featherweight.api import fit as fit
    from featherweight.api import inspect as inspect
    from featherweight.api import load as load
    from featherweight.api import lower as lower
    from featherweight.api import measure as measure
    from featherweight.api import merge as merge
    from featherweight.api import pack as pack
    from featherweight.api import robustness as robustness
    from featherweight.api import unpack as unpack
    from featherweight.api import verify as verify
    from featherweight.data import Data as Data
    from featherweight.errors import FeatherweightError as FeatherweightError
    from featherweight.exchange.load import load_model as load_model
    from featherweight.formats import IntQuant as IntQuant
    from featherweight.formats import PerChannel as PerChannel
    from featherweight.formats import PerTensor as PerTensor
    from featherweight.method import Context as Context
    from featherweight.method import Method as Method
    from featherweight.model import Entry as Entry
    from featherweight.model import Model as Model
    from featherweight.outcome import Budget as Budget
    from featherweight.outcome import Measurement as Measurement
    from featherweight.outcome import Result as Result
    from featherweight.recipe import Choice as Choice
    from featherweight.recipe import Range as Range
    from featherweight.recipe import Recipe as Recipe
    from featherweight.recipe import Where as Where
    from featherweight.runtime import Artifact as Artifact
    from featherweight.runtime import Runtime as Runtime
    from featherweight.runtime import Target as Target
    from featherweight.tools.simulate import simulate as simulate
    from featherweight.tools.simulated import absorb as absorb
    from featherweight.tools.simulated import simulated as simulated

_HOMES = {
    "Artifact": "runtime",
    "Budget": "outcome",
    "Choice": "recipe",
    "Context": "method",
    "Data": "data",
    "Entry": "model",
    "FeatherweightError": "errors",
    "IntQuant": "formats",
    "Measurement": "outcome",
    "Method": "method",
    "Model": "model",
    "PerChannel": "formats",
    "PerTensor": "formats",
    "Range": "recipe",
    "Recipe": "recipe",
    "Result": "outcome",
    "Runtime": "runtime",
    "Target": "runtime",
    "Where": "recipe",
    "absorb": "tools.simulated",
    "apply": "api",
    "fit": "api",
    "inspect": "api",
    "load": "api",
    "load_model": "exchange.load",
    "lower": "api",
    "measure": "api",
    "merge": "api",
    "pack": "api",
    "robustness": "api",
    "simulate": "tools.simulate",
    "simulated": "tools.simulated",
    "unpack": "api",
    "verify": "api",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605 - one list, from the table above

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featherweight' has no attribute '{name}'")
    return getattr(importlib.import_module(f"featherweight.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
