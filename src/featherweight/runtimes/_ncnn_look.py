"""Looks into ncnn's files and into a call: dtypes of tensors, values of blobs, seconds of layers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from featherweight.runtime import Artifact, Kernel, Stored, Target
from featherweight.runtimes._ncnn_file import Layer, block_quantized, read, read_param
from featherweight.runtimes._ncnn_session import Session

_ROUNDS = 5
_FAST_BITS = 8
_EXTRACT_AS_IT_IS = 1


def stored(artifact: Artifact) -> Mapping[str, Stored]:
    """Parameter -> how it lies in the file; what is there several times has numbers behind its name."""
    found: dict[str, Stored] = {}
    for entry, file in artifact.entries.items():
        path = artifact.folder / file
        names = artifact.details["parameters"][entry]
        for layer in read(path, path.with_suffix(".bin")):
            for role, tensor in layer.tensors.items():
                name = names.get(layer.name, {}).get(role)
                if name is not None:
                    _add(found, Stored(name, _dtype(layer, role, tensor), tensor.nbytes))
    return found


def _add(found: dict[str, Stored], one: Stored) -> None:
    name, again = one.name, 0
    while name in found:
        again += 1
        name = f"{one.name}.{again}"
    found[name] = replace(one, name=name)


def _dtype(layer: Layer, role: str, tensor: np.ndarray) -> str:
    blocks = block_quantized(layer.integer(18)) if layer.type == "Gemm" and role == "weight" else None
    return tensor.dtype.name if blocks is None else f"int{blocks[0]}"


def values(
    artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], entry: str
) -> dict[str, np.ndarray]:
    """Traced value -> what its blob holds, over the examples of a call."""
    session = Session(artifact, replace(target, options={**target.options, "lightmode": False}))
    session.check(inputs, entry)
    blobs, steps, shapes = (artifact.details[key][entry] for key in ("values", "steps", "shapes"))
    rows = []
    for index in range(len(inputs[0])):
        extractor, held = session.extractor(entry, inputs, index)
        one = {blob: np.array(extractor.extract(blob)[1]) for blob in dict.fromkeys(blobs.values())}
        rows.append(one)
        del extractor, held
    found = {}
    for name, blob in blobs.items():
        whole = np.stack([row[blob].reshape(shapes[name]) for row in rows])
        found[name] = whole * np.float32(steps[blob]) if blob in steps else whole
    return found


def kernels(artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], entry: str) -> list[Kernel]:
    """Each layer, in what it computes, and its seconds: how long its blob takes after those before it."""
    session = Session(artifact, replace(target, options={**target.options, "lightmode": False}))
    session.check(inputs, entry)
    layers = read_param((artifact.folder / artifact.entries[entry]).read_text())
    rounds = [_seconds(session, layers, entry, inputs) for _ in range(_ROUNDS)]
    return [
        Kernel(
            layer.name,
            layer.type,
            _computes(layer),
            not _unpacks(layer),
            float(np.median([one[i] for one in rounds])),
            "ncnn unpacks these weights one by one" if _unpacks(layer) else "",
        )
        for i, layer in enumerate(layers)
        if layer.type not in ("Input", "Split", "MemoryData")
    ]


def _seconds(session: Session, layers: list[Layer], entry: str, inputs: Sequence[np.ndarray]) -> list[float]:
    extractor, held = session.extractor(entry, inputs, 0)
    taken = []
    for layer in layers:
        start = time.perf_counter()
        extractor.extract(layer.outputs[0], _EXTRACT_AS_IT_IS)
        taken.append(time.perf_counter() - start)
    del extractor, held
    return taken


def _unpacks(layer: Layer) -> bool:
    blocks = block_quantized(layer.integer(18)) if layer.type == "Gemm" else None
    return blocks is not None and blocks[0] < _FAST_BITS


def _computes(layer: Layer) -> str:
    if layer.type in ("Convolution", "ConvolutionDepthWise", "InnerProduct") and layer.integer(8):
        return "int8"
    return "int8" if layer.type == "Quantize" else "float32"
