"""LiteRT (TensorFlow Lite's successor) on CPU: one ``.tflite`` file per entry, shaped for XNNPACK's kernels.

litert_torch converts the float network; the integers are written into its file by ``_litert_store.py``,
so that ranges and weights are ours. What the kernels ask for: signed 8-bit activations, signed symmetric
weights per channel, biases as int32 at the product of both scales, one grid for what is concatenated,
fixed grids behind sigmoid and tanh. Weights alone are stored as int8 or float16
and restored when the file is loaded: smaller, no faster.

A file takes one example; several at once where the network allows it, else the session runs one by one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from featherweight.errors import TargetError
from featherweight.runtime import Artifact, Json, Kernel, Role, Runtime, Session, Signature, Stored, Target

if TYPE_CHECKING:
    import numpy as np

    from featherweight.formats import TensorFormat
    from featherweight.graph import Graph
    from featherweight.model import Model

_WEIGHTED = frozenset({"conv1d", "conv2d", "conv_transpose2d", "linear"})
_ACTIVATIONS_ONLY = frozenset(
    {"add", "mul", "cat", "adaptive_avg_pool2d", "mean", "sub", "sigmoid", "tanh", "leaky_relu"}
)
_PASSED_THROUGH = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})


class LiteRT(Runtime):
    """Google's LiteRT, its interpreter with the XNNPACK delegate."""

    extra = "litert"
    packages = ("ai-edge-litert", "litert-torch")
    module = "ai_edge_litert"
    one_grid = frozenset({"cat"})
    fixed_ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "sigmoid": (0.0, 255 / 256),
        "tanh": (-1.0, 127 / 128),
    }

    def load(self, target: Target) -> None:
        importlib.import_module("ai_edge_litert.interpreter")

    def version(self) -> str:
        """Versions of its packages; a device that only runs files has no converter."""
        found = []
        for name in self.packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{name} {importlib.metadata.version(name)}")
        return ", ".join(found)

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        from featherweight.formats import FloatCast, IntQuant

        if weight is None and activation is None:
            return True
        if isinstance(weight, FloatCast):
            return activation is None and weight.dtype == "float16" and op in _WEIGHTED
        for fmt, role in ((weight, "weight"), (activation, "activation")):
            if fmt is None:
                continue
            try:
                self.realise(fmt, target, role)  # type: ignore[arg-type]
            except TargetError:
                return False
        if isinstance(weight, IntQuant) and weight.width < 8:
            return op == "linear" and activation is None
        if weight is not None:
            return op in _WEIGHTED
        return op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.formats import FloatCast, IntQuant, PerChannel, PerGroup

        if isinstance(fmt, FloatCast) and role == "weight" and fmt.dtype == "float16":
            return fmt
        grouped = isinstance(fmt, IntQuant) and isinstance(fmt.granularity, PerGroup)
        widths = {"activation": (8,), "weight": (4,) if grouped else (4, 8)}
        if not isinstance(fmt, IntQuant) or fmt.width not in widths[role]:
            raise TargetError(
                f"litert cannot store {_words(fmt)} here",
                fix="use int8 for weights and activations, or int4 or float16 for weights alone",
            )
        if isinstance(fmt.granularity, PerGroup) and (fmt.granularity.axis != 1 or fmt.granularity.size % 32):
            raise TargetError(
                f"litert has no kernels for {_words(fmt)} of {fmt.granularity.size}",
                fix="use groups of 32, 64 or 128 elements along the rows",
            )
        if role == "activation":
            if isinstance(fmt.granularity, PerChannel):
                raise TargetError(
                    "litert has no kernels for activations per channel",
                    fix="use granularity: per_tensor for activations",
                )
            positive = fmt.symmetric and bool((fmt.low >= 0).all())
            return replace(fmt, signed=True, symmetric=fmt.symmetric and not positive)
        if not fmt.symmetric:
            raise TargetError("litert has no kernels for asymmetric weights", fix="use symmetric weights")
        return replace(fmt, signed=True)

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.tools.palettes import in_floats

        model = in_floats(model)
        files: dict[str, str] = {}
        details: dict[str, Any] = {}
        for entry in model.entries:
            files[entry] = "model.tflite" if entry == "forward" else f"model.{entry}.tflite"
            details[entry] = self._lower(model, entry, target, out / files[entry])
        values = {entry: told.pop("values") for entry, told in details.items()}
        return Artifact(self.name, out, tuple(files.values()), files, {"values": values, "entries": details})

    def _lower(self, model: Model, entry: str, target: Target, file: Path) -> dict[str, Any]:
        import torch

        from featherweight.exchange.opaque import opaque_layers
        from featherweight.runtimes._child import convert

        if opaque := opaque_layers(model.module):
            raise TargetError(
                f"litert cannot run '{next(iter(opaque))}', which only ONNX Runtime has a kernel for",
                fix="lower for onnxruntime",
            )
        graph, batched = _one_example(model, entry)
        plan = self._plan(model, entry, graph, target) | {"batched": batched}
        with tempfile.TemporaryDirectory(prefix="featherweight-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns of its own internals
            program, words = Path(folder) / "program.pt2", Path(folder) / "plan.json"
            torch.export.save(_with_examples(graph), program)
            words.write_text(json.dumps(plan))
            told = convert(
                self.name,
                "featherweight.runtimes._litert_convert:convert",
                {"program": str(program), "plan": str(words), "out": str(file)},
            )
        outputs = [graph.values[name] for name in graph.outputs]
        return {
            **told,
            "batched": batched,
            "shapes": {name: list(graph.values[name].shape) for name in told["values"]},
            "outputs": [
                [name, str(value.dtype).removeprefix("torch.")]
                for name, value in zip(model.entries[entry].output_names, outputs, strict=True)
            ],
        }

    def _plan(self, model: Model, entry: str, graph: Graph, target: Target) -> dict[str, Any]:
        """What the child must know: names, formats, and which values to mark."""
        from featherweight.formats import FloatCast, encode

        program = graph.program
        names = {
            spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs if spec.target
        }
        parameters = {names[fx]: name for fx, name in graph.parameters.items()}
        present = {*graph.values, *parameters.values()}
        formats: dict[str, TensorFormat] = {}
        for name, chain in model.formats.items():
            if name in present:
                role: Role = "activation" if name in graph.values else "weight"
                formats[name] = self.realise(chain[-1], target, role)
        marks = {name for name in formats if name in graph.values}
        for node in graph:
            stored = [formats[name] for name in node.parameters.values() if name in formats]
            if stored:
                marks.update(node.inputs)
            if any(not isinstance(fmt, FloatCast) for fmt in stored):
                marks.add(_behind_clamps(graph, node.outputs[0]))
        places = _places(graph)
        return {
            "inputs": list(model.entries[entry].input_names),
            "outputs": list(model.entries[entry].output_names),
            "parameters": parameters,
            "formats": {name: encode(fmt) for name, fmt in formats.items()},
            "dynamic": bool(target.options.get("dynamic", False)),
            "marks": {place: name for place, name in places.items() if name in marks},
            "values": places,
        }

    def open(self, artifact: Artifact, target: Target) -> Session:
        from featherweight.runtimes._litert_session import LiteRTSession

        return LiteRTSession(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        from featherweight.runtimes._litert_graph import FlatGraph

        found: dict[str, Stored] = {}
        for entry, file in artifact.entries.items():
            graph = FlatGraph.read(artifact.folder / file)
            for tensor in {int(index) for operator in graph.operators for index in operator.inputs}:
                if graph.is_constant(tensor):
                    name = graph.name(tensor)
                    found[name] = Stored(name, graph.dtype(tensor), graph.size(tensor))
            for name, twin in artifact.details["entries"][entry]["twins"].items():
                if twin in found:
                    found.setdefault(name, replace(found[twin], name=name))
        return found

    def tunings(self, target: Target) -> Sequence[Mapping[str, Json]]:
        return [{"threads": count} for count in range(1, target.threads)]

    def values(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Mapping[str, np.ndarray]:
        from featherweight.runtimes._litert_look import values

        return values(artifact, target, inputs, entry)

    def kernels(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Sequence[Kernel]:
        from featherweight.runtimes._litert_look import kernels

        return kernels(artifact, target, inputs, entry)

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        from featherweight.runtimes._litert_loaders import loaders

        return loaders(artifact, target, signature)


PLUGIN = LiteRT


def _words(fmt: TensorFormat) -> str:
    from featherweight.formats import FloatCast, IntQuant

    if isinstance(fmt, FloatCast):
        return fmt.dtype
    if isinstance(fmt, IntQuant):
        shared = type(fmt.granularity).__name__.removeprefix("Per").lower()
        return f"{fmt.width}-bit integers per {shared}"
    return type(fmt).__name__


def _one_example(model: Model, entry: str) -> tuple[Graph, list[int]]:
    """The entry traced for a single example of fixed sizes, and which inputs have a row per example."""
    from featherweight.graph import trace

    how = model.entries[entry]
    batched = [i for i, name in enumerate(how.input_names) if 0 in how.dynamic_axes.get(name, {})]
    examples = tuple(x[:1] if i in batched else x for i, x in enumerate(how.example_inputs))
    single = replace(how, example_inputs=examples, dynamic_axes={})
    return trace(replace(model, entries={entry: single}, traced={}), entry), batched


def _with_examples(graph: Graph) -> Any:
    """The program with random examples instead of the user's data."""
    import torch

    program = graph.program
    random = torch.Generator().manual_seed(0)
    args, kwargs = program.example_inputs
    made = [
        torch.randn(x.shape, generator=random, dtype=x.dtype) if x.is_floating_point() else x
        for x in torch.utils._pytree.tree_leaves(args)
    ]
    program.example_inputs = (
        torch.utils._pytree.tree_unflatten(made, torch.utils._pytree.tree_structure(args)),
        kwargs,
    )
    return program


def _places(graph: Graph) -> dict[str, str]:
    """Which call of the program, or which input, makes a value: names of nodes change when they are saved."""
    names = {value.fx_name: name for name, value in graph.values.items()}
    calls = [node.name for node in graph.program.graph.nodes if node.op == "call_function"]
    made = {f"call {i}": names[name] for i, name in enumerate(calls) if name in names}
    inputs = [name for name in graph.program.graph_signature.user_inputs if isinstance(name, str)]
    return made | {f"input {i}": names[name] for i, name in enumerate(inputs) if name in names}


def _behind_clamps(graph: Graph, value: str) -> str:
    """The value, or that of the clamps which alone read it and which kernels absorb."""
    while value not in graph.outputs:
        readers = graph.consumers[value]
        if len(readers) != 1 or readers[0].op not in _CLAMPS:
            break
        value = readers[0].outputs[0]
    return value
