"""Evaluates ML Programs by the definitions of their operators: Core ML itself runs on Apple's systems alone.

Covers what the golden nets need; the definitions are those of coremltools' MIL Ops reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.runtimes import _coreml_convert as package_of

Values = dict[str, Any]


def run(package: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs of one call by name."""
    known: Values = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coremltools warns of versions that it was not tested with
        for op in package_of._operations(package):
            made = _evaluate(op, package, known)
            several = made if isinstance(made, tuple) else (made,)
            for output, value in zip(op.outputs, several, strict=True):
                known[output.name] = value
        wanted = [name for name, _, _ in package_of.features(str(package))["outputs"]]
    return {name: known[name].numpy() for name in wanted}


def _evaluate(op: Any, package: Path, known: Values) -> Any:
    arguments = {name: _bound(one, package, known) for name, one in op.inputs.items()}
    arguments |= {name: _constant(value, package) for name, value in op.attributes.items() if name != "name"}
    if op.type == "const":
        return arguments["val"]
    if op.type == "split":
        arguments["count"] = len(op.outputs)
    return OPERATORS[op.type](arguments)


def _bound(argument: Any, package: Path, known: Values) -> Any:
    values = [
        known[one.name] if one.WhichOneof("binding") == "name" else _constant(one.value, package)
        for one in argument.arguments
    ]
    return values[0] if len(values) == 1 else values


def _constant(value: Any, package: Path) -> Any:
    if value.WhichOneof("value") == "immediateValue":
        tensor = value.immediateValue.tensor
        if tensor.WhichOneof("value") == "strings":
            return tensor.strings.values[0]
    return torch.from_numpy(np.array(package_of._array(value, package)))


def _list(value: Any) -> list[int]:
    return [int(one) for one in value.reshape(-1)]


def _padded(a: Values) -> tuple[Tensor, list[int]]:
    """Input with its padding, where that is not the same at both ends; else the padding."""
    if a["pad_type"] == "valid":
        return a["x"], [0] * (a["x"].ndim - 2)
    assert a["pad_type"] == "custom"
    pad = _list(a["pad"])
    assert pad[::2] == pad[1::2]
    return a["x"], pad[::2]


def _conv(a: Values) -> Tensor:
    x, pad = _padded(a)
    strides, dilations, groups = _list(a["strides"]), _list(a["dilations"]), int(a["groups"])
    call = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return call(x, a["weight"], a.get("bias"), strides, pad, dilations, groups)


def _pool(a: Values, call: Callable[..., Tensor], **more: Any) -> Tensor:
    x, pad = _padded(a)
    return call(x, _list(a["kernel_sizes"]), _list(a["strides"]), pad, ceil_mode=bool(a["ceil_mode"]), **more)


def _average(a: Values) -> Tensor:
    return _pool(a, F.avg_pool2d, count_include_pad=not bool(a["exclude_padding_from_average"]))


def _along(values: Tensor, a: Values, like: Tensor) -> Tensor:
    if values.ndim == 0:
        return values
    shape = [1] * like.ndim
    shape[int(a["axis"])] = -1
    return values.reshape(shape)


def _quantize(a: Values) -> Tensor:
    zero = _along(a["zero_point"], a, a["input"]) if "zero_point" in a else 0
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[a["output_dtype"]]
    integers = torch.round(a["input"] / _along(a["scale"], a, a["input"])) + zero
    return integers.clamp(low, high).to(getattr(torch, a["output_dtype"]))


def _dequantize(a: Values) -> Tensor:
    data = a["quantized_data"] if "quantized_data" in a else a["input"]
    zero = _along(a["zero_point"], a, data).to(torch.int32) if "zero_point" in a else 0
    return (data.to(torch.int32) - zero) * _along(a["scale"], a, data)


def _blocks(a: Values) -> Tensor:
    data, scale = a["data"].float(), a["scale"]
    for axis, (size, parts) in enumerate(zip(data.shape, scale.shape, strict=True)):
        scale = scale.repeat_interleave(size // parts, axis)
    assert "offset" not in a
    return data * scale


def _table(a: Values) -> Tensor:
    """Codes are packed one behind the other, the lowest bit first."""
    shape, lut = _list(a["shape"]), a["lut"]
    width = {2: 1, 4: 2, 16: 4, 64: 6, 256: 8}[len(lut)]
    bits = np.unpackbits(a["indices"].numpy().view(np.uint8), bitorder="little")
    count = int(np.prod(shape))
    codes = bits[: count * width].reshape(count, width) @ (1 << np.arange(width))
    return lut[torch.from_numpy(codes)].reshape(shape)


def _concat(a: Values) -> Tensor:
    values = a["values"] if isinstance(a["values"], list) else [a["values"]]
    axis = int(a["axis"])
    if a.get("interleave"):
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


def _matmul(a: Values) -> Tensor:
    x, y = a["x"], a["y"]
    return torch.matmul(
        x.transpose(-1, -2) if a.get("transpose_x") else x, y.transpose(-1, -2) if a.get("transpose_y") else y
    )


def _slice(a: Values) -> Tensor:
    x, ranks = a["x"], range(a["x"].ndim)
    masks = {n: [bool(v) for v in a[n]] if n in a else [False] * x.ndim for n in ("begin_mask", "end_mask")}
    squeezed = [bool(v) for v in a["squeeze_mask"]] if "squeeze_mask" in a else [False] * x.ndim
    index: list[Any] = []
    for i in ranks:
        begin = None if masks["begin_mask"][i] else int(a["begin"][i])
        end = None if masks["end_mask"][i] else int(a["end"][i])
        index.append(int(a["begin"][i]) if squeezed[i] else slice(begin, end))
    return x[tuple(index)]


def _lstm(a: Values) -> tuple[Tensor, Tensor, Tensor]:
    h, c, states = a["initial_h"], a["initial_c"], []
    for x in a["x"]:
        gates = F.linear(x, a["weight_ih"], a.get("bias")) + F.linear(h, a["weight_hh"])
        i, f, o, z = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    return (torch.stack(states) if bool(a["output_sequence"]) else h[None]), h, c


def _layer_norm(a: Values) -> Tensor:
    axes = _list(a["axes"])
    assert axes == [-1] or axes == [a["x"].ndim - 1]
    return F.layer_norm(a["x"], a["x"].shape[-1:], a["gamma"], a["beta"], float(a["epsilon"]))


def _cast(a: Values) -> Tensor:
    return a["x"].to({"fp32": torch.float32, "fp16": torch.float16, "int32": torch.int32}[a["dtype"]])


OPERATORS: dict[str, Callable[[Values], Any]] = {
    "add": lambda a: a["x"] + a["y"],
    "avg_pool": _average,
    "batch_norm": lambda a: F.batch_norm(
        a["x"], a["mean"], a["variance"], a["gamma"], a["beta"], eps=float(a["epsilon"])
    ),
    "cast": _cast,
    "clip": lambda a: a["x"].clamp(float(a["alpha"]), float(a["beta"])),
    "concat": _concat,
    "constexpr_affine_dequantize": _dequantize,
    "constexpr_blockwise_shift_scale": _blocks,
    "constexpr_lut_to_dense": _table,
    "conv": _conv,
    "dequantize": _dequantize,
    "gelu": lambda a: F.gelu(a["x"], approximate="none" if a["mode"] == "EXACT" else "tanh"),
    "layer_norm": _layer_norm,
    "linear": lambda a: F.linear(a["x"], a["weight"], a.get("bias")),
    "lstm": _lstm,
    "matmul": _matmul,
    "max_pool": lambda a: _pool(a, F.max_pool2d),
    "mul": lambda a: a["x"] * a["y"],
    "quantize": _quantize,
    "reduce_mean": lambda a: a["x"].mean(_list(a["axes"]), keepdim=bool(a["keep_dims"])),
    "relu": lambda a: F.relu(a["x"]),
    "reshape": lambda a: a["x"].reshape(_list(a["shape"])),
    "scaled_dot_product_attention": lambda a: F.scaled_dot_product_attention(
        a["query"], a["key"], a["value"], a.get("attn_mask")
    ),
    "sigmoid_hard": lambda a: (a["x"] * float(a["alpha"]) + float(a["beta"])).clamp(0, 1),
    "silu": lambda a: F.silu(a["x"]),
    "slice_by_index": _slice,
    "softmax": lambda a: torch.softmax(a["x"], int(a["axis"])),
    "split": lambda a: a["x"].chunk(a["count"], int(a["axis"])),
    "squeeze": lambda a: a["x"].squeeze(tuple(_list(a["axes"]))),
    "tanh": lambda a: torch.tanh(a["x"]),
    "thresholded_relu": lambda a: torch.where(a["x"] >= float(a["alpha"]), a["x"], torch.zeros(())),
    "transpose": lambda a: a["x"].permute(_list(a["perm"])),
}
