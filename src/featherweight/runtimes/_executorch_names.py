"""Finds the parameters of a program among the constants of its .pte file, by the bytes that they become.

Part of ``executorch.py``. XNNPACK keeps no names: a constant is known by the digest of its bytes, in the
layout that its kernels read. So each tensor is laid out in all the ways that there are, and looked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.exchange.pt2e import QuantizedProgram
from featherweight.runtimes._executorch_file import Delegate, Program, Step, read

_LAYERS = frozenset({"Conv2d", "DepthwiseConv2d", "ConvTranspose2d", "FullyConnected"})
_LINEAR = frozenset({"linear", "conv1d", "conv2d", "convolution"})


def find(made: QuantizedProgram, path: Path) -> tuple[dict[str, str], list[str]]:
    """Parameter -> digest of its bytes in the file, and the parameters that are not found."""
    file = read(path)
    stored = _tensors(made)
    found: dict[str, str] = {}
    for name, parameter in made.tensors.items():
        if name not in stored:
            continue
        digests = (hashlib.sha256(data).hexdigest() for data in _layouts(stored[name]))
        key = next((key for key in digests if key in file.constants), None)
        if key is not None and _as_meant(stored[name], file.constants[key][0]):
            found[parameter] = key
    biases = _biases(made, file, found)
    found = {**biases, **found}
    return found, [name for name in made.tensors.values() if name not in found]


def _tensors(made: QuantizedProgram) -> dict[str, Tensor]:
    program = made.program
    return {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}


def _as_meant(tensor: Tensor, kind: str) -> bool:
    """Whether integers are stored as integers, and floats as floats."""
    return (tensor.dtype == torch.int8) == (kind in ("int8", "int4"))


def _layouts(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor in each layout: as it is, channels last, channels swapped, packed by two."""
    yield _bytes(tensor)
    if tensor.dim() in (3, 4):
        image = tensor.unsqueeze(-1) if tensor.dim() == 3 else tensor
        for turned in (image, image.transpose(0, 1)):
            yield _bytes(turned.permute(0, 2, 3, 1))
        for turned in () if tensor.dim() == 4 else (tensor.unsqueeze(2), tensor.unsqueeze(2).transpose(0, 1)):
            yield _bytes(turned.permute(0, 2, 3, 1))
    if tensor.dtype == torch.int8 and tensor.dim() == 2:
        even = torch.nn.functional.pad(tensor, (0, tensor.shape[1] % 2)).to(torch.uint8) + 8
        flat = even.reshape(-1)
        yield _bytes(flat[1::2] << 4 | flat[::2])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def _biases(made: QuantizedProgram, file: Program, weights: dict[str, str]) -> dict[str, str]:
    """Biases that XNNPACK made integers of: those beside a weight that was found."""
    beside: dict[str, list[str]] = {}
    for weight, bias in _pairs(made):
        beside.setdefault(weight, []).append(bias)
    found: dict[str, str] = {}
    names = {key: name for name, key in weights.items()}
    for delegate in file.delegates:
        for step in delegate.steps:
            key, stored = _layer(delegate, step)
            left = beside.get(names.get(key or "", ""), [])
            if left and stored is not None:
                found.setdefault(left.pop(0), stored)
    return found


def _layer(delegate: Delegate, step: Step) -> tuple[str | None, str | None]:
    """Digests of a layer's weight and bias."""
    if step.op not in _LAYERS:
        return None, None
    fields = step.fields
    return delegate.keys.get(fields["filter_id"]), delegate.keys.get(fields["bias_id"])


def refused(made: QuantizedProgram) -> str | None:
    """A convolution of integer weights whose input is quantized when it runs, where XNNPACK has no kernel."""
    parameter = _parameters(made)
    for node in _layers(made):
        source, kernel = node.args[:2]
        if "dequantize_per_tensor.tensor" not in str(getattr(source, "target", "")):
            continue
        shape = kernel.meta["val"].shape
        if len(shape) == 3 or (len(shape) == 4 and shape[1] == 1):
            return parameter(kernel)
    return None


def _layers(made: QuantizedProgram) -> Iterator[Any]:
    for node in made.program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.name.split("::")[-1] in _LINEAR:
            yield node


def _parameters(made: QuantizedProgram) -> Callable[[Any], str | None]:
    """The parameter that a node reads, through whatever dequantizes it."""
    signature = made.program.graph_signature
    held = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}

    def parameter(node: Any) -> str | None:
        while isinstance(node, torch.fx.Node) and node.op == "call_function" and node.args:
            node = node.args[0]
        return made.tensors.get(held.get(getattr(node, "name", ""), ""))

    return parameter


def _pairs(made: QuantizedProgram) -> Iterator[tuple[str, str]]:
    """Weight and bias of each layer of the program, by the parameters' names."""
    parameter = _parameters(made)
    for node in _layers(made):
        if len(node.args) < 3 or node.args[2] is None:
            continue
        weight, bias = parameter(node.args[1]), parameter(node.args[2])
        if weight is not None and bias is not None:
            yield weight, bias
