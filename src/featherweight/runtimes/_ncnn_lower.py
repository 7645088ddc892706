"""Model -> TorchScript -> pnnx -> ncnn's files with formats in them, checked against what was asked."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import TargetError
from featherweight.formats import FloatCast, IntQuant, TensorFormat
from featherweight.graph import trace
from featherweight.model import Entry, Model
from featherweight.runtime import Artifact, Target
from featherweight.runtimes import _child
from featherweight.runtimes._ncnn_file import Layer, read, write
from featherweight.runtimes._ncnn_formats import Network, store
from featherweight.runtimes._ncnn_fuse import fuse
from featherweight.runtimes._ncnn_match import match
from featherweight.tools.simulate import Replay, simulate, sqnr_db

if TYPE_CHECKING:
    from featherweight.runtimes.ncnn import Ncnn

_INPUTS = "inputs"
_NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "PReLU")
_LEAST_DB, _SPARE_DB = (
    15.0,
    3.0,
)  # below, and noisier than the formats themselves, the file does something else


def lower(runtime: Ncnn, model: Model, target: Target, out: Path) -> Artifact:
    """Write ``model.param`` and ``model.bin``, and such a pair for each other entry."""
    files: dict[str, str] = {}
    details: dict[str, dict[str, Any]] = {}
    for entry in model.entries:
        stem = "model" if entry == "forward" else f"model.{entry}"
        files[entry] = f"{stem}.param"
        for key, value in _lower(runtime, model, entry, target, out / stem).items():
            details.setdefault(key, {})[entry] = value
    both = [name for file in files.values() for name in (file, file.removesuffix("param") + "bin")]
    artifact = Artifact(runtime.name, out, tuple(both), files, json.loads(json.dumps(details)))
    _check_dtypes(runtime, model, artifact)
    return artifact


def _lower(runtime: Ncnn, model: Model, entry: str, target: Target, stem: Path) -> dict[str, Any]:
    graph = trace(model, entry)
    example = _first(model.entries[entry])
    values, outputs = _replay(model, entry, example)
    present = {*graph.values, *(name for node in graph for name in node.parameters.values())}
    state = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
    formats = {
        name: tuple(
            runtime.realise(fmt, target, "weight" if name in state else "activation") for fmt in chain
        )
        for name, chain in model.formats.items()
        if name in present
    }
    with tempfile.TemporaryDirectory() as folder:
        returned = {f"out{index}": x.numpy() for index, x in enumerate(outputs)}
        layers, blobs, keep_batch = _convert(runtime, model, entry, example, returned, Path(folder))
        tensors = {n: t.detach().numpy() for n, t in state.items() if n in present and t.is_floating_point()}
        found = match(graph, layers, tensors, values, blobs)
        shapes = {name: blob.shape for name, blob in blobs.items()}
        layers = fuse(layers, shapes)
        network = Network(layers, found, formats, state, shapes, list(returned))
        steps = store(network)
        param, binary = stem.with_name(f"{stem.name}.param"), stem.with_name(f"{stem.name}.bin")
        write(network.layers, network.outputs, param, binary)
        _check_run(
            runtime,
            model.evolve(formats=formats),
            entry,
            example,
            outputs,
            (param, binary),
            Path(folder),
            keep_batch,
        )
    there = {name for layer in network.layers for name in layer.outputs}
    return {
        "signatures": {
            "inputs": _described(model.entries[entry].input_names, example),
            "batched": keep_batch,
            "outputs": [[b, *d[1:]] for b, d in zip(returned, _described(returned, outputs), strict=True)],
        },
        "parameters": found.parameters,
        "values": {n: b for n, b in found.values.items() if b in there and values[n].shape[:1] == (1,)},
        "shapes": {name: value.shape[1:] for name, value in values.items() if value.shape[:1] == (1,)},
        "steps": steps,
        "half": _all_half(network.layers),
    }


def _all_half(layers: list[Layer]) -> bool:
    """Whether every weight is stored in half precision, so that keeping them so in memory loses nothing."""
    kinds = [
        tensor.dtype
        for layer in layers
        for role, tensor in layer.tensors.items()
        if role.startswith("weight") and layer.type not in _NORMS
    ]
    return bool(kinds) and all(kind == np.float16 for kind in kinds)


def _described(names: Any, tensors: tuple[Tensor, ...]) -> list[list[Any]]:
    return [
        [name, str(x.dtype).removeprefix("torch."), list(x.shape[1:])]
        for name, x in zip(names, tensors, strict=True)
    ]


def _first(entry: Entry) -> tuple[Tensor, ...]:
    """The first example, alone."""
    if any(x.dim() == 0 for x in entry.example_inputs):
        raise TargetError(
            "ncnn takes tensors with a batch in front, not single numbers", fix="take another runtime"
        )
    return tuple(x[:1].clone() for x in entry.example_inputs)


def _replay(
    model: Model, entry: str, example: tuple[Tensor, ...]
) -> tuple[dict[str, np.ndarray], tuple[Tensor, ...]]:
    """Every traced value of one example, without the batch where there is one, and the outputs."""
    values: dict[str, np.ndarray] = {}

    def observe(name: str, value: Tensor) -> Tensor:
        values[name] = value.detach().numpy()
        return value

    with torch.no_grad():
        outputs = Replay(model, entry)(example, observe)
    if any(x.dim() == 0 or len(x) != 1 for x in outputs):
        raise TargetError(
            "an output has no batch in front, which ncnn cannot tell apart", fix="take another runtime"
        )
    return values, outputs


# ---- pnnx


class _Opened(nn.MultiheadAttention):
    """Attention that pnnx does not know and so takes apart: ncnn's own layer stores them in one way."""


class _Flat(nn.Module):
    """An entry on flat tensors, for torch.jit.trace."""

    def __init__(self, module: nn.Module, entry: Entry) -> None:
        super().__init__()
        self.module = module
        self.entry = entry

    def forward(self, *inputs: Tensor) -> Any:
        result = getattr(self.module, self.entry.method)(*self.entry.arguments(inputs))
        flat = tuple(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        return flat[0] if len(flat) == 1 else flat


def _convert(
    runtime: Ncnn,
    model: Model,
    entry: str,
    example: tuple[Tensor, ...],
    outputs: Mapping[str, np.ndarray],
    folder: Path,
) -> tuple[list[Layer], dict[str, np.ndarray], bool]:
    """Float layers, what each blob holds for the example, and whether ncnn is given its batch."""
    module = _untied(model.copy_module())
    for name, layer in module.named_modules():
        own = (fmt for n, chain in model.formats.items() if n.startswith(f"{name}.") for fmt in chain)
        if isinstance(layer, nn.MultiheadAttention) and any(own):
            layer.__class__ = _Opened
    paths = {
        name: str(folder / name) for name in ("program.pt", _INPUTS, "outputs", "a.param", "a.bin", "blobs")
    }
    with warnings.catch_warnings(), torch.no_grad(), _plain_attention():
        warnings.simplefilter("ignore")  # the tracer warns of what torch.export has checked
        try:
            script: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
                _Flat(module, model.entries[entry]), example, check_trace=False
            )
            torch.jit.save(script, paths["program.pt"])
        except Exception as error:  # whatever user code or the tracer raises is told as one error
            words = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise TargetError(
                f"torch.jit.trace, which pnnx needs, cannot follow the model: {' '.join(words)[:300]}",
                fix="take another runtime",
            ) from error
    inputs = {f"in{i:03}": np.ascontiguousarray(x.numpy()) for i, x in enumerate(example)}
    save_file(inputs, paths[_INPUTS])
    save_file({name: np.ascontiguousarray(x) for name, x in outputs.items()}, paths["outputs"])
    arguments = dict(
        zip(("program", "inputs", "outputs", "param", "binary", "blobs"), paths.values(), strict=True)
    )
    told = _child.convert(runtime.name, "featherweight.runtimes._ncnn_convert:convert", arguments)
    layers = read(folder / "a.param", folder / "a.bin")
    blobs = load_file(paths["blobs"])
    there = {name: blobs[name] for layer in layers for name in layer.outputs}
    return layers, there, told["keep_batch"]


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Transformer layers by the operators that they consist of, not by one that only PyTorch has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _untied(module: nn.Module) -> nn.Module:
    """Each layer with parameters of its own: pnnx takes a shared one for an input."""
    for layer in module.modules():
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                layer._parameters[name] = nn.Parameter(copy.deepcopy(parameter.detach()), requires_grad=False)
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
    return module.eval()


# ---- checks


def _check_run(
    runtime: Ncnn,
    model: Model,
    entry: str,
    example: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    files: tuple[Path, Path],
    folder: Path,
    keep_batch: bool,
) -> None:
    """Run what was written once, in the child, against the simulation."""
    given = {"param": str(files[0]), "binary": str(files[1]), "inputs": str(folder / _INPUTS)}
    answer = folder / "answer"
    arguments = {**given, "answer": str(answer), "keep_batch": keep_batch}
    arguments["returned"] = [f"out{index}" for index in range(len(outputs))]
    _child.convert(runtime.name, "featherweight.runtimes._ncnn_convert:run", arguments)
    with torch.no_grad():
        wanted = simulate(model, entry)(*example)
    stored = load_file(answer)
    for index, (x, exact) in enumerate(zip(wanted, outputs, strict=True)):
        simulated, seen = x.numpy(), stored[f"out{index}"].reshape(x.shape)
        if _decibels(simulated, seen) < min(_LEAST_DB, _decibels(exact.numpy(), simulated) - _SPARE_DB):
            raise TargetError(
                f"ncnn computes something else from '{files[0].name}' than the formats say",
                fix="exclude layers under where, or take another runtime",
            )


def _decibels(signal: np.ndarray, other: np.ndarray) -> float:
    one, two = signal.astype(np.float64), other.astype(np.float64)
    return sqnr_db(float((one**2).sum()), float(((one - two) ** 2).sum()))


def _check_dtypes(runtime: Ncnn, model: Model, artifact: Artifact) -> None:
    """No format may be lost in silence."""
    stored = runtime.stored(artifact)
    for name, chain in model.formats.items():
        if name in stored and (wanted := _dtype(chain[-1])) != stored[name].dtype:
            raise TargetError(f"ncnn stored '{name}' as {stored[name].dtype}, not {wanted}", fix="report it")


def _dtype(fmt: TensorFormat) -> str:
    if isinstance(fmt, FloatCast):
        return fmt.dtype
    return f"int{fmt.width}" if isinstance(fmt, IntQuant) else "float32"
