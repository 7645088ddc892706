"""Short programs that load ncnn's files without this package: Python, and C++, which Android calls by JNI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from featherweight.runtime import Artifact, Signature, Target
from featherweight.runtimes._ncnn_session import SHORTER, defaults

_SIZES = {1: "{w}", 2: "{w}, {h}", 3: "{w}, {h}, {c}", 4: "{w}, {h}, {d}, {c}"}


def loaders(artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
    """``load.py`` and ``load.cpp``; Java and Kotlin have no ncnn of their own."""
    file = artifact.entries[signature.entry]
    outputs = [name for name, *_ in artifact.details["signatures"][signature.entry]["outputs"]]
    chosen: dict[str, object] = {**dict.fromkeys(SHORTER, False), "num_threads": target.threads}
    chosen |= defaults(artifact, target)
    return {
        "load.py": _python(file, outputs, chosen, signature),
        "load.cpp": _cpp(file, outputs, chosen, signature),
    }


def _binary(file: str) -> str:
    return Path(file).with_suffix(".bin").name


def _python(file: str, outputs: list[str], chosen: Mapping[str, object], signature: Signature) -> str:
    lines = ["from pathlib import Path", "", "import ncnn", "import numpy as np", ""]
    lines += ["here = Path(__file__).parent", "net = ncnn.Net()"]
    lines += [f"net.opt.{name} = {value!r}" for name, value in chosen.items()]
    lines += [f'net.load_param(str(here / "{file}"))', f'net.load_model(str(here / "{_binary(file)}"))']
    lines += ["run = net.create_extractor()  # one example; ncnn has no batch"]
    for index, (name, dtype, shape) in enumerate(signature.inputs):
        kind = "float32" if dtype.startswith("float") else "int32"
        lines.append(f"in{index} = np.zeros({tuple(shape[1:])!r}, np.{kind})  # {name}")
        lines.append(f'run.input("in{index}", ncnn.Mat(in{index}))')
    for blob, name in zip(outputs, signature.outputs, strict=True):
        lines.append(f'print("{name}", np.array(run.extract("{blob}")[1]).shape)')
    return "\n".join(lines) + "\n"


def _cpp(file: str, outputs: list[str], chosen: Mapping[str, object], signature: Signature) -> str:
    lines = [
        "// On Android this is called through JNI; ncnn has no Java or Kotlin interface.",
        "#include <cstdio>",
    ]
    lines += ['#include "net.h"', "", "int main() {", "    ncnn::Net net;"]
    lines += [f"    net.opt.{name} = {str(value).lower()};" for name, value in chosen.items()]
    lines += [f'    if (net.load_param("{file}") || net.load_model("{_binary(file)}")) return 1;']
    lines += ["    ncnn::Extractor run = net.create_extractor();  // one example; ncnn has no batch"]
    for index, (name, _, shape) in enumerate(signature.inputs):
        sizes = dict(zip("whc" if len(shape) < 5 else "whdc", reversed(shape[1:]), strict=False))
        size = _SIZES[len(sizes)].format(**sizes)
        lines.append(f"    ncnn::Mat in{index}({size});  // {name}")
        lines += [f"    in{index}.fill({'0.f' if _is_float(signature, index) else '0'});"]
        lines += [f'    run.input("in{index}", in{index});']
    for index, (blob, name) in enumerate(zip(outputs, signature.outputs, strict=True)):
        lines += [f"    ncnn::Mat out{index};", f'    run.extract("{blob}", out{index});']
        lines.append(f'    std::printf("{name} %zu\\n", out{index}.total());')
    return "\n".join([*lines, "}"]) + "\n"


def _is_float(signature: Signature, index: int) -> bool:
    return signature.inputs[index][1].startswith("float")
