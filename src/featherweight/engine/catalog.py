"""What is installed and what works: methods, runtimes, this machine."""

from __future__ import annotations

import inspect
import re
import tempfile
from pathlib import Path
from typing import Any

from featherweight.engine.environment import describe
from featherweight.errors import FeatherweightError, MissingRuntime
from featherweight.plugins import find_method, find_runtime, method_names, runtime_names
from featherweight.runtime import Runtime, Target

_TOLERANCE = 1e-4


def methods() -> dict[str, Any]:
    """Every method with its kind, what it needs, and its parameters with types and defaults."""
    return {name: _method(name) for name in method_names()}


def _method(name: str) -> dict[str, Any]:
    method = find_method(name)
    said = inspect.getdoc(method) or ""
    parameters = {
        field: f"{_type(about.annotation)}, default {about.get_default(call_default_factory=True)!r}"
        for field, about in method.model_fields.items()
        if field != "where"
    }
    return {
        "kind": method.kind,
        "needs": sorted(method.needs),
        "summary": said.splitlines()[0] if said else "",
        "parameters": parameters,
    }


def _type(annotation: Any) -> str:
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    text = re.sub(r"\b[a-z_]+(\.[a-z_]+)*\.(?=[A-Z])", "", text)  # modules of types
    text = re.sub(r"Annotated\[(\w+), FieldInfo\(.*?\]\)\]", r"\1", text)
    return text.replace("Literal", "one of ").replace("Union", "any of ")


def runtimes() -> dict[str, Any]:
    """Every runtime with its version, or how to install it."""
    return {name: _runtime(name) for name in runtime_names()}


def _runtime(name: str) -> dict[str, Any]:
    runtime = find_runtime(name)
    try:
        runtime.require()
    except MissingRuntime as error:
        about = {"installed": False, "version": None, "install": error.fix or ""}
    else:
        about = {"installed": True, "version": runtime.version(), "install": ""}
    return {**about, "unmeasured": runtime.unmeasured}


def doctor() -> dict[str, Any]:
    """This machine, and whether each runtime computes what it should, through the measuring process.

    ``healthy`` is false when a runtime that is installed does not work, or when none is installed.
    """
    machine = describe(Target()).model_dump(mode="json")
    found = {}
    for name, about in runtimes().items():
        if about["unmeasured"]:
            found[name] = {"works": None, "says": about["unmeasured"]}
        elif about["installed"]:
            found[name] = _works(name)
        else:
            found[name] = {"works": None, "says": about["install"]}
    states = [about["works"] for about in found.values()]
    del machine["threads"]  # a choice of each run
    return {"machine": machine, "runtimes": found, "healthy": True in states and False not in states}


def _works(name: str) -> dict[str, Any]:
    """Whether a runtime computes what PyTorch does, or what stands in its way."""
    runtime = find_runtime(name)
    try:
        error = _largest_error(runtime)
    except FeatherweightError as problem:
        return {"works": False, "says": problem.what + (f"; {problem.fix}" if problem.fix else "")}
    except Exception as problem:  # noqa: BLE001 - a broken installation may raise anything; this tells it
        return {"works": False, "says": f"{type(problem).__name__}: {problem}"}
    return {"works": error <= _TOLERANCE, "says": f"{runtime.version()}, largest error {error:.1e}"}


def _largest_error(runtime: Runtime) -> float:
    """Lower a tiny network, run it where artifacts are measured, compare with PyTorch."""
    import numpy as np
    import torch

    from featherweight.engine.jobs import Served
    from featherweight.model import Entry, Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        example = torch.randn(2, 4)
    entries = {"forward": Entry((example,), ("x",), ("y",), {"x": {0: "batch"}})}
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder, torch.no_grad():
        target = Target(runtime=runtime.name).resolved()
        artifact = runtime.lower(Model(module, entries, key="doctor"), target, Path(folder))
        with Served(artifact, target) as served:
            (seen,) = served.run(example.numpy())
        return float(np.abs(seen - module(example).numpy()).max())
