"""Arithmetic on shapes: NumPy arrays of Python integers, or of symbolic sizes while torch.export traces.

ONNX computes shapes with tensors (Shape, Gather, Mul, Concat, Reshape). If they became torch tensors, a
dynamic batch would turn into a number that depends on data. As host numbers they stay sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

Host = np.ndarray


def sizes(values: Sequence[Any]) -> Host:
    """Host numbers of rank 1; symbolic ones make an array of objects."""
    plain = all(type(value) is int for value in values)
    array = np.empty(len(values), dtype=np.int64 if plain else object)
    for index, value in enumerate(values):
        array[index] = value
    return array


def as_host(value: Any) -> Host:
    """A result of NumPy as an array (it turns arrays of objects without axes into their item)."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, (np.generic, bool, int, float)):
        return np.asarray(value)
    array = np.empty((), dtype=object)
    array[()] = value
    return array


def to_list(value: Host | Tensor) -> list[Any]:
    """Flat Python numbers or symbols, for arguments such as a shape."""
    return list(value.reshape(-1).tolist())


def to_tensor(value: Host) -> Tensor:
    """The same numbers as a tensor: symbols survive, as ``aten.full`` takes them."""
    if value.dtype != object:
        return torch.from_numpy(np.array(value))
    items = [torch.full((), item, dtype=_dtype_of(item)) for item in value.reshape(-1)]
    if value.ndim == 0:
        return items[0]
    return torch.stack(items).reshape(value.shape) if items else torch.zeros(value.shape, dtype=torch.int64)


def _dtype_of(item: Any) -> torch.dtype:
    if isinstance(item, (bool, torch.SymBool)):
        return torch.bool
    return torch.float32 if isinstance(item, (float, torch.SymFloat)) else torch.int64


def each(function: Callable[[Any], Any], value: Host) -> Host:
    """A function of one number on each."""
    array = np.empty(value.shape, dtype=object)
    for index in np.ndindex(value.shape):
        array[index] = function(value[index])
    return plain(array)


def plain(value: Host) -> Host:
    """An array of objects without symbols as an array of numbers."""
    items = value.reshape(-1).tolist() if value.dtype == object else []
    kinds = {type(item) for item in items}
    for kind, dtype in ((bool, np.bool_), (int, np.int64), (float, np.float32)):
        if kinds == {kind}:
            return value.astype(dtype)
    return value


def quotient(a: Host, b: Host) -> Host:
    """ONNX's Div: integers towards zero (sizes are never negative), floats as usual."""
    floats = any(value.dtype.kind == "f" or _any_float(value) for value in (a, b))
    return as_host(np.true_divide(a, b) if floats else np.floor_divide(a, b))


def _any_float(value: Host) -> bool:
    return value.dtype == object and any(isinstance(v, (float, torch.SymFloat)) for v in value.reshape(-1))


# Types that torch has not: their values are carried in the next larger one that it has.
CARRIED: dict[str, torch.dtype] = {
    "int4": torch.int8,
    "uint4": torch.uint8,
    "int2": torch.int8,
    "uint2": torch.uint8,
    "float4_e2m1fn": torch.float32,
}
_ITSELF = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """The type of tensors that hold such numbers (see ``CARRIED``).

    Raises:
        TypeError: torch can hold them in no type (strings, complex integers).
    """
    name = dtype.name
    if name in CARRIED:
        return CARRIED[name]
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"torch has no tensors of {name}")
    return found


def is_number(dtype: np.dtype) -> bool:
    """Whether tensors can hold it: not strings, not objects."""
    return dtype.kind in "fiub" or dtype.name in CARRIED or dtype.name in _ITSELF


def bytes_of(dtype: np.dtype, count: int) -> int:
    """Bytes of so many packed numbers in a file."""
    if dtype.name not in CARRIED:
        return count * dtype.itemsize
    return -(-count * (2 if dtype.name.endswith("2") else 4) // 8)


def tensor_of(array: np.ndarray) -> Tensor:
    """A copy of an array, of any type that ONNX has but strings."""
    name = array.dtype.name
    if array.dtype == object:
        return to_tensor(array)
    if name in CARRIED:
        wide = np.float32 if name.startswith("float") else np.uint8 if name.startswith("u") else np.int8
        return torch.from_numpy(np.array(array.astype(wide), order="C"))
    if name in _ITSELF:
        bits = np.array(array, order="C").view(np.int16 if name == "bfloat16" else np.uint8)
        return torch.from_numpy(bits).view(torch_dtype(array.dtype))
    return torch.from_numpy(np.array(array, order="C"))


def array_of(tensor: Tensor) -> np.ndarray:
    """The values as NumPy has them; types of its extensions where it has none of its own."""
    tensor = tensor.detach().cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    if name in _ITSELF:
        bits = tensor.contiguous().view(torch.int16 if name == "bfloat16" else torch.uint8)
        return bits.numpy().view(np.dtype(getattr(ml_dtypes, name)))
    return np.asarray(tensor.resolve_conj().numpy())


def plain_type(dtype: np.dtype) -> bool:
    """Whether host numbers may be of this type."""
    return dtype.name not in CARRIED and dtype.name not in _ITSELF
