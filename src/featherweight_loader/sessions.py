"""Opens the artifact in a bundle: finds its description, chooses its runtime, hands its files over."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from featherweight_loader.errors import BundleError, DamagedBundle, MissingPart

if TYPE_CHECKING:
    import numpy as np

    from featherweight_loader.bundle import Bundle

ABOUT = "artifact.json"
_MODULES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "litert": "ai_edge_litert",
    "executorch": "executorch",
    "mnn": "MNN",
    "ncnn": "ncnn",
}
_PACKAGES = {"litert": "ai-edge-litert", "mnn": "MNN"}
_ELSEWHERE = {
    "onnxruntime-web": "unpack the bundle and load its files in the browser",
    "coreml": "unpack the bundle and open the model with coremltools or in Xcode",
    "tensorrt": "unpack the bundle and build the engine on the machine with the GPU",
    "torch": "pip install featherweight, and open it with featherweight.load",
}


class Runner(Protocol):
    """The files of an artifact, opened by one runtime."""

    def run(self, inputs: Sequence[np.ndarray], entry: str) -> tuple[np.ndarray, ...]:
        """One call."""
        ...


class Session:
    """An opened artifact; it takes and returns the original's types.

    Attributes:
        runtime: That runs it.
        entries: What it can be called for.
    """

    def __init__(self, runtime: str, entries: Sequence[str], runner: Runner) -> None:
        self.runtime = runtime
        self.entries = tuple(entries)
        self._runner = runner

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        if entry not in self.entries:
            known = ", ".join(self.entries)
            raise MissingPart(f"the artifact has no entry '{entry}'", fix=f"take one of {known}")
        return self._runner.run(inputs, entry)


@dataclass(frozen=True)
class Artifact:
    """What an ``artifact.json`` of a bundle tells, and the files that it tells of.

    Attributes:
        runtime: Whose files these are.
        folder: Where in the bundle they lie: '' or a path that ends in '/'.
        files: Every file that is loaded, relative to the folder.
        entries: Entry -> its file.
        details: What lowering decided.
        options: Of the runtime, as the artifact was measured.
    """

    bundle: Bundle
    runtime: str
    folder: str
    files: tuple[str, ...]
    entries: Mapping[str, str]
    details: Mapping[str, Any]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, bundle: Bundle, path: str) -> Artifact:
        """The artifact that a description of the bundle tells of.

        Raises:
            DamagedBundle: The description is no such thing.
            MissingPart: It names a file that the bundle does not hold.
        """
        folder = path.removesuffix(ABOUT)
        try:
            told = json.loads(bundle.data(path))
            runtime, files, entries = told["runtime"], tuple(told["files"]), dict(told["entries"])
            details, options = dict(told["details"]), dict(told.get("target", {}).get("options", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedBundle(f"the description of an artifact is damaged: {error}", where=path) from error
        named = [runtime, *files, *entries, *entries.values()]
        if not files or not entries or not all(isinstance(name, str) for name in named):
            raise DamagedBundle("the description of an artifact names no files", where=path)
        for name in (*files, *entries.values()):
            if folder + name not in bundle.files:
                raise MissingPart(f"the bundle lacks '{folder}{name}'", where=path)
        if not set(entries.values()) <= set(files):
            raise DamagedBundle("an entry is in none of the files", where=path)
        return cls(bundle, runtime, folder, files, entries, details, options)

    def data(self, entry: str) -> bytes:
        """The file of an entry."""
        return self.bundle.data(self.folder + self.entries[entry])

    def unpacked(self, owner: object) -> Path:
        """A private folder with the files, which is deleted when its owner is."""
        place = tempfile.mkdtemp(prefix="featherweight-")
        weakref.finalize(owner, shutil.rmtree, place, ignore_errors=True)
        self.bundle.write([self.folder + name for name in self.files], Path(place))
        return Path(place) / self.folder


def open_session(bundle: Bundle, runtime: str | None, threads: int) -> Session:
    """The session of an artifact in a bundle.

    Raises:
        MissingPart: There is no such artifact, or its runtime's package is not installed.
        BundleError: The runtime cannot open it.
    """
    artifact = _chosen(bundle, runtime)
    name = artifact.runtime
    if name not in _MODULES:
        fix = _ELSEWHERE.get(name, "unpack the bundle and open its files with that runtime")
        raise MissingPart(f"the loader opens no artifacts of '{name}'", fix=fix)
    if not _installed(name):
        raise _not_installed(name)
    from featherweight_loader.runners import RUNNERS

    try:
        runner = RUNNERS[name](artifact, threads)
    except BundleError:
        raise
    except ImportError as error:
        raise _not_installed(name) from error
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedBundle(
            f"the description of an artifact is damaged: {type(error).__name__}: {error}",
            where=artifact.folder + ABOUT,
        ) from error
    except Exception as error:  # of runtimes: each has its own kinds
        raise BundleError(
            f"{name} cannot open the artifact: {error}",
            where=artifact.folder + ABOUT,
            fix="install the version of the runtime that artifact.json names",
        ) from error
    return Session(name, tuple(artifact.entries), runner)


def _not_installed(runtime: str) -> MissingPart:
    package = _PACKAGES.get(runtime, runtime)
    return MissingPart(f"the artifact is for {runtime}, which is not installed", fix=f"pip install {package}")


def _installed(runtime: str) -> bool:
    return runtime in _MODULES and importlib.util.find_spec(_MODULES[runtime]) is not None


def _chosen(bundle: Bundle, runtime: str | None) -> Artifact:
    """The artifact of a runtime, or the first that can be opened here."""
    found = [
        Artifact.of(bundle, path) for path in bundle.files if path == ABOUT or path.endswith(f"/{ABOUT}")
    ]
    if not found:
        raise MissingPart(f"the bundle holds no artifact: no {ABOUT}", fix="pack a folder that fit wrote")
    if runtime is not None:
        fitting = [one for one in found if one.runtime == runtime]
        if not fitting:
            known = ", ".join(one.runtime for one in found)
            raise MissingPart(f"the bundle holds no artifact for '{runtime}'", fix=f"take one of {known}")
        return fitting[0]
    return next((one for one in found if _installed(one.runtime)), found[0])
