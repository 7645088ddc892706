"""The whole story, one function for each command of the command line.

Read ``fitting.fit`` first: load, ask for recipes, weigh what they make, hand the best one back.
"""

from featherweight.api.fitting import demo, fit
from featherweight.api.looking import compare, inspect, measure, report
from featherweight.api.making import apply, lower
from featherweight.engine.catalog import doctor, methods, runtimes

__all__ = [
    "apply",
    "compare",
    "demo",
    "doctor",
    "fit",
    "inspect",
    "lower",
    "measure",
    "methods",
    "report",
    "runtimes",
]
