"""Programs of a few lines that load a .pte file where ExecuTorch is used: Python, C++, Android and iOS.

Part of ``executorch.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from string import Template

from featherweight.runtime import Signature

_PYTHON = Template("""\
import torch
from executorch.extension.pybindings import _portable_lib

_portable_lib._unsafe_reset_threadpool($threads)
model = _portable_lib._load_for_executorch("$file")
inputs = [$inputs]
for output in model.run_method("forward", inputs):
    print(tuple(output.shape))
""")

_CPP = Template("""\
// Link executorch, extension_module, extension_tensor, xnnpack_backend and the portable kernels.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/extension/threadpool/threadpool.h>

using namespace executorch::extension;

int main() {
  threadpool::get_threadpool()->_unsafe_reset_threadpool($threads);
  Module module("$file");
$inputs
  const auto outputs = module.forward({$names});
  return outputs.ok() ? 0 : 1;
}
""")

_KOTLIN = Template("""\
// implementation("org.pytorch:executorch-android:1.4.1")
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

fun run(folder: String): Array<EValue> {
    val module = Module.load("$$folder/$file", Module.LOAD_MODE_MMAP, $threads)
    return module.forward($inputs)
}
""")

_SWIFT = Template("""\
// Package: https://github.com/pytorch/executorch, products executorch, backend_xnnpack and kernels_optimized.
// It has no call for the number of threads.
import ExecuTorch
import Foundation

let path = Bundle.main.path(forResource: "$stem", ofType: "pte")!
let module = Module(filePath: path)
$inputs
let outputs = try module.forward([$names])
print(outputs.count)
""")

_CPP_TYPES: Mapping[str, str] = {
    "float32": "float", "float64": "double", "int64": "int64_t", "int32": "int32_t", "bool": "bool",
}  # fmt: skip
_KOTLIN_TYPES: Mapping[str, str] = {
    "float32": "FloatArray", "float64": "DoubleArray", "int64": "LongArray", "int32": "IntArray",
    "bool": "ByteArray",
}  # fmt: skip
_SWIFT_TYPES: Mapping[str, str] = {
    "float32": "Float", "float64": "Double", "int64": "Int64", "int32": "Int32", "bool": "Bool",
}  # fmt: skip


def texts(file: str, threads: int, signature: Signature) -> Mapping[str, str]:
    """File name -> program, for one entry's file."""
    inputs = signature.inputs
    names = [f"input{index}" for index in range(len(inputs))]
    python = ", ".join(f"torch.zeros({list(shape)}, dtype=torch.{dtype})" for _, dtype, shape in inputs)
    cpp = "\n".join(
        _cpp_input(name, dtype, shape) for name, (_, dtype, shape) in zip(names, inputs, strict=True)
    )
    kotlin = ", ".join(_kotlin_input(dtype, shape) for _, dtype, shape in inputs)
    swift = "\n".join(
        f"let {name} = Tensor<{_SWIFT_TYPES.get(dtype, 'Float')}>.zeros(shape: {list(shape)})"
        for name, (_, dtype, shape) in zip(names, inputs, strict=True)
    )
    return {
        "load.py": _PYTHON.substitute(file=file, threads=threads, inputs=python),
        "load.cpp": _CPP.substitute(file=file, threads=threads, inputs=cpp, names=", ".join(names)),
        "Load.kt": _KOTLIN.substitute(file=file, threads=threads, inputs=kotlin),
        "load.swift": _SWIFT.substitute(stem=file.removesuffix(".pte"), inputs=swift, names=", ".join(names)),
    }


def _cpp_input(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    kind = _CPP_TYPES.get(dtype, "float")
    sizes = ", ".join(map(str, shape))
    return f"  auto {name} = make_tensor_ptr<{kind}>({{{sizes}}}, std::vector<{kind}>({math.prod(shape)}));"


def _kotlin_input(dtype: str, shape: tuple[int, ...]) -> str:
    kind = _KOTLIN_TYPES.get(dtype, "FloatArray")
    sizes = ", ".join(map(str, shape))
    return f"EValue.from(Tensor.fromBlob({kind}({math.prod(shape)}), longArrayOf({sizes})))"
