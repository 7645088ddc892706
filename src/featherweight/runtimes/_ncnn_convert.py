"""pnnx in the converter's child: TorchScript to ncnn's files, and what each blob holds for one example."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from featherweight.errors import TargetError
from featherweight.runtimes._ncnn_file import Layer, array, listed, read_param, write_param

if TYPE_CHECKING:
    import ncnn

_MOST_AXES = 4
_LOOSE = re.compile(r"^ignore (\S+) (\S+) param (\w+)=(.*)$", re.MULTILINE)


def convert(program: str, inputs: str, outputs: str, param: str, binary: str, blobs: str) -> dict[str, Any]:
    """Turn a traced module into float files and compute every blob of one example.

    Args:
        program: File of ``torch.jit.save``.
        inputs: The example's inputs by name, in order, batch 1 (``.safetensors``).
        outputs: What PyTorch makes of it, by blob (``.safetensors``).
        param: File to write.
        binary: File to write.
        blobs: File to write: name -> what the blob holds (``.safetensors``).
    """
    import pnnx

    examples = list(load_file(inputs).values())
    shapes = ",".join(f"[{','.join(map(str, x.shape))}]{_letter(x)}" for x in examples)
    with tempfile.TemporaryDirectory() as folder:
        command = [pnnx.EXEC_PATH, program, f"inputshape={shapes}", "fp16=0"]
        command += [f"ncnnparam={param}", f"ncnnbin={binary}"]
        for name in ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy"):
            command.append(f"{name}={folder}/{name}")
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "1"}
        )
    said = done.stdout + done.stderr
    if done.returncode != 0 or not Path(param).is_file() or not Path(binary).is_file():
        last = [line for line in said.splitlines() if line.strip()][-1:]
        raise TargetError(f"pnnx failed: {' '.join(last)[:300]}", fix="take another runtime")
    _repair(Path(param), said)
    return {"keep_batch": _save_blobs(param, binary, examples, load_file(outputs), blobs)}


def _save_blobs(
    param: str, binary: str, examples: list[np.ndarray], outputs: dict[str, np.ndarray], blobs: str
) -> bool:
    """Compute every blob, and tell whether ncnn is to be given the batch: where nothing in a model shows
    which axis is the batch, pnnx keeps it.
    """
    from featherweight.runtimes._ncnn_session import same

    error = TargetError(
        "pnnx made something else of this model: its outputs differ from PyTorch's",
        fix="take another runtime, or write the model with other operators",
    )
    for keep_batch in (False, True):
        if keep_batch and any(x.ndim > _MOST_AXES for x in examples):
            break
        try:
            found = _blobs(param, binary, examples, keep_batch=keep_batch)
        except TargetError as refused:
            error = refused
            continue
        if all(name in found and same(found[name], wanted) for name, wanted in outputs.items()):
            save_file(found, blobs)
            return keep_batch
    raise error


def _letter(x: np.ndarray) -> str:
    return {"float32": "f32", "int64": "i64", "int32": "i32", "bool": "bool"}.get(x.dtype.name, "f32")


def _repair(param: Path, said: str) -> None:
    """Write what pnnx left in PyTorch's words with ncnn's layers, or say what that was."""
    import ncnn

    loose: dict[str, dict[str, str]] = {}
    for kind, name, key, value in _LOOSE.findall(said):
        loose.setdefault(f"{kind} {name}", {})[key] = value
    layers: list[Layer] = []
    aliases: dict[str, str] = {}
    for layer in read_param(param.read_text()):
        layer.inputs = [aliases.get(name, name) for name in layer.inputs]
        asked = loose.get(f"{layer.type} {layer.name}", {})
        if layer.type == "Tensor.reshape" and "_ncnnbatch2dim" in layer.name:
            aliases[layer.outputs[0]] = layer.inputs[0]  # it would only have put the batch back
        elif layer.type == "torch.unbind":
            layers += _unbind(layer, int(asked.get("dim", 0)))
        else:
            layers.append(layer)
    unknown = dict.fromkeys(layer.type for layer in layers if ncnn.layer_to_index(layer.type) < 0)
    if unknown:
        raise TargetError(
            f"pnnx has no ncnn layer for {', '.join(unknown)}",
            where=", ".join(layer.name for layer in layers if layer.type in unknown)[:300],
            fix="write the model with other operators, or take another runtime",
        )
    param.write_text(write_param(layers))


def _unbind(layer: Layer, axis: int) -> list[Layer]:
    """Slices of one each, without that axis."""
    axis = max(axis - 1, 0)
    parts = [f"{name}.slice" for name in layer.outputs]
    cut = Layer(
        "Slice", layer.name, layer.inputs, parts, {listed(0): array([-233] * len(parts)), 1: str(axis)}
    )
    squeeze = {listed(3): array([axis])}
    return [
        cut,
        *(Layer("Squeeze", f"{layer.name}.{i}", [part], [name], squeeze)
          for i, (part, name) in enumerate(zip(parts, layer.outputs, strict=True))),
    ]  # fmt: skip


def _blobs(param: str, binary: str, examples: list[np.ndarray], *, keep_batch: bool) -> dict[str, np.ndarray]:
    """What each blob holds."""
    from featherweight.runtimes._ncnn_session import load, start

    net = load(param, binary, 1, {"lightmode": False})
    extractor, held = start(net, examples, 0, keep_batch=keep_batch)
    found = {blob.name: _extracted(extractor, blob.name) for blob in net.blobs()}
    del extractor, held
    return found


def _extracted(extractor: ncnn.Extractor, name: str) -> np.ndarray:
    code, blob = extractor.extract(name)
    if code != 0:
        raise TargetError(
            f"ncnn cannot compute what pnnx wrote: it stops at blob '{name}'", fix="take another runtime"
        )
    return np.array(blob, order="C")


def run(
    param: str, binary: str, inputs: str, answer: str, returned: list[str], keep_batch: bool
) -> dict[str, Any]:
    """Compute the outputs of one example from finished files."""
    from featherweight.runtimes._ncnn_session import load, start

    net = load(param, binary, 1, {})
    extractor, held = start(net, list(load_file(inputs).values()), 0, keep_batch=keep_batch)
    save_file({name: _extracted(extractor, name) for name in returned}, answer)
    del extractor, held
    return {}
