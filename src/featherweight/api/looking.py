"""``measure``, ``robustness``, ``compare`` and ``inspect``: what artifacts and networks say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from featherweight.data import Data
from featherweight.engine.beside_files import look_beside
from featherweight.engine.compare import compare_artifacts
from featherweight.engine.delivered import delivered
from featherweight.engine.files import load_examples, weigh_files
from featherweight.engine.inspect import inspect_model
from featherweight.engine.sources import (
    follow,
    load_original,
    load_sources,
)
from featherweight.engine.start import tell_notes
from featherweight.engine.targets import check_cores, fit_targets
from featherweight.engine.timing import Limits
from featherweight.errors import (
    DataError,
    TargetError,
)
from featherweight.method import Progress, Silent
from featherweight.runtime import Artifact, Target


def measure(
    artifact: str | Path,
    *,
    twin: str | Path | None = None,
    data: str | Data | None = None,
    metric: str | None = None,
    inputs: Sequence[str] = (),
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    runtime: str = "onnxruntime",
    device: str = "local",
    threads: int = 1,
    limits: Limits | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Weigh what a runtime loads: latency in turn with its twin, memory, quality when data is given.

    Args are those of :func:`fit`, and:
        artifact: A folder that ``fit`` or ``lower`` wrote, or a file.
        twin: What to compare with, usually the original lowered by ``lower``.
        data: Examples; without it ``inputs`` says what the file takes, and quality is not measured.
        runtime: Which runtime loads a file; a folder says so itself.

    Returns:
        The fields of a measurement, ``metric`` and ``sha256``; ``baseline`` beside them where there is a
        twin.

    Raises:
        UserError: The input is at fault.
        RunnerError: The runtime crashed or hangs.
    """
    weighed, other, target = _pair(artifact, twin, runtime, threads, device)
    return weigh_files(
        weighed,
        other,
        load_examples(
            data, metric=metric, inputs=inputs, image_size=image_size, mean=mean, std=std, seed=seed
        ),
        target,
        scored=data is not None,
        limits=limits or Limits(),
        seed=seed,
        progress=progress or Silent(),
    )


def robustness(
    artifact: str | Path,
    *,
    data: str | Data,
    twin: str | Path | None = None,
    metric: str | None = None,
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    examples: int = 500,
    runtime: str = "onnxruntime",
    device: str = "local",
    threads: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What an artifact does beside the score: on corrupted pictures, in its confidence, to its training set.

    Args are those of :func:`fit`, and:
        artifact: A folder that ``fit`` or ``lower`` wrote, or a file.
        twin: What to compare with, usually the original lowered by ``lower``.
        examples: Pictures of each corruption and severity at most.
        runtime: Which runtime loads a file; a folder says so itself.

    Returns:
        ``robustness``, ``calibration`` and ``privacy`` as in docs/result.md, None where it does not apply;
        ``omitted`` has the reasons. Beside them ``metric``, ``runtime`` and ``sha256``.

    Raises:
        UserError: The input is at fault, or nothing of it applies.
        RunnerError: The runtime crashed or hangs.
    """
    if examples < 1:
        raise DataError(f"{examples} examples are none", fix="--examples 500")
    weighed, other, target = _pair(artifact, twin, runtime, threads, device)
    given = load_examples(
        data, metric=metric, inputs=(), image_size=image_size, mean=mean, std=std, seed=seed
    )
    return look_beside(
        weighed, other, given, target, examples=examples, seed=seed, progress=progress or Silent()
    )


def _pair(
    artifact: str | Path, twin: str | Path | None, runtime: str, threads: int, device: str
) -> tuple[Artifact, Artifact | None, Target]:
    """What is looked at, what it is compared with, and where both run."""
    given = [delivered(path, runtime) for path in (artifact, twin) if path is not None]
    target = fit_targets(given[0].artifact.runtime, threads, device, given[0].target.isa)[0]
    target = replace(target, options=given[0].target.options)
    weighed, other = given[0].artifact, given[1].artifact if len(given) > 1 else None
    if other is not None and other.runtime != weighed.runtime:
        raise TargetError(
            f"'{artifact}' is for {weighed.runtime} and '{twin}' for {other.runtime}",
            fix=f"lower the twin for {weighed.runtime}",
        )
    return weighed, other, target


def compare(
    first: str | Path,
    second: str | Path,
    *,
    data: str | Data | None = None,
    inputs: Sequence[str] = (),
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    below: float = 30.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Where two artifacts of one network part: values inside both on the same inputs, layer by layer.

    Args are those of :func:`fit`, and:
        first: A folder that ``fit`` or ``lower`` wrote; it is the reference.
        second: Another one, for any runtime.
        below: Decibels under which two values count as different.

    Returns:
        The values that both show, in order, with their signal-to-noise ratio, and the first one below.

    Raises:
        UserError: The input is at fault, or a runtime shows nothing of its inside.
    """
    examples = load_examples(
        data, metric=None, inputs=inputs, image_size=image_size, mean=mean, std=std, seed=seed
    )
    return compare_artifacts(
        delivered(first), delivered(second), examples, below=below, progress=progress or Silent()
    )


def inspect(
    model: str,
    *,
    data: str | Data | None = None,
    weights: str | None = None,
    metric: str | None = None,
    inputs: Sequence[str] = (),
    image_size: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    examples: int = 256,
    threads: int = 1,
    static: bool = False,
    seed: int = 0,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Where the cost is, layer by layer: size, work, memory, measured time, and sensitivity with data.

    Args are those of :func:`fit`, and:
        examples: Scored examples that the sensitivity takes at most.
        static: Measure nothing.

    Returns:
        Totals and rows, described in docs/inspect.md.

    Raises:
        UserError: The input is at fault.
        RunnerError: ONNX Runtime crashed.
    """
    shown = progress or Silent()
    if examples < 1:
        raise DataError(f"{examples} examples are none", fix="--examples 256")
    given = None
    if data is None and (image_size, mean, std) == (None, None, None):
        original = load_original(model, weights=weights, inputs=inputs, allow_pickle=allow_pickle)
    else:
        sources = load_sources(
            model, weights=weights, data=data, inputs=inputs, metric=metric, image_size=image_size, mean=mean,
            std=std, seed=seed, allow_pickle=allow_pickle,
        )  # fmt: skip
        original, given = sources.model, sources.data
        tell_notes(sources, shown)
    follow(original)
    if not static:
        check_cores(threads)
    return inspect_model(
        original, given, examples=examples, threads=threads, static=static, seed=seed, progress=shown
    )
