"""Where arrays lie in the files of an artifact, as far as their formats tell.

What is told here is not trusted: a wrong place costs bits, nothing else. So readers are short, and one that
meets what it does not know says nothing.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from xml.etree import ElementTree

from featherweight.bundles import flatbuffer, protobuf
from featherweight.bundles.spans import Span

_SAFETENSORS = {"F64": 32, "F32": 32, "F16": 16, "BF16": 16, "I64": 32, "I32": 32, "I16": 16, "U16": 16}
_OPENVINO = {
    **dict.fromkeys(("f64", "f32", "i64", "u64", "i32", "u32"), 32),
    **dict.fromkeys(("f16", "bf16", "i16", "u16"), 16),
    **dict.fromkeys(("i4", "u4", "nf4", "f4e2m1"), 4),
    "u2": 2,
}
_BROKEN = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
_NO_WEIGHTS = frozenset(
    (
        *(
            "Input",
            "Split",
            "ReLU",
            "Pooling",
            "Flatten",
            "Reshape",
            "BinaryOp",
            "Concat",
            "Softmax",
            "Sigmoid",
        ),
        *(
            "HardSwish",
            "HardSigmoid",
            "Clip",
            "Swish",
            "UnaryOp",
            "Permute",
            "Crop",
            "Slice",
            "Dropout",
            "Interp",
        ),
        *(
            "Padding",
            "Eltwise",
            "Noop",
            "Reduction",
            "Squeeze",
            "ExpandDims",
            "GELU",
            "TanH",
            "Packing",
            "Cast",
        ),
    )
)
_NCNN_FP16, _NCNN_INT8 = 0x01306B47, 0x000D4B38


def named(path: str, data: bytes, files: Mapping[str, Callable[[], bytes]]) -> list[Span]:
    """Arrays that the format of a file names; empty where the format is unknown or the file breaks it.

    Args:
        path: Of the file in the bundle; its ending tells the format.
        data: Its bytes.
        files: Reads the other files, which may tell what is in this one.
    """
    try:
        found = list(_named(PurePosixPath(path), data, files))
    except (*_BROKEN, zipfile.BadZipFile, ElementTree.ParseError, struct.error):
        return []
    return [span for span in found if 0 <= span.start < span.stop <= len(data)]


def _named(path: PurePosixPath, data: bytes, files: Mapping[str, Callable[[], bytes]]) -> Iterator[Span]:
    if path.suffix in (".onnx", ".ort"):
        yield from protobuf.onnx_arrays(data)
    elif path.suffix == ".safetensors":
        yield from _safetensors(data)
    elif data[4:8] == b"TFL3":
        yield from flatbuffer.litert_arrays(data)
    elif data[4:6] == b"ET":
        yield from flatbuffer.executorch_arrays(data)
    elif data[:4] == b"PK\3\4":
        yield from _zip(data)
    elif path.name == "weight.bin":
        yield from _coreml(data)
    elif path.suffix == ".bin" and str(path.with_suffix(".xml")) in files:
        yield from _openvino(files[str(path.with_suffix(".xml"))]())
    elif path.suffix == ".bin" and str(path.with_suffix(".param")) in files:
        yield from _ncnn(files[str(path.with_suffix(".param"))](), data)
    else:
        for other, read in files.items():
            if other.endswith(".onnx"):
                yield from protobuf.external_arrays(read(), path.name)


def _safetensors(data: bytes) -> Iterator[Span]:
    size = struct.unpack_from("<Q", data)[0]
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            yield Span(
                8 + size + start, 8 + size + stop, _SAFETENSORS.get(entry["dtype"], 8), tuple(entry["shape"])
            )


def _openvino(xml: bytes) -> Iterator[Span]:
    for layer in ElementTree.fromstring(xml).iter("layer"):
        told = layer.find("data")
        if layer.get("type") == "Const" and told is not None:
            start, size = int(told.attrib["offset"]), int(told.attrib["size"])
            shape = tuple(int(one) for one in told.get("shape", "").split(",") if one.strip())
            yield Span(start, start + size, _OPENVINO.get(told.get("element_type", ""), 8), shape)


def _zip(data: bytes) -> Iterator[Span]:
    """Members that are stored as they are: weights of a ``.pt2`` or ``.npz``."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            if entry.compress_type == zipfile.ZIP_STORED and entry.file_size:
                name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
                start = entry.header_offset + 30 + name + extra
                yield Span(start, start + entry.file_size, 32)


def _coreml(data: bytes) -> Iterator[Span]:
    """Blobs of an ML package: each has 64 bytes that tell its type, size and place."""
    count, version = struct.unpack_from("<II", data)
    if version != 2:
        return
    at = 64
    for _ in range(count):
        mark, kind, size, start = struct.unpack_from("<IIQQ", data, at)
        if mark != 0xDEADBEEF:
            return
        yield Span(start, start + size, {1: 16, 2: 32, 5: 16}.get(kind, 8))
        at = -(-(start + size) // 64) * 64


def _ncnn(param: bytes, data: bytes) -> Iterator[Span]:
    """Weights in the order of the layers: a word that tells their type, they, then what else a layer has."""
    at = 0
    for line in param.decode().splitlines()[2:]:
        words = line.split()
        told = dict(re.findall(r"(?<!\S)(-?\d+)=(\S+)", " ".join(words[4:])))
        kind = words[0]
        if kind in (
            "Convolution",
            "ConvolutionDepthWise",
            "Deconvolution",
            "DeconvolutionDepthWise",
            "Convolution1D",
        ):
            outputs, size, bias, scales = (
                int(told["0"]),
                int(told["6"]),
                told.get("5", "0"),
                told.get("8", "0"),
            )
        elif kind == "InnerProduct":
            outputs, size, bias, scales = (
                int(told["0"]),
                int(told["2"]),
                told.get("1", "0"),
                told.get("8", "0"),
            )
        elif kind in _NO_WEIGHTS:
            continue
        else:
            return  # what it stores is not known, nor where the next layer begins
        flag = struct.unpack_from("<I", data, at)[0]
        width = {_NCNN_FP16: 16, _NCNN_INT8: 8}.get(flag, 32)
        yield Span(at + 4, at + 4 + size * width // 8, width, (outputs, size // outputs))
        at += 4 + -(-size * width // 32) * 4
        if bias == "1":
            at += 4 * outputs
        if scales != "0":
            at += 4 * (
                outputs
                if kind in ("Convolution", "InnerProduct", "Deconvolution")
                else int(told.get("7", "1"))
            )
            at += 4 + (4 if int(scales) > 100 else 0)
