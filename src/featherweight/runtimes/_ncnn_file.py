"""Reads and writes ncnn's two files: ``.param``, the layers as text, and ``.bin``, their tensors in order.

A layer's line is its type, name, counts, blobs, and ``id=value`` pairs; which tensors follow in the
``.bin`` is fixed by its type (``load_model`` of each layer in ncnn's sources). A *tagged* tensor says in
four bytes how it is stored; the others are plain float32. Every blob has one reader in the file; here one
may have several, and the ``Split`` layers are taken out and put back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.errors import TargetError

_MAGIC = "7767517"
_HALF, _BYTE = 0x01306B47, 0x000D4B38
_ARRAY = -23300


@dataclass
class Layer:
    """One layer: what it reads and makes, its parameters by id, its tensors by the name of their role."""

    type: str
    name: str
    inputs: list[str]
    outputs: list[str]
    params: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def integer(self, key: int, default: int = 0) -> int:
        return int(float(self.params.get(key, default)))


@dataclass(frozen=True)
class Slot:
    """Where a tensor is in the ``.bin``: its role, elements, and whether a tag says how it is stored.

    Without a tag it is float32, or bytes.
    """

    role: str
    elements: int
    tagged: bool = False
    raw: bool = False


def read(param: Path, binary: Path) -> list[Layer]:
    """The layers of a network, without ``Split``.

    Raises:
        TargetError: A layer holds tensors of which nothing is known here.
    """
    layers = read_param(param.read_text())
    data = memoryview(binary.read_bytes())
    offset = 0
    for layer in layers:
        for slot in slots(layer):
            layer.tensors[slot.role], offset = _take(data, offset, slot)
    if offset != len(data):
        kinds = sorted({layer.type for layer in layers if layer.type not in _SLOTS})
        raise TargetError(
            f"ncnn's file holds {len(data) - offset} bytes that belong to no layer known here",
            where=f"one of {', '.join(kinds)}",
            fix="take another runtime",
        )
    return without_splits(layers)


def write(layers: Sequence[Layer], returned: Collection[str], param: Path, binary: Path) -> None:
    """Both files; a tagged tensor is stored in its own dtype: float32, float16 or int8."""
    whole = with_splits(layers, returned)
    param.write_text(write_param(whole))
    with binary.open("wb") as out:
        for layer in whole:
            for slot in slots(layer):
                array = np.ascontiguousarray(layer.tensors[slot.role])
                if array.size != slot.elements:
                    raise ValueError(f"'{layer.name}' has {array.size} for {slot}")
                out.write(_bytes(array, slot))


def read_param(text: str) -> list[Layer]:
    """The layers of a ``.param`` as they stand."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != [_MAGIC]:
        raise ValueError("this is no .param file")
    layers = []
    for words in lines[2:]:
        made, last = 4 + int(words[2]), 4 + int(words[2]) + int(words[3])
        pairs = (word.partition("=") for word in words[last:])
        params = {int(key): value for key, _, value in pairs}
        layers.append(Layer(words[0], words[1], words[4:made], words[made:last], params))
    return layers


def write_param(layers: Sequence[Layer]) -> str:
    blobs = sum(len(layer.outputs) for layer in layers)
    lines = [_MAGIC, f"{len(layers)} {blobs}"]
    for layer in layers:
        names = [str(len(layer.inputs)), str(len(layer.outputs)), *layer.inputs, *layer.outputs]
        pairs = [f"{key}={value}" for key, value in layer.params.items()]
        lines.append(" ".join([layer.type, layer.name, *names, *pairs]))
    return "\n".join(lines) + "\n"


def array(values: Iterable[float | int]) -> str:
    """The value of a parameter that is a list; its id is ``listed(id)``."""
    items = [f"{value:.9e}" if isinstance(value, float) else str(value) for value in values]
    return ",".join([str(len(items)), *items])


def listed(key: int) -> int:
    """The id under which a list is written."""
    return _ARRAY - key


# ---- Split


def without_splits(layers: Sequence[Layer]) -> list[Layer]:
    """The same network in which a blob may have several readers, and be an output besides."""
    read = {name for layer in layers for name in layer.inputs}
    splits = [layer for layer in layers if layer.type == "Split"]
    source = {name: layer.inputs[0] for layer in splits for name in layer.outputs}
    returned: dict[str, list[str]] = {}  # blob -> outputs of the network that are copies of it
    for name in source:
        if name not in read:
            returned.setdefault(_first(name, source), []).append(name)

    def named(name: str) -> str:
        first = _first(name, source)
        return returned.get(first, [first])[0]

    kept: list[Layer] = []
    for layer in layers:
        if layer.type != "Split":
            layer.inputs = [named(name) for name in layer.inputs]
            layer.outputs = [named(name) for name in layer.outputs]
            kept.append(layer)
    for first, *others in returned.values():
        kept += [Layer("Noop", f"copy:{name}", [first], [name]) for name in others]
    return kept


def _first(name: str, source: Mapping[str, str]) -> str:
    while name in source:
        name = source[name]
    return name


def with_splits(layers: Sequence[Layer], returned: Collection[str]) -> list[Layer]:
    """The same network with a ``Split`` behind what several layers read, or what is returned besides."""
    readers = Counter(name for layer in layers for name in layer.inputs)
    copied = {name for name, count in readers.items() if count > 1 or name in returned}
    taken: Counter[str] = Counter()
    whole: list[Layer] = []
    for layer in layers:
        inputs = []
        for name in layer.inputs:
            inputs.append(f"{name}/{taken[name]}" if name in copied else name)
            taken[name] += 1
        made = [f"{name}/all" if name in copied and name in returned else name for name in layer.outputs]
        whole.append(Layer(layer.type, layer.name, inputs, made, layer.params, layer.tensors))
        for name, blob in zip(layer.outputs, made, strict=True):
            if name in copied:
                copies = [f"{name}/{index}" for index in range(readers[name])]
                whole.append(
                    Layer("Split", f"split:{name}", [blob], [*([] if blob == name else [name]), *copies])
                )
    return whole


# ---- tensors


def slots(layer: Layer) -> list[Slot]:
    """The tensors of a layer in the order of the ``.bin``."""
    known = _SLOTS.get(layer.type)
    return [] if known is None else known(layer)


def _take(data: memoryview, offset: int, slot: Slot) -> tuple[np.ndarray, int]:
    kind: np.dtype[Any] = np.dtype("i1" if slot.raw else "<f4")
    if slot.tagged:
        tag = int.from_bytes(data[offset : offset + 4], "little")
        kind = np.dtype({0: "<f4", _HALF: "<f2", _BYTE: "i1"}[tag])
        offset += 4
    end = offset + slot.elements * kind.itemsize
    taken = np.frombuffer(data[offset:end], kind)
    return taken, end + -(end - offset) % 4


def _bytes(array: np.ndarray, slot: Slot) -> bytes:
    tag, kind = {"float16": (_HALF, "<f2"), "int8": (_BYTE, "i1")}.get(array.dtype.name, (0, "<f4"))
    if tag and not (slot.tagged or slot.raw):
        raise ValueError(f"{slot} is float32, not {array.dtype}")
    data = array.astype(kind).tobytes()
    return (tag.to_bytes(4, "little") if slot.tagged else b"") + data + bytes(-len(data) % 4)


def _convolution(layer: Layer) -> list[Slot]:
    outputs, term = layer.integer(0), layer.integer(8)
    found = [Slot("weight", layer.integer(6), True)]
    found += [Slot("bias", outputs)] if layer.integer(5) else []
    if term:
        each = layer.integer(7) if layer.type == "ConvolutionDepthWise" else outputs
        found += [Slot("weight_scale", 1 if term % 100 == 2 and each != outputs else each)]
        found += [Slot("input_scale", 1)]
    return found + ([Slot("output_scale", 1)] if term > 100 else [])


def _plain_convolution(layer: Layer) -> list[Slot]:
    found = [Slot("weight", layer.integer(6), True)]
    return found + ([Slot("bias", layer.integer(0))] if layer.integer(5) else [])


def _inner_product(layer: Layer) -> list[Slot]:
    outputs = layer.integer(0)
    found = [Slot("weight", layer.integer(2), True)]
    found += [Slot("bias", outputs)] if layer.integer(1) else []
    return found + ([Slot("weight_scale", outputs), Slot("input_scale", 1)] if layer.integer(8) else [])


def block_quantized(term: int) -> tuple[int, int] | None:
    """Bits and block size of a Gemm's weights by its ``quantize_term``."""
    return (term // 100, 32 << term % 10) if term >= 400 else None


def _gemm(layer: Layer) -> list[Slot]:
    m, n, k = (layer.integer(key) for key in (7, 8, 9))
    blocks = block_quantized(layer.integer(18))
    found = [Slot("left", m * k, True)] if layer.integer(4) else []
    if layer.integer(5):
        whole = Slot("weight", n * k, True)
        found.append(whole if blocks is None else Slot("weight", n * -(-k * blocks[0] // 8), raw=True))
    kind = layer.integer(10)
    if layer.integer(6) and kind != -1:
        found += [Slot("bias", {0: 1, 1: m, 2: m, 3: m * n, 4: n}[kind], True)]
    return found + ([Slot("weight_scale", n * -(-k // blocks[1]))] if blocks else [])


def _plain(*counted: tuple[str, int], unless: tuple[int, int] | None = None) -> Callable[[Layer], list[Slot]]:
    """Untagged tensors, each with as many elements as a parameter says, unless another one is zero."""

    def found(layer: Layer) -> list[Slot]:
        if unless is not None and not layer.integer(*unless):
            return []
        return [Slot(role, layer.integer(key)) for role, key in counted]

    return found


def _with_bias(role: str, size: int, flag: int) -> Callable[[Layer], list[Slot]]:
    def found(layer: Layer) -> list[Slot]:
        own = [Slot(role, layer.integer(size))]
        return own + ([Slot("bias", layer.integer(size))] if layer.integer(flag) else [])

    return found


def _embed(layer: Layer) -> list[Slot]:
    found = [Slot("weight", layer.integer(3), True)]
    return found + ([Slot("bias", layer.integer(0))] if layer.integer(2) else [])


def _recurrent(gates: int, biases: int) -> Callable[[Layer], list[Slot]]:
    def found(layer: Layer) -> list[Slot]:
        outputs, whole = layer.integer(0), layer.integer(1)
        hidden = layer.integer(3, outputs) if layer.type == "LSTM" else outputs
        directions = 2 if layer.integer(2) == 2 else 1
        own = [
            Slot("weight_ih", whole, True),
            Slot("bias", directions * biases * hidden, True),
            Slot("weight_hh", directions * gates * hidden * outputs, True),
        ]
        return own + ([Slot("weight_hr", directions * hidden * outputs, True)] if hidden != outputs else [])

    return found


def _attention(layer: Layer) -> list[Slot]:
    width, whole = layer.integer(0), layer.integer(2)
    inner = whole // width
    key, value = layer.integer(3, width), layer.integer(4, width)
    found = []
    for role, size in (("q", whole), ("k", width * key), ("v", width * value)):
        found += [Slot(f"{role}.weight", size, True), Slot(f"{role}.bias", width)]
    return [*found, Slot("out.weight", whole, True), Slot("out.bias", inner)]


def _memory(layer: Layer) -> list[Slot]:
    sizes = [layer.integer(key) for key in (0, 1, 11, 2)]
    whole = int(np.prod([size for size in sizes if size]))
    return [Slot("weight", whole, layer.integer(21, 1) == 0)]


_SLOTS: Mapping[str, Callable[[Layer], list[Slot]]] = {
    "Convolution": _convolution,
    "ConvolutionDepthWise": _convolution,
    **dict.fromkeys(
        [f"{kind}{size}" for kind in ("Convolution", "ConvolutionDepthWise") for size in ("1D", "3D")],
        _plain_convolution,
    ),
    **dict.fromkeys(
        [f"Deconvolution{kind}{size}" for kind in ("", "DepthWise") for size in ("", "1D", "3D")],
        _plain_convolution,
    ),
    "DeformableConv2D": _plain_convolution,
    "InnerProduct": _inner_product,
    "Gemm": _gemm,
    "BatchNorm": _plain(("weight", 0), ("mean", 0), ("variance", 0), ("bias", 0)),
    "Scale": _with_bias("weight", 0, 1),
    "Bias": _plain(("bias", 0)),
    "PReLU": _plain(("weight", 0)),
    "LayerNorm": _plain(("weight", 0), ("bias", 0), unless=(2, 1)),
    "RMSNorm": _plain(("weight", 0), unless=(2, 1)),
    "GroupNorm": _plain(("weight", 1), ("bias", 1), unless=(3, 1)),
    "InstanceNorm": _plain(("weight", 0), ("bias", 0), unless=(2, 1)),
    "Embed": _embed,
    "LSTM": _recurrent(4, 4),
    "GRU": _recurrent(3, 4),
    "RNN": _recurrent(1, 1),
    "MultiHeadAttention": _attention,
    "MemoryData": _memory,
    "Quantize": lambda layer: [Slot("scale", layer.integer(0, 1))],
}
