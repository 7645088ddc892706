"""The quantizers that come with the runtimes, each as its own documentation says, on our float export.

``PEERS[runtime][method](run, samples, original, folder) -> Artifact``: quantize the original of a run with so
many of its calibration examples, and write what that runtime loads into ``folder``.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from peers import SETTINGS, quantize_onnxruntime

from featherweight.engine.run import Run
from featherweight.runtime import Artifact

Peer = Callable[[Run, int, Artifact, Path], Artifact]


def examples(run: Run, samples: int) -> np.ndarray:
    """Calibration examples of the first input."""
    return np.concatenate([batch[0] for batch in run.data.calibration(samples)])[:samples]


def _onnxruntime(setting: str) -> Peer:
    def quantize(run: Run, samples: int, original: Artifact, folder: Path) -> Artifact:
        artifact, _ = quantize_onnxruntime(
            original.folder / original.files[0],
            folder,
            setting,
            examples(run, samples),
            reduce_range=run.target.isa in ("avx2", "avx512", "generic"),
        )
        return artifact

    return quantize


def _nncf(preset: str) -> Peer:
    def quantize(run: Run, samples: int, original: Artifact, folder: Path) -> Artifact:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import nncf
        import openvino as ov

        logging.getLogger("nncf").setLevel(logging.ERROR)
        model = ov.Core().read_model(str(original.folder / original.entries["forward"]))
        data = nncf.Dataset([one[None] for one in examples(run, samples)])
        made = nncf.quantize(
            model, data, preset=getattr(nncf.QuantizationPreset, preset), subset_size=samples
        )
        folder.mkdir(parents=True, exist_ok=True)
        ov.save_model(made, str(folder / "model.xml"), compress_to_fp16=False)
        return Artifact("openvino", folder, original.files, original.entries, original.details)

    return quantize


def _xnnpack_quantizer(run: Run, samples: int, original: Artifact, folder: Path) -> Artifact:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    class Wrapped(torch.nn.Module):  # XNNPACK refuses names that begin with a digit
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    inputs = [torch.from_numpy(one[None].copy()) for one in examples(run, samples)]
    one = (inputs[0],)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = torch.export.export(Wrapped(run.original.module.eval()), one, strict=False).module()
        config = get_symmetric_quantization_config(is_per_channel=True)
        prepared = prepare_pt2e(graph, XNNPACKQuantizer().set_global(config))
        for x in inputs:
            prepared(x)
        program = torch.export.export(Wrapped(convert_pt2e(prepared)), one, strict=False)
        made = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pte").write_bytes(made.buffer)
    return Artifact("executorch", folder, ("model.pte",), {"forward": "model.pte"}, original.details)


def _ai_edge_quantizer(run: Run, samples: int, original: Artifact, folder: Path) -> Artifact:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    source = str(original.folder / original.entries["forward"])
    signature, about = next(iter(Interpreter(source).get_signature_list().items()))
    made = quantizer.Quantizer(source, recipe.static_wi8_ai8())
    shape = Interpreter(source).get_input_details()[0]["shape"]
    inputs = examples(run, samples)
    if tuple(shape[1:]) != inputs.shape[1:]:  # the file takes channels last
        inputs = np.moveaxis(inputs, 1, -1)
    calls = [{about["inputs"][0]: one[None].astype(np.float32)} for one in inputs]
    result = made.quantize(made.calibrate({signature: calls}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.tflite").unlink(missing_ok=True)
    result.export_model(str(folder / "model.tflite"))
    return Artifact("litert", folder, ("model.tflite",), {"forward": "model.tflite"}, original.details)


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "onnxruntime": {setting: _onnxruntime(setting) for setting in SETTINGS},
    "openvino": {"nncf-performance": _nncf("PERFORMANCE"), "nncf-mixed": _nncf("MIXED")},
    "executorch": {"xnnpack-quantizer": _xnnpack_quantizer},
    "litert": {"ai-edge-quantizer": _ai_edge_quantizer},
}
