"""ExecuTorch on CPU: one .pte file per entry, delegated to XNNPACK as far as it goes.

What XNNPACK's kernels ask for: signed asymmetric activations per tensor and symmetric weights per channel; a
layer runs in integers only where both its input and its output are integers, so outputs of layers are
rounded too. A linear layer whose neighbours are floats has its input rounded anew at each call, row by row
(weights of int8, or of int4 per channel or per group of a multiple of 32, whose scales are bfloat16).

The file holds one example, whatever the batch of the model: fixed sizes let XNNPACK take slices and reshapes
that it refuses otherwise, and the session calls it once for each example. ExecuTorch's Python bindings need
torch beside them. Their thread pool is one of the process: the session sets it to the target's threads.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError, nearest
from featherweight.runtime import Artifact, Json, Kernel, Role, Runtime, Session, Signature, Stored, Target
from featherweight.runtimes import _executorch_loaders as loaders
from featherweight.runtimes._child import convert

if TYPE_CHECKING:
    from featherweight.formats import IntQuant, TensorFormat
    from featherweight.model import Model

_LAYERS = frozenset({"conv1d", "conv2d", "linear"})
_ACTIVATIONS_ONLY = frozenset({"add", "mul", "cat", "adaptive_avg_pool2d"})
_PASSED_THROUGH = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze"}
)
_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp"})
_ONE_GRID = _PASSED_THROUGH | _CLAMPS | {"cat"}
_GROUP = 32  # of which a group of 4-bit weights is a multiple
_OPTIONS = ("threads",)


class ExecuTorch(Runtime):
    """PyTorch's runtime for devices, with the XNNPACK delegate."""

    extra = "executorch"
    packages = ("executorch",)
    module = "executorch"
    float_outputs = frozenset({"linear"})
    one_grid = frozenset({"cat"})

    def load(self, target: Target) -> None:
        _bindings()

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        from featherweight.formats import Dynamic

        if weight is None and activation is None:
            return True
        if isinstance(activation, Dynamic):
            return False
        if activation is None:
            return op == "linear" and weight is not None and _refused(weight, "weight") is None
        if weight is not None:
            return op in _LAYERS and weight.width == 8 and activation.width == 8
        return activation.width == 8 and op in _ACTIVATIONS_ONLY | _PASSED_THROUGH | _CLAMPS

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        refused = _refused(fmt, role)
        if refused is not None:
            raise TargetError(f"executorch {refused[0]}", fix=refused[1])
        grid: IntQuant = fmt  # type: ignore[assignment]
        grid = replace(grid, signed=True, readers=None)
        return _bfloat_scales(grid) if role == "weight" else grid

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.exchange.pt2e import quantized_program
        from featherweight.runtimes._executorch_graph import delegable
        from featherweight.tools.palettes import in_floats

        model = in_floats(model)
        files: dict[str, str] = {}
        tensors: dict[str, Mapping[str, str]] = {}
        batched: dict[str, Json] = {}
        for entry in model.entries:
            made = quantized_program(
                model,
                entry,
                lambda fmt, role: self.realise(fmt, target, role),
                one_grid=_ONE_GRID,
                dynamic=True,
                rewrite=delegable,
            )
            files[entry] = "model.pte" if entry == "forward" else f"model.{entry}.pte"
            _check(made)
            _convert(self.name, made.program, out / files[entry])
            tensors[entry] = _stored_as(model, made, out / files[entry])
            batched[entry] = _batched(model, entry)
        details: dict[str, Any] = {"tensors": tensors, "batched": batched}
        return Artifact(self.name, out, tuple(files.values()), files, details)

    def open(self, artifact: Artifact, target: Target) -> Session:
        return _Session(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        from featherweight.runtimes._executorch_file import read

        found: dict[str, Stored] = {}
        for entry, file in artifact.entries.items():
            constants = read(artifact.folder / file).constants
            for name, key in artifact.details["tensors"][entry].items():
                found[name] = Stored(name, *constants[key])
        return found

    def tunings(self, target: Target) -> Sequence[Mapping[str, Json]]:
        return [{"threads": threads} for threads in range(target.threads - 1, 0, -1)]

    def kernels(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Sequence[Kernel]:
        """Steps of the delegates, and plain kernels; without times, since packages have no event tracer."""
        from featherweight.runtimes._executorch_file import read

        kernels: list[Kernel] = []
        for place, part in enumerate(read(artifact.folder / artifact.entries[entry]).chain):
            if isinstance(part, str):
                op = part.removeprefix("aten::").partition(".")[0]
                kernels.append(Kernel(f"{place}.{op}", op, fast=False, note="not delegated to XNNPACK"))
                continue
            kernels += [
                Kernel(f"{place}.{index}.{step.op}", step.op, part.computes(step))
                for index, step in enumerate(part.steps)
            ]
        return kernels

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        return loaders.texts(artifact.entries[signature.entry], _threads(target), signature)


PLUGIN = ExecuTorch


def _refused(fmt: TensorFormat, role: Role) -> tuple[str, str] | None:
    """Why a format cannot be stored, and what can."""
    from featherweight.formats import IntQuant, PerChannel, PerGroup, PerTensor

    if not isinstance(fmt, IntQuant):
        return "computes in float32 or integers alone", "use int8 for weights and activations, or no format"
    if role == "activation":
        if fmt.width != 8:
            return f"has no activations of {fmt.width}-bit integers", "use int8"
        if not isinstance(fmt.granularity, PerTensor):
            return "has no kernels for activations per channel", "use granularity: per_tensor for activations"
        return None
    if not fmt.symmetric:
        return "has no kernels for asymmetric weights", "use symmetric weights"
    if fmt.width == 8:
        if isinstance(fmt.granularity, PerGroup):
            return "stores groups of weights as 4-bit integers only", "use granularity: per_channel for int8"
        return None
    if fmt.width != 4:
        return f"stores no weights as {fmt.width}-bit integers", "use int8, or int4 for linear layers"
    if isinstance(fmt.granularity, PerGroup):
        if fmt.granularity.axis != 1 or fmt.granularity.size % _GROUP:
            return f"stores int4 in groups of a multiple of {_GROUP} inputs", f"use groups of {_GROUP}"
        return None
    if not isinstance(fmt.granularity, PerChannel) or fmt.granularity.axis != 0:
        return "stores int4 per channel or per group", "use granularity: per_channel or per_group"
    return None


def _bfloat_scales(fmt: IntQuant) -> IntQuant:
    """Scales of groups are stored as bfloat16; the range follows them."""
    import torch

    from featherweight.formats import PerGroup

    if not isinstance(fmt.granularity, PerGroup):
        return fmt
    scale, _ = fmt.grid()
    stored = scale.to(torch.bfloat16).float()
    if torch.equal(stored, scale):
        return fmt
    limit = stored * fmt.quant_max
    return replace(fmt, low=-limit, high=limit)


def _check(made: Any) -> None:
    """Refuse what XNNPACK has no kernel for, before its converter says so in its own words.

    Raises:
        TargetError: A convolution has integer weights between floats.
    """
    from featherweight.runtimes._executorch_names import refused

    name = refused(made)
    if name is not None:
        raise TargetError(
            f"executorch cannot run the convolution of '{name}' in integers between floats",
            where="XNNPACK has such kernels for linear layers and ordinary 2-D convolutions",
            fix="quantize what it reads and makes too, or exclude the layer under where",
        )


def _convert(name: str, program: Any, path: Path) -> None:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "program.pt2"
        torch.export.save(program, saved)
        arguments = {"program": str(saved), "out": str(path)}
        convert(name, "featherweight.runtimes._executorch_convert:convert", arguments)


def _stored_as(model: Model, made: Any, path: Path) -> dict[str, str]:
    """Parameter -> digest of the bytes that hold it in the file.

    Raises:
        TargetError: A weight that has a format is not in the file as it should be.
    """
    from featherweight.runtimes._executorch_names import find

    found, missing = find(made, path)
    lost = sorted(name for name in missing if name in model.formats)
    if lost:
        raise TargetError(
            f"executorch did not store '{lost[0]}' in its format"
            + (f", nor {len(lost) - 1} more" if len(lost) > 1 else ""),
            where="its layer is not delegated to XNNPACK as an integer one",
            fix="exclude the layer under where, or quantize what it reads and makes too",
        )
    return found


def _batched(model: Model, entry: str) -> Json:
    """Which inputs and outputs are cut into single examples along their first axis."""
    from featherweight.graph import trace

    how, graph = model.entries[entry], trace(model, entry)
    inputs = [0 in how.dynamic_axes.get(name, {}) for name in how.input_names]
    size = next((x.shape[0] for x, cut in zip(how.example_inputs, inputs, strict=True) if cut), None)
    shapes = [graph.values[name].shape for name in graph.outputs]
    return {"inputs": list(inputs), "outputs": [bool(shape) and shape[0] == size for shape in shapes]}


def _threads(target: Target) -> int:
    """How many threads the pool gets.

    Raises:
        TargetError: An option is unknown or no number of threads.
    """
    for name in target.options:
        if name not in _OPTIONS:
            raise TargetError(f"executorch has no option '{name}'", fix=nearest(name, _OPTIONS))
    threads = target.options.get("threads", target.threads)
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise TargetError(f"executorch's option 'threads' cannot be {threads!r}", fix="give a number from 1")
    return threads


def _bindings() -> Any:
    """The compiled module alone; the Python one around it imports the exporter, a second's work."""
    importlib.import_module("torch")  # whose libraries the module is linked with
    return importlib.import_module("executorch.extension.pybindings._portable_lib")


class _Session:
    """Opened files. A change of the pool's size ends the pool that loaded files hold, so they load again."""

    def __init__(self, artifact: Artifact, target: Target) -> None:
        self._threads = _threads(target)
        self._files = {entry: artifact.folder / file for entry, file in artifact.entries.items()}
        self._batched = artifact.details["batched"]
        self._modules: dict[str, Any] = {}
        self._load()

    def _load(self) -> None:
        bindings = _bindings()
        self._modules.clear()
        if bindings._threadpool_get_thread_count() != self._threads:
            bindings._unsafe_reset_threadpool(self._threads)
        self._size = bindings._threadpool_get_thread_count
        self._modules = {
            entry: bindings._load_for_executorch(os.fspath(file)) for entry, file in self._files.items()
        }

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        if self._size() != self._threads:
            self._load()
        cut, joined = self._batched[entry]["inputs"], self._batched[entry]["outputs"]
        pairs = list(zip(inputs, cut, strict=True))
        count = next((len(x) for x, by_example in pairs if by_example), 1)
        rows = [
            self._run(entry, [x[i : i + 1] if by_example else x for x, by_example in pairs])
            for i in range(count)
        ]
        if count == 1:
            return rows[0]
        if not rows:
            empty = self._run(entry, [np.zeros((1, *x.shape[1:]), x.dtype) if c else x for x, c in pairs])
            return tuple(y[:0] if by_example else y for y, by_example in zip(empty, joined, strict=True))
        columns = zip(*rows, strict=True)
        return tuple(
            np.concatenate(column) if by_example else column[0]
            for column, by_example in zip(columns, joined, strict=True)
        )

    def _run(self, entry: str, inputs: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        import torch

        tensors = [torch.from_numpy(np.require(x, requirements=["C", "W"])) for x in inputs]
        try:
            outputs = self._modules[entry].run_method("forward", tensors)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
            meta = self._modules[entry].method_meta("forward")
            wanted = [meta.input_tensor_meta(i).sizes() for i in range(meta.num_inputs())]
            raise TargetError(
                f"executorch cannot run the entry '{entry}' on inputs of {shapes}: {error}",
                fix=f"this file takes {', '.join(map(str, wanted))} for each example",
            ) from error
        return tuple(output.numpy() for output in outputs)
