"""ncnn's network on numpy arrays: no batch there, so one example after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featherweight.errors import TargetError, nearest

if TYPE_CHECKING:
    import ncnn

    from featherweight.runtime import Artifact, Target

_CLOSE = 1e-3
SHORTER = (
    "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic",
    "use_bf16_packed", "use_bf16_storage",
)  # fmt: skip


def defaults(artifact: Artifact, target: Target) -> dict[str, Any]:
    """What an artifact is opened with: half precision in memory where every weight is stored so."""
    half = all(artifact.details["half"].values())
    return {"use_fp16_storage": half, **target.options} if half else dict(target.options)


def options(asked: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Every option that is set, by its name in ``ncnn::Option``: float32 stays float32 unless asked.

    Raises:
        TargetError: There is no such option, or it cannot have that value.
    """
    import ncnn

    plain = ncnn.Option()
    known = [n for n in dir(plain) if not n.startswith("_") and isinstance(getattr(plain, n), (bool, int))]
    for name, value in asked.items():
        if name not in known:
            raise TargetError(f"ncnn has no option '{name}'", fix=nearest(name, known))
        if type(value) is not type(getattr(plain, name)):
            raise TargetError(
                f"ncnn's option '{name}' cannot be {value!r}",
                fix=f"give it a value like {getattr(plain, name)!r}",
            )
    return {**dict.fromkeys(SHORTER, False), "num_threads": threads, **asked}


def load(param: str, binary: str, threads: int, asked: Mapping[str, Any]) -> ncnn.Net:
    """A network that is ready to run."""
    import ncnn

    net = ncnn.Net()
    for name, value in options(asked, threads).items():
        setattr(net.opt, name, value)
    if net.load_param(param) != 0 or net.load_model(binary) != 0:
        raise TargetError(
            f"ncnn cannot load '{param}'", fix="lower the model again with this version of ncnn"
        )
    return net


def matrix(x: np.ndarray) -> ncnn.Mat:
    """An example as ncnn's matrix, which keeps a copy of its own."""
    import ncnn

    kind = np.float32 if x.dtype.kind == "f" else np.int32
    held = np.ascontiguousarray(x, kind)  # ncnn only points at it, until the copy is made
    return ncnn.Mat(held).clone()


def start(
    net: ncnn.Net, inputs: Sequence[np.ndarray], index: int, *, keep_batch: bool
) -> tuple[ncnn.Extractor, list[ncnn.Mat]]:
    """An extractor for one example, and what must live as long as it does."""
    extractor = net.create_extractor()
    held = [matrix(x[index : index + 1] if keep_batch else x[index]) for x in inputs]
    for name, blob in zip(net.input_names(), held, strict=True):
        extractor.input(name, blob)
    return extractor, held


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers in the same order, up to rounding."""
    if one.size != other.size:
        return False
    a, b = one.reshape(-1).astype(np.float64), other.reshape(-1).astype(np.float64)
    return bool(np.abs(a - b).max(initial=0) <= _CLOSE * np.abs(b).max(initial=0) + 1e-7)


class Session:
    """Opened files; options in ``target.options`` are those of ``ncnn::Option`` by name."""

    def __init__(self, artifact: Artifact, target: Target) -> None:
        self._signatures = artifact.details["signatures"]
        self.nets = {
            entry: load(
                str(artifact.folder / file),
                str((artifact.folder / file).with_suffix(".bin")),
                target.threads,
                defaults(artifact, target),
            )
            for entry, file in artifact.entries.items()
        }

    def __call__(self, *inputs: np.ndarray, entry: str = "forward") -> tuple[np.ndarray, ...]:
        signature = self._signatures[entry]
        names = [name for name, *_ in signature["outputs"]]
        self.check(inputs, entry)
        rows = [self._one(names, inputs, index, entry) for index in range(len(inputs[0]))]
        return tuple(
            np.stack([row[place] for row in rows]).reshape(len(rows), *shape).astype(dtype, copy=False)
            if rows
            else np.empty((0, *shape), dtype)
            for place, (_, dtype, shape) in enumerate(signature["outputs"])
        )

    def check(self, inputs: Sequence[np.ndarray], entry: str) -> None:
        """Raise the error that says which input does not fit the file."""
        wanted = self._signatures[entry]["inputs"]
        if len(inputs) != len(wanted):
            raise TargetError(f"this file takes {len(wanted)} inputs, not {len(inputs)}")
        for x, (name, _, shape) in zip(inputs, wanted, strict=True):
            if list(x.shape[1:]) != list(shape) or len(x) != len(inputs[0]):
                raise TargetError(
                    f"ncnn's file takes '{name}' as {tuple(shape)} for one example, not {tuple(x.shape[1:])}",
                    fix="lower the model with an example of that shape",
                )

    def extractor(
        self, entry: str, inputs: Sequence[np.ndarray], index: int
    ) -> tuple[ncnn.Extractor, list[ncnn.Mat]]:
        """One to ask for blobs of an example, and what must live as long as it does."""
        return start(self.nets[entry], inputs, index, keep_batch=self._signatures[entry]["batched"])

    def _one(
        self, names: list[str], inputs: Sequence[np.ndarray], index: int, entry: str
    ) -> list[np.ndarray]:
        extractor, held = self.extractor(entry, inputs, index)
        found = []
        for name in names:
            code, blob = extractor.extract(name)
            if code != 0:
                raise TargetError(f"ncnn stopped with code {code} before '{name}'")
            found.append(np.array(blob).reshape(-1))
        del extractor, held
        return found
