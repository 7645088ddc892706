"""ONNX Runtime's own static quantizer, in its strongest settings for this processor."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from featherweight.runtime import Artifact

_ASYMMETRIC = {"CalibTensorRangeSymmetric": False}  # by default it is set for percentiles, and for them alone
SETTINGS: Mapping[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "ort-minmax": (CalibrationMethod.MinMax, {}),
    "ort-percentile": (CalibrationMethod.Percentile, {}),
    "ort-percentile-asym": (CalibrationMethod.Percentile, _ASYMMETRIC),
}


class Reader(CalibrationDataReader):
    """Hands examples over one at a time, as ONNX Runtime's own examples do."""

    def __init__(self, name: str, examples: np.ndarray) -> None:
        self._feeds = iter({name: examples[i : i + 1]} for i in range(len(examples)))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def quantize_onnxruntime(
    source: Path, folder: Path, setting: str, examples: np.ndarray, *, reduce_range: bool
) -> tuple[Artifact, float]:
    """Quantize a float file: QDQ, uint8 activations, int8 weights per channel, pre-processed first.

    Args:
        source: The float file.
        folder: Takes ``model.onnx``.
        setting: One of ``SETTINGS``.
        examples: What calibrates.
        reduce_range: 7-bit weights, as ONNX Runtime asks for x86 without VNNI.

    Returns:
        The stripped file, and the seconds that quantizing took.
    """
    folder.mkdir(parents=True, exist_ok=True)
    method, options = SETTINGS[setting]
    started = time.perf_counter()
    source = source.resolve()
    with tempfile.TemporaryDirectory() as temporary, _quiet(), contextlib.chdir(temporary):  # it leaves files
        prepared, written = Path(temporary) / "prepared.onnx", Path(temporary) / "int8.onnx"
        try:
            quant_pre_process(str(source), str(prepared))
        except Exception:  # noqa: BLE001 where its symbolic shapes fail they raise just that; its guide: skip them
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        name = onnx.load(prepared, load_external_data=False).graph.input[0].name
        quantize_static(
            str(prepared),
            str(written),
            Reader(name, examples),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
            calibrate_method=method,
            extra_options=options,
        )
        seconds = time.perf_counter() - started
        strip(written, folder / "model.onnx")
    return Artifact("onnxruntime", folder, ("model.onnx",), {"forward": "model.onnx"}), seconds


def strip(source: Path, target: Path) -> None:
    """Drop what no session reads: names of nodes, notes, metadata, inferred shapes."""
    model = onnx.load(source)
    del model.metadata_props[:]
    model.doc_string = ""
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.name, node.doc_string = "", ""
        del node.metadata_props[:]
    target.write_bytes(model.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer prints how far it is, and warns through the root logger."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger().setLevel(level)
