"""ONNX Runtime in WebAssembly: the files of runtime onnxruntime, run by the npm package onnxruntime-web.

What its kernels ask for (measured in Node 20, 128-bit SIMD, one thread, each layer against itself in float):

- A dense convolution runs in a third to a half of its float time, a matrix product of several rows as well.
  Sums are 32 bits wide, so no weight leaves a bit unused, whatever the machine.
- Results are rounded and clamped one by one in plain code. Where there is little to multiply for each of
  them, that decides: depthwise and grouped convolutions take up to four times as long as in float, a linear
  layer of one row up to five times, 1x1 convolutions of few inputs half as long again. ``integers_pay`` says
  no to these.

Node runs the WebAssembly as browsers do, in a process of its own that answers all calls of a session; the
latency includes the way there and back (under 1 % at 224 px, more for networks of less than a millisecond).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featherweight.errors import MissingRuntime, TargetError, nearest
from featherweight.runtime import (
    Artifact,
    Json,
    Kernel,
    Profile,
    Role,
    Runtime,
    Session,
    Signature,
    Target,
)
from featherweight.runtimes import _web
from featherweight.runtimes.onnxruntime import OnnxRuntime

if TYPE_CHECKING:
    from featherweight.formats import TensorFormat
    from featherweight.graph import Graph, Node
    from featherweight.model import Model

_NPM = "1.30.0"
_OPTIONS = frozenset(  # of InferenceSession.create; and numThreads of env.wasm
    {
        "enableCpuMemArena",
        "enableMemPattern",
        "executionMode",
        "extra",
        "freeDimensionOverrides",
        "graphOptimizationLevel",
        "numThreads",
    }
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_DEPTH, _CLAMPED_DEPTH = 32, 128  # products per result from which integers are faster


class OnnxRuntimeWeb(OnnxRuntime):
    """Microsoft's ONNX Runtime, WebAssembly execution provider, under Node."""

    extra = "onnxruntime-web"
    packages = ()  # type: ignore[assignment]  # none of pip
    module = "featherweight.runtimes._web"
    _spare: _web.Host | None = None

    # ---- the package

    @classmethod
    def installed(cls) -> bool:
        return super().installed() and _web.node() is not None and _web.package() is not None

    def require(self) -> None:
        if self.installed():
            return
        if _web.node() is None:
            raise MissingRuntime(
                f"runtime '{self.name}' is not installed: there is no program 'node' on PATH",
                fix=f"install Node.js 20 or newer, then: {_install()}",
            )
        raise MissingRuntime(
            f"runtime '{self.name}' is not installed: there is no npm package '{_web.PACKAGE}'",
            fix=_install(),
        )

    def version(self) -> str:
        return f"{_web.PACKAGE} {_web.version()}"

    def load(self, target: Target) -> None:
        self._spare = _web.Host(_threads(target))

    # ---- formats

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        return super().realise(fmt, replace(target, isa="vnni"), role)  # sums that do not saturate

    def integers_pay(self, node: Node, graph: Graph, target: Target) -> bool:
        """Whether a layer is faster in integers than in float, by the measurements above."""
        weight = graph.parameter_shapes[node.parameters["weight"]]
        if node.op == "linear":
            rows = math.prod(graph.values[node.inputs[0]].shape[:-1])
            return rows > graph.batch
        if node.attributes.get("groups", 1) != 1:
            return False
        clamped = any(reader.op in _CLAMPS for reader in graph.consumers[node.outputs[0]])
        return math.prod(weight[1:]) >= (_CLAMPED_DEPTH if clamped else _DEPTH)

    # ---- files and sessions

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        artifact = super().lower(model, target, out)
        if len(artifact.files) > len(set(artifact.entries.values())):
            raise TargetError(
                f"{self.name} cannot hold a model of more than 2 GB: WebAssembly has 4 GB for everything",
                fix="make it smaller, or lower for onnxruntime",
            )
        return artifact

    def open(self, artifact: Artifact, target: Target) -> Session:
        for name in target.options:
            if name not in _OPTIONS:
                raise TargetError(f"{self.name} has no option '{name}'", fix=nearest(name, _OPTIONS))
        host, self._spare = self._spare, None
        if host is None or host.threads != _threads(target):
            host = _web.Host(_threads(target))
        return _Session(host, artifact, target)

    def tunings(self, target: Target) -> Sequence[Mapping[str, Json]]:
        fewer: list[Mapping[str, Json]] = [{"numThreads": n} for n in range(target.threads - 1, 0, -1)]
        return (
            {"graphOptimizationLevel": "extended"},
            {"enableCpuMemArena": False, "enableMemPattern": False},
            *fewer,
        )

    # ---- what it executes

    def kernels(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Sequence[Kernel]:
        from featherweight.runtimes._web_look import kernels

        with _web.Host(_threads(target)) as host:
            return kernels(host, artifact.folder / artifact.entries[entry], _session_options(target), inputs)

    def values(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Mapping[str, np.ndarray]:
        from featherweight.runtimes._web_look import values

        names = artifact.details.get("values", {}).get(entry, {})
        file = artifact.folder / artifact.entries[entry]
        with _web.Host(_threads(target)) as host:
            return values(host, file, names, _session_options(target), inputs)

    def profile(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], folder: Path, *, entry: str
    ) -> Profile:
        return Runtime.profile(self, artifact, target, inputs, folder, entry=entry)

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        from featherweight.runtimes._web_loaders import load_mjs, load_py

        file = artifact.entries[signature.entry]
        options = {"executionProviders": ["wasm"], **_session_options(target)}
        web = load_mjs(file, signature, _threads(target), json.dumps(options), _install_line())
        return {"load.py": load_py(file), "load.mjs": web}


PLUGIN = OnnxRuntimeWeb


def _install_line() -> str:
    return f"npm install {_web.PACKAGE}@{_NPM}"


def _install() -> str:
    import sys

    return f"npm install --prefix {sys.prefix} {_web.PACKAGE}@{_NPM}"


def _threads(target: Target) -> int:
    return int(target.options.get("numThreads", target.threads))


def _session_options(target: Target) -> dict[str, Json]:
    return {name: value for name, value in target.options.items() if name != "numThreads"}


class _Session:
    """Files that a Node process has opened; ``target.options`` are InferenceSession's own, by name."""

    def __init__(self, host: _web.Host, artifact: Artifact, target: Target) -> None:
        self._host = host
        self._sessions: dict[str, int] = {}
        for entry, file in artifact.entries.items():
            path = str((artifact.folder / file).resolve())
            try:
                opened, _ = host.ask({"do": "open", "file": path, "options": _session_options(target)})
            except ValueError as error:
                raise TargetError(
                    f"onnxruntime-web cannot open '{file}': {error}",
                    where=f"options {json.dumps(dict(target.options))}" if target.options else None,
                    fix="check the options against InferenceSession.SessionOptions of its documentation",
                ) from error
            self._sessions[entry] = opened["session"]

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        return self._host.ask({"do": "run", "session": self._sessions[entry]}, inputs)[1]
