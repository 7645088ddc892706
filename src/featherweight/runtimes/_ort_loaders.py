"""Programs that load an ONNX file with ONNX Runtime: Python, C++, Java.

Part of ``onnxruntime.py``; pure text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from featherweight.runtime import Signature

_CPP = {
    "float32": "float",
    "float64": "double",
    "int64": "int64_t",
    "int32": "int32_t",
    "uint8": "uint8_t",
    "bool": "bool",
}
_JAVA = {"float32": "FloatBuffer", "float64": "DoubleBuffer", "int64": "LongBuffer", "int32": "IntBuffer"}


def python(file: str, version: str, threads: int, options: Mapping[str, Any], signature: Signature) -> str:
    """Needs numpy and onnxruntime."""
    feed = ", ".join(f"{name!r}: np.zeros({shape!r}, {dtype!r})" for name, dtype, shape in signature.inputs)
    lines = [
        f'"""Runs {file} with ONNX Runtime {version}'.rstrip() + '."""',
        "from pathlib import Path",
        "",
        "import numpy as np",
        "import onnxruntime",
        "",
        "options = onnxruntime.SessionOptions()",
        f"options.intra_op_num_threads, options.inter_op_num_threads = {threads}, 1",
        *(f"options.{name} = {_python_value(name, value)}" for name, value in options.items()),
        f"model = Path(__file__).with_name({file!r})",
        'session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])',
        f"outputs = session.run(None, {{{feed}}})",
        "print(*(output.shape for output in outputs))",
    ]
    return "\n".join(lines) + "\n"


def _python_value(name: str, value: Any) -> str:
    return (
        f"onnxruntime.GraphOptimizationLevel.{value}" if name == "graph_optimization_level" else repr(value)
    )


def cpp(file: str, threads: int, options: Mapping[str, Any], signature: Signature) -> str:
    """C++17 with onnxruntime_cxx_api.h."""
    lines = [
        "#include <onnxruntime_cxx_api.h>",
        "#include <iostream>",
        "#include <vector>",
        "",
        "int main() {",
        '  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "featherweight");',
        "  Ort::SessionOptions options;",
        f"  options.SetIntraOpNumThreads({threads});",
    ]
    if not options.get("enable_cpu_mem_arena", True):
        lines.append("  options.DisableCpuMemArena();")
    if not options.get("enable_mem_pattern", True):
        lines.append("  options.DisableMemPattern();")
    if level := options.get("graph_optimization_level"):
        lines.append(f"  options.SetGraphOptimizationLevel({level});")
    lines += [
        f"  Ort::Session session(env, {json.dumps(file)}, options);",
        "  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);",
        "  std::vector<Ort::Value> inputs;",
    ]
    for index, (_, dtype, shape) in enumerate(signature.inputs):
        kind = _CPP.get(dtype, "float")
        size = " * ".join(map(str, shape)) or "1"
        lines += [
            f"  static {kind} data{index}[{size}] = {{}};",
            f"  std::vector<int64_t> shape{index}{{{', '.join(map(str, shape))}}};",
            f"  inputs.push_back(Ort::Value::CreateTensor<{kind}>(memory, data{index}, {size}, "
            f"shape{index}.data(), shape{index}.size()));",
        ]
    names = ", ".join(json.dumps(name) for name, _, _ in signature.inputs)
    outputs = ", ".join(map(json.dumps, signature.outputs))
    lines += [
        f"  const char* names[] = {{{names}}};",
        f"  const char* wanted[] = {{{outputs}}};",
        f"  auto outputs = session.Run(Ort::RunOptions{{}}, names, inputs.data(), inputs.size(), wanted, "
        f"{len(signature.outputs)});",
        "  for (auto& output : outputs)",
        "    std::cout << output.GetTensorTypeAndShapeInfo().GetElementCount() << std::endl;",
        "}",
    ]
    return "\n".join(lines) + "\n"


_JAVA_LEVELS = {
    "ORT_DISABLE_ALL": "NO_OPT",
    "ORT_ENABLE_BASIC": "BASIC_OPT",
    "ORT_ENABLE_EXTENDED": "EXTENDED_OPT",
    "ORT_ENABLE_ALL": "ALL_OPT",
}


def _java_options(options: Mapping[str, Any]) -> list[str]:
    """The options that are tuned, in Java's words."""
    lines = []
    if not options.get("enable_cpu_mem_arena", True):
        lines.append("    options.setCPUArenaAllocator(false);")
    if not options.get("enable_mem_pattern", True):
        lines.append("    options.setMemoryPatternOptimization(false);")
    if level := _JAVA_LEVELS.get(str(options.get("graph_optimization_level"))):
        lines.append(f"    options.setOptimizationLevel(OrtSession.SessionOptions.OptLevel.{level});")
    return lines


def java(file: str, threads: int, options: Mapping[str, Any], signature: Signature) -> str:
    """Java 11, as on Android (com.microsoft.onnxruntime:onnxruntime-android)."""
    lines = [
        "import ai.onnxruntime.OnnxTensor;",
        "import ai.onnxruntime.OrtEnvironment;",
        "import ai.onnxruntime.OrtSession;",
        "import java.nio.*;",
        "import java.util.HashMap;",
        "import java.util.Map;",
        "",
        "public class Load {",
        "  public static void main(String[] arguments) throws Exception {",
        "    OrtEnvironment environment = OrtEnvironment.getEnvironment();",
        "    OrtSession.SessionOptions options = new OrtSession.SessionOptions();",
        f"    options.setIntraOpNumThreads({threads});",
        *_java_options(options),
        f"    OrtSession session = environment.createSession({json.dumps(file)}, options);",
        "    Map<String, OnnxTensor> inputs = new HashMap<>();",
    ]
    for name, dtype, shape in signature.inputs:
        buffer = _JAVA.get(dtype, "FloatBuffer")
        size = " * ".join(map(str, shape)) or "1"
        sizes = ", ".join(f"{one}L" for one in shape)
        lines.append(
            f"    inputs.put({json.dumps(name)}, OnnxTensor.createTensor(environment, "
            f"{buffer}.allocate({size}), new long[] {{{sizes}}}));"
        )
    lines += [
        "    OrtSession.Result outputs = session.run(inputs);",
        "    System.out.println(outputs.get(0).getInfo());",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"
