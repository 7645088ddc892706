"""One quantization in a fresh process, its time split into parts; ``quantize_time.py`` starts it.

``python quantize_once.py TOOL JOB.json OUT.json`` with a tool of ``TOOLS``. Time is exclusive: a part that
runs inside another one is subtracted from it. Importing is a part of its own, wherever it happens.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import io
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOOLS = ("featherweight", "nncf-torch", "nncf-onnx")


class Clock:
    """Seconds by part; parts may nest."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.parts[self._open[-1]] = self.parts.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside under this name."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def wrap(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
        """Count every call of a function of ``owner``; a name may follow from the arguments."""
        function = getattr(owner, attribute)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args)):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def count_imports(self) -> None:
        """Count what the import statement does for modules that are not there yet."""
        statement = builtins.__import__

        def imported(
            name: str, space: Any = None, local: Any = None, fromlist: Any = (), level: int = 0
        ) -> Any:
            there = not level and name in sys.modules and _has(sys.modules[name], fromlist)
            if there or (self._open and self._open[-1] == "imports"):
                return statement(name, space, local, fromlist, level)
            with self.part("imports"):
                return statement(name, space, local, fromlist, level)

        builtins.__import__ = imported
        self.wrap(importlib, "import_module", "imports")


def _has(module: Any, fromlist: Any) -> bool:
    """Whether an import of these names from a module that is there loads no sub-module."""
    return all(item == "*" or item in vars(module) for item in fromlist or ())


def _featherweight(job: dict[str, Any], clock: Clock) -> None:
    """A whole ``fit`` with one trial; measuring is a part, so that it can be left aside."""
    with clock.part("imports"):
        from featherweight import api, graph
        from featherweight.engine import evaluate, run
    clock.wrap(graph, "_export", "trace")
    clock.wrap(api, "load_sources", "load")
    clock.wrap(run.Run, "_compute", lambda _run, _model, _method, name, _number: name)
    clock.wrap(
        run.Run,
        "_write_artifact",
        lambda _run, model, _folder: "lower int8" if model.formats else "lower float",
    )
    for name in ("measure_latency", "measure_memory", "score_artifact"):
        clock.wrap(evaluate, name, "measuring")
    clock.wrap(evaluate.Scales, "layers", "report")
    clock.wrap(api, "_deliver", "report")
    with tempfile.TemporaryDirectory() as temporary, clock.part("rest"):
        os.environ["FEATHERWEIGHT_CACHE"] = f"{temporary}/cache"
        recipe = Path(temporary) / "recipe.yaml"
        recipe.write_text(
            f"version: 1\nsteps: [{{fold: {{}}}}, {{quantize: {{samples: {job['samples']}}}}}]\n"
        )
        api.fit(job["spec"], job["data"], weights=job["weights"], recipe=str(recipe), out=f"{temporary}/out")


def _nncf_torch(job: dict[str, Any], clock: Clock) -> None:
    """``nncf.quantize`` on the PyTorch module."""
    with clock.part("imports"):
        import nncf
        import torch
        from nncf.torch.quantization.extensions import QuantizedFunctionsCPU

        from featherweight.exchange.load import load_model
    with clock.part("compile"):  # NNCF builds its extension on first use and keeps it in the user's cache
        QuantizedFunctionsCPU.get("Quantize_forward")
    with clock.part("load"):
        batches = [torch.from_numpy(batch) for batch in _batches(job)]
        module = load_model(
            job["spec"], weights=job["weights"], example_inputs=(batches[0][:2].numpy(),)
        ).module
        module.eval()
    with clock.part("quantize"):
        nncf.quantize(module, nncf.Dataset(batches), subset_size=job["samples"])


def _nncf_onnx(job: dict[str, Any], clock: Clock) -> None:
    """From the same module to an int8 ONNX file: exported by PyTorch, quantized by NNCF, saved."""
    with clock.part("imports"):
        import nncf
        import onnx
        import torch

        from featherweight.exchange.load import load_model
    with clock.part("load"):
        arrays = _batches(job)
        module = load_model(job["spec"], weights=job["weights"], example_inputs=(arrays[0][:2],)).module
    with tempfile.TemporaryDirectory() as temporary:
        with clock.part("lower float"), contextlib.redirect_stdout(io.StringIO()):
            axes = ({0: torch.export.Dim("batch")},)
            example = (torch.from_numpy(arrays[0][:2]),)
            torch.onnx.export(module.eval(), example, f"{temporary}/float.onnx", dynamic_shapes=axes)
        with clock.part("quantize"):
            model = onnx.load(f"{temporary}/float.onnx")
            name = model.graph.input[0].name
            quantized = nncf.quantize(
                model, nncf.Dataset([{name: batch} for batch in arrays]), subset_size=job["samples"]
            )
        with clock.part("lower int8"):
            onnx.save(quantized, f"{temporary}/int8.onnx")


def _batches(job: dict[str, Any]) -> list[Any]:
    import numpy as np

    examples = np.load(job["data"])["x_calibration"][: job["samples"]]
    return [examples[start : start + job["batch"]] for start in range(0, len(examples), job["batch"])]


def main() -> None:
    tool, job_file, out = sys.argv[1:]
    job = json.loads(Path(job_file).read_text())
    os.environ["NNCF_CI"] = "1"  # NNCF reports its use to its vendor unless this is set
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "600"  # its build takes longer than the default here
    logging.disable(logging.WARNING)
    clock = Clock()
    clock.count_imports()
    work = {"featherweight": _featherweight, "nncf-torch": _nncf_torch, "nncf-onnx": _nncf_onnx}
    try:
        work[tool](job, clock)
    except ImportError as error:
        Path(out).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    Path(out).write_text(json.dumps({"parts": clock.parts, "whole": time.time() - job["started"]}))


if __name__ == "__main__":
    main()
