"""Weighs artifacts that already lie on disk, without the model that they were made of."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.data import Data, check_labels, load_data, random_data, resolve_metric
from featherweight.engine.measure import (
    Limits,
    Served,
    measure_latency,
    measure_memory,
    quality,
    score_artifact,
)
from featherweight.engine.packing import packed
from featherweight.errors import DataError, LoadError, RunnerError
from featherweight.exchange.load import InputSpec
from featherweight.method import Progress
from featherweight.outcome import Measurement
from featherweight.runtime import Artifact, Target


def as_artifact(path: str | Path, runtime: str) -> Artifact:
    """A file that a runtime loads, with the files of an ONNX model's external data.

    Raises:
        LoadError: There is no such file.
    """
    file = Path(path)
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise LoadError(f"'{path}' {what}", fix="name the file that the runtime loads, e.g. model.onnx")
    beside = _external_data(file) if file.suffix == ".onnx" else ()
    return Artifact(runtime, file.absolute().parent, (file.name, *beside), {"forward": file.name})


def _external_data(file: Path) -> tuple[str, ...]:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        model = onnx.load(file, load_external_data=False)
    except (DecodeError, RuntimeError, ValueError) as error:
        raise LoadError(f"'{file}' is no ONNX file", fix="name the file that the runtime loads") from error
    tensors = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    names = sorted({ExternalDataInfo(tensor).location for tensor in tensors})
    lost = [name for name in names if not (file.parent / name).is_file()]
    if lost:
        raise LoadError(f"'{file}' keeps weights in '{lost[0]}', which is not beside it", fix="copy both")
    return tuple(names)


def load_examples(
    data: str | Data | None,
    *,
    metric: str | None,
    inputs: Sequence[str],
    image_size: str | None,
    mean: str | None,
    std: str | None,
    seed: int,
) -> Data:
    """The data, or random inputs of the shapes that the user names.

    Raises:
        DataError: Neither was given.
    """
    if isinstance(data, Data):
        return data if metric is None else data.evolve(metric=metric)
    if data is not None:
        return load_data(data, metric=metric, seed=seed, image_size=image_size, mean=mean, std=std)
    if metric is not None:
        raise DataError(f"there is no data that '{metric}' could score", fix="add --data, or leave it out")
    specs = [InputSpec.parse(text) for text in inputs]
    if not specs:
        raise DataError(
            "nothing says what the artifact takes", fix="give --data, or its input: --input 3x224x224"
        )
    return random_data([(spec.shape, np.dtype(spec.dtype)) for spec in specs], seed)


def weigh_files(
    artifact: Artifact,
    twin: Artifact | None,
    data: Data,
    target: Target,
    *,
    scored: bool,
    limits: Limits,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Latency, memory and (with data) quality of an artifact; of its twin all but memory.

    Args:
        artifact: What is weighed.
        twin: What it is compared with; without one, labels are needed to say how good it is.
        data: Examples that both take.
        target: Where and how.
        scored: Whether the examples are real ones.
        limits: How long and how well to measure.
        seed: Of the bootstrap.
        progress: Shows bars.

    Raises:
        LoadError: The runtime cannot open a file.
        DataError: The examples are none that the artifact takes, or do not fit its outputs.
        RunnerError: The runtime crashed or hangs.
    """
    example = tuple(array[:1] for array in data.example_inputs())
    outputs = first_call(artifact, target, example)
    if twin is not None:
        first_call(twin, target, example)
    fields: dict[str, Any] = {}
    baseline: dict[str, Any] = {}
    if scored:
        data = scorable(data, outputs, alone=twin is None)
        fields, baseline = _qualities(artifact, twin, data, target, limits, seed)
    timing = measure_latency(artifact, twin, target, example, limits=limits, progress=progress)
    memory = measure_memory(artifact, target, example, limits=limits, progress=progress)
    seen = Measurement(
        **fields,
        bytes=artifact.bytes,
        packed_bytes=packed(artifact),
        latency_s=timing.artifact,
        latency_ratio=timing.ratio,
        latency_ratio_ci95=timing.ratio_ci95,
        resolved=timing.resolved,
        throughput=timing.throughput,
        peak_rss_bytes=memory.peak,
        memory_bytes=memory.above_runtime,
        energy_j=timing.energy_j,
    )
    metric = data.metric.name if scored else None
    told = seen.model_dump(mode="json") | {"metric": metric, "sha256": artifact.sha256}
    if twin is not None:
        before = Measurement(
            **baseline,
            bytes=twin.bytes,
            packed_bytes=packed(twin),
            latency_s=timing.twin,
            throughput=timing.twin_throughput,
            energy_j=timing.twin_energy_j,
        )
        told["baseline"] = before.model_dump(mode="json")
    return told


def scorable(data: Data, outputs: tuple[np.ndarray, ...], *, alone: bool) -> Data:
    """The data with a metric that suits an artifact's outputs.

    Args:
        data: Brings the metric, or labels that it follows from.
        outputs: Of one example.
        alone: There is no twin to compare with.

    Raises:
        DataError: Labels do not fit the outputs, or the metric compares with a twin.
    """
    if not data.has_metric:
        data = data.evolve(metric=resolve_metric(data, outputs))
    if data.metric.classes and outputs[0].ndim >= 2:
        check_labels(data, outputs[0].shape[1])
    if alone and data.metric.compares:
        raise DataError(
            f"metric '{data.metric.name}' compares with the original, and there is no twin",
            fix="add --twin, or labels y to the data",
        )
    return data


def first_call(artifact: Artifact, target: Target, example: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """What a file answers to one example: before anything is measured, it must open and take it."""
    file = artifact.files[0]
    try:
        served = Served(artifact, target).__enter__()
    except RunnerError as error:
        raise LoadError(
            f"{target.runtime} cannot open '{file}': {_sentence(error, 'the runner failed: ')}",
            fix="name a file that featherweight lower or fit wrote for this runtime, or another --runtime",
        ) from error
    try:
        return served.run(*example)
    except RunnerError as error:
        shapes = ", ".join(f"{array.dtype} {array.shape}" for array in example)
        raise DataError(
            f"'{file}' does not take {shapes}: {_sentence(error, 'the session refused a call: ')}",
            fix="give data (or --input) of the shape and dtype that it takes; the first axis is the batch",
        ) from error
    finally:
        served.__exit__(None, None, None)


def _sentence(error: RunnerError, opening: str) -> str:
    """What the runtime itself said, in one line."""
    return " ".join(error.what.removeprefix(opening).split())


def _qualities(
    artifact: Artifact, twin: Artifact | None, data: Data, target: Target, limits: Limits, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The artifact's fields, and the twin's score."""
    with tempfile.TemporaryDirectory(prefix="featherweight-") as folder:
        before = score_artifact(twin or artifact, target, data, Path(folder) / "twin", limits=limits)
        if twin is None:
            return {"quality": quality(data, before, before, seed=seed).quality}, {}
        after = score_artifact(
            artifact, target, data, Path(folder) / "artifact", original=before, limits=limits
        )
        judged = quality(data, before, after, seed=seed)
    return judged.fields(), {"quality": judged.baseline}
