"""A runtime turns a model into files and opens them again; a target says where and how they run.

This file, ``errors.py`` and each file under ``runtimes/`` import neither torch nor
a runtime's SDK at their top, so that a measuring process is as small as the
application that will ship.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from featherweight.errors import MissingRuntime, TargetError

if TYPE_CHECKING:
    from typing import Self

    import numpy as np

    from featherweight.formats import TensorFormat
    from featherweight.graph import Graph, Node
    from featherweight.model import Model

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]
Role = Literal["weight", "activation"]
Isa = Literal["avx2", "avx512", "vnni", "armv8", "armv8.2-dotprod", "generic"]

ISAS: tuple[str, ...] = ("avx2", "avx512", "vnni", "armv8", "armv8.2-dotprod", "generic")


@dataclass(frozen=True)
class Target:
    """Where and how an artifact runs.

    Attributes:
        runtime: Name of a file under ``runtimes/`` or of an entry point.
        isa: Instruction set that decides integer ranges; '' is this machine's.
        threads: Cores that the runtime may use, enforced by affinity.
        device: 'local', 'ssh:[user@]host[:port]' or 'adb:serial'.
        options: The runtime's own settings, recorded with the artifact.
    """

    runtime: str = "onnxruntime"
    isa: str = ""
    threads: int = 1
    device: str = "local"
    options: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self) -> Target:
        """The same target with this machine's instruction set filled in."""
        return self if self.isa else replace(self, isa=host_isa())

    def to_json(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "isa": self.isa,
            "threads": self.threads,
            "device": self.device,
            "options": dict(self.options),
        }


@dataclass(frozen=True)
class Artifact:
    """Files that a runtime loads.

    Attributes:
        runtime: Who loads them.
        folder: Where they lie.
        files: Every file that is loaded, relative to ``folder``.
        entries: Entry name -> the file that holds it.
        details: What lowering decided, by layer or tensor, for the report.
    """

    runtime: str
    folder: Path
    files: tuple[str, ...]
    entries: Mapping[str, str]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of every file that the runtime loads."""
        return sum((self.folder / name).stat().st_size for name in self.files)

    @property
    def sha256(self) -> str:
        """Digest of the file; of several: over names and digests, in the order of their names."""
        return digest_of({n: hashlib.sha256((self.folder / n).read_bytes()).digest() for n in self.files})

    def to_json(self) -> dict[str, Any]:
        """Everything but the folder, which moves."""
        return {
            "runtime": self.runtime,
            "files": list(self.files),
            "entries": dict(self.entries),
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], folder: Path) -> Artifact:
        return cls(data["runtime"], folder, tuple(data["files"]), data["entries"], data["details"])


def digest_of(files: Mapping[str, bytes]) -> str:
    """Digest of an artifact from those of its files, in hexadecimal; see :attr:`Artifact.sha256`."""
    if len(files) == 1:
        return next(iter(files.values())).hex()
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


@dataclass(frozen=True)
class Stored:
    """How a runtime really stores one tensor, read back from the artifact."""

    name: str
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Kernel:
    """One step that a runtime really executes for a call, after it fused and delegated what it could.

    Attributes:
        name: Of the step, as the runtime calls it.
        op: Kind of operator, as the runtime calls it.
        dtype: In what it computes: 'int8', 'float32', 'float16'; '' where the runtime does not tell.
        fast: It was fused or handed to the runtime's fast kernels; False: it fell back to a plain one.
        seconds: Of one call; None where the runtime tells no times.
        note: Why it is not fast, where that is known.
    """

    name: str
    op: str
    dtype: str = ""
    fast: bool = True
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Signature:
    """How one entry is called: all that a snippet which loads an artifact has to know.

    Attributes:
        inputs: Name, numpy dtype and shape of each input, for one example; a free axis has size 1.
        outputs: Names of the outputs, in order.
        entry: Which entry it is.
    """

    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[str, ...]
    entry: str = "forward"

    def to_json(self) -> dict[str, Any]:
        """Everything but the entry, by which it is found."""
        return {"inputs": [[*one] for one in self.inputs], "outputs": list(self.outputs)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], entry: str) -> Signature:
        inputs = tuple((name, dtype, tuple(shape)) for name, dtype, shape in data["inputs"])
        return cls(inputs, tuple(data["outputs"]), entry)


@dataclass(frozen=True)
class Profile:
    """Where the time of a call goes.

    Attributes:
        latency_s: Median of calls that were not profiled.
        calls: Profiled calls.
        kernels: Node of the optimized graph -> seconds of a call, mean of the middle half.
    """

    latency_s: float
    calls: int
    kernels: Mapping[str, float]


class Session(Protocol):
    """An opened artifact. Takes and returns the original's dtypes; hides integer inputs and outputs."""

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]: ...


class Runtime(ABC):
    """One runtime: what it stores, how a model becomes its files, how they are opened.

    Class attributes:
        extra: The pip extra that an error message names.
        packages: Distributions whose versions are recorded; the first one must be installed.
        module: The import that must be there.
        float_outputs: Operators whose integer kernels can return float values.
        one_grid: Operators whose integer inputs and output must share one scale and zero point.
        joined: Operators that become part of the integer layer which alone makes one of their inputs: that
            input is never stored, so it stays unrounded.
        fixed_ranges: Operator -> the only real range that its integer output can have.
        unmeasured: Why nothing here can run its artifacts; '' for a runtime that is measured.
    """

    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    module: ClassVar[str]
    float_outputs: ClassVar[frozenset[str]] = frozenset()
    one_grid: ClassVar[frozenset[str]] = frozenset()
    joined: ClassVar[frozenset[str]] = frozenset()
    fixed_ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    unmeasured: ClassVar[str] = ""
    _name = ""

    @classmethod
    def called(cls, name: str) -> Self:
        """This runtime under the name by which it was found."""
        runtime = cls()
        runtime._name = name
        return runtime

    @property
    def name(self) -> str:
        """By which it is found: that of its entry point, else of its file, with hyphens."""
        return self._name or type(self).__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def installed(cls) -> bool:
        return importlib.util.find_spec(cls.module) is not None

    def require(self) -> None:
        """Raise the error that tells how to install this runtime, unless it is there.

        Raises:
            MissingRuntime: Its package cannot be imported.
        """
        if not self.installed():
            raise MissingRuntime(
                f"runtime '{self.name}' is not installed: there is no package '{self.module}'",
                fix=f'pip install "featherweight[{self.extra}]"',
            )

    def load(self, target: Target) -> None:
        """Import the package, in the measuring process: what that takes is not the model's memory."""
        importlib.import_module(self.module)

    def version(self) -> str:
        """Versions of its packages, e.g. 'onnxruntime 1.31.1'."""
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages)

    @abstractmethod
    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        """Whether the operator really runs in these formats here, faster or smaller for it."""

    def integers_pay(self, node: Node, graph: Graph, target: Target) -> bool:
        """Whether a layer with weights is faster in integers than in float here; asked where both are had."""
        return True

    def width_multiple(self, target: Target) -> int:
        """Numbers of channels that are multiples of this waste no kernel's work; 8 where nothing is known."""
        return 8

    @abstractmethod
    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        """The exact grid that will be stored.

        Raises:
            TargetError: The runtime cannot store this format; says what it can.
        """

    @abstractmethod
    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        """Write the files of a model into the existing folder ``out``.

        Raises:
            TargetError: An operator or format cannot be stored.
        """

    @abstractmethod
    def open(self, artifact: Artifact, target: Target) -> Session:
        """Load the files; runs in the measuring process, so only the runtime torch may need torch."""

    @abstractmethod
    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        """What the files hold, by parameter name: dtype and bytes, read back from them."""

    def profile(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], folder: Path, *, entry: str
    ) -> Profile:
        """Time every kernel of some calls; runs in the measuring process.

        ``folder`` takes ``optimized.onnx``, the graph that really ran, whose nodes carry the profile's names.

        Raises:
            TargetError: This runtime tells nothing of its kernels.
        """
        raise TargetError(f"{self.name} tells no times of its kernels", fix="profile with onnxruntime")

    def tunings(self, target: Target) -> Sequence[Mapping[str, Json]]:
        """Sets of ``Target.options`` worth measuring beside the default, the likeliest gain first."""
        return ()

    def values(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Mapping[str, np.ndarray]:
        """What the artifact computes inside for one call: traced value name -> real values, in order.

        Runs in the measuring process. Holds as many values as the runtime gives away, in the layout of the
        original (channels first), integers dequantized. How file names map to traced ones is part of
        ``artifact.details['values']``.

        Raises:
            TargetError: This runtime shows nothing but outputs.
        """
        raise TargetError(f"{self.name} shows nothing but outputs", fix="compare on onnxruntime")

    def kernels(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Sequence[Kernel]:
        """What the runtime really executes for a call; runs in the measuring process.

        Raises:
            TargetError: This runtime does not tell.
        """
        raise TargetError(f"{self.name} does not tell what it executes", fix="look at onnxruntime's kernels")

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        """Short programs that load the artifact without this package: file name -> text.

        Always ``load.py``; and ``load.cpp``, ``Load.kt``, ``Load.java``, ``load.swift`` or ``load.mjs`` where
        the runtime is used from there. Each opens the artifact's file beside it with the target's threads
        and options, and calls it once on zeros; ``load.py`` prints the shape of each output.
        """
        return {}


def host_isa() -> str:
    """The instruction set of this machine, as far as integer kernels care."""
    return isa_of(platform.machine(), cpu_flags())


def isa_of(machine: str, flags: frozenset[str]) -> str:
    """The instruction set of a machine, by the name of its architecture and its processor's features."""
    machine = machine.lower()
    if machine in ("x86_64", "amd64"):
        if "avx512_vnni" in flags or "avx_vnni" in flags:
            return "vnni"
        if "avx512bw" in flags:
            return "avx512"
        return "avx2" if "avx2" in flags else "generic"
    if machine in ("aarch64", "arm64", "arm64-v8a"):
        return "armv8.2-dotprod" if "asimddp" in flags else "armv8"
    return "generic"


def cpu_flags() -> frozenset[str]:
    """Feature flags that the kernel reports; empty where it reports none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return flags_in(text)


def flags_in(cpuinfo: str) -> frozenset[str]:
    """Feature flags of the first processor in the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
