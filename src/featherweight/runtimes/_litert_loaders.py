"""Short programs that load a ``.tflite``: Python, C++, Kotlin on Android, Swift on iOS.

Part of ``litert.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featherweight.runtime import Artifact, Signature, Target
from featherweight.runtimes._litert_session import settings

_BYTES = {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "int8": 1, "uint8": 1, "bool": 1}


def loaders(artifact: Artifact, target: Target, signature: Signature) -> dict[str, str]:
    """File name -> text."""
    file = artifact.entries[signature.entry]
    types = artifact.details["entries"][signature.entry]["types"]
    inputs = [(name, dtype, shape) for (name, _, shape), dtype in zip(signature.inputs, types, strict=True)]
    arguments = settings(target)
    threads = arguments["num_threads"]
    return {
        "load.py": _python(file, arguments, inputs),
        "load.cpp": _cpp(file, threads, inputs),
        "Load.kt": _kotlin(file, threads, inputs, len(signature.outputs)),
        "load.swift": _swift(file, threads, inputs, len(signature.outputs)),
    }


_Inputs = Sequence[tuple[str, str, tuple[int, ...]]]


def _python(file: str, arguments: Mapping[str, Any], inputs: _Inputs) -> str:
    words = {"experimental_op_resolver_type": "OpResolverType.{}"}
    options = ", ".join(
        f"{name}={words.get(name, '{!r}').format(getattr(value, 'name', value))}"
        for name, value in arguments.items()
    )
    imports = "Interpreter, OpResolverType" if "OpResolverType" in options else "Interpreter"
    zeros = ", ".join(f"{name!r}: np.zeros({shape}, np.{dtype})" for name, dtype, shape in inputs)
    return f"""from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import {imports}

interpreter = Interpreter(str(Path(__file__).with_name({file!r})), {options})
run = interpreter.get_signature_runner()
for name, output in run(**{{{zeros}}}).items():
    print(name, output.shape)
"""


def _cpp(file: str, threads: int, inputs: _Inputs) -> str:
    return f"""#include <cstring>
#include <iostream>
#include "tensorflow/lite/core/interpreter_builder.h"
#include "tensorflow/lite/interpreter.h"
#include "tensorflow/lite/kernels/register.h"
#include "tensorflow/lite/model_builder.h"

int main() {{
    auto model = tflite::FlatBufferModel::BuildFromFile("{file}");
    tflite::ops::builtin::BuiltinOpResolver resolver;  // with the XNNPACK delegate
    std::unique_ptr<tflite::Interpreter> interpreter;
    tflite::InterpreterBuilder(*model, resolver)(&interpreter, {threads});
    interpreter->AllocateTensors();
    for (int i = 0; i < {len(inputs)}; ++i)
        std::memset(interpreter->input_tensor(i)->data.raw, 0, interpreter->input_tensor(i)->bytes);
    interpreter->Invoke();
    for (std::size_t i = 0; i < interpreter->outputs().size(); ++i)
        std::cout << interpreter->output_tensor(i)->bytes << " bytes" << std::endl;
}}
"""


def _kotlin(file: str, threads: int, inputs: _Inputs, outputs: int) -> str:
    buffers = ", ".join(f"buffer({_size(dtype, shape)})" for _, dtype, shape in inputs)
    return f"""import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.tensorflow.lite.Interpreter  // com.google.ai.edge.litert:litert

fun buffer(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

fun load(folder: File): List<ByteBuffer> {{
    val options = Interpreter.Options().setNumThreads({threads}).setUseXNNPACK(true)
    Interpreter(File(folder, "{file}"), options).use {{ interpreter ->
        val outputs = List({outputs}) {{ buffer(interpreter.getOutputTensor(it).numBytes()) }}
        val byIndex = outputs.withIndex().associate {{ it.index to it.value as Any }}
        interpreter.runForMultipleInputsOutputs(arrayOf<Any>({buffers}), byIndex)
        return outputs
    }}
}}
"""


def _swift(file: str, threads: int, inputs: _Inputs, outputs: int) -> str:
    copies = "\n".join(
        f"try interpreter.copy(Data(count: {_size(dtype, shape)}), toInputAt: {index})"
        for index, (_, dtype, shape) in enumerate(inputs)
    )
    return f"""import Foundation
import TensorFlowLite  // the pod TensorFlowLiteSwift

var options = Interpreter.Options()
options.threadCount = {threads}
options.isXNNPackEnabled = true
let interpreter = try Interpreter(modelPath: "{file}", options: options)
try interpreter.allocateTensors()
{copies}
try interpreter.invoke()
for index in 0..<{outputs} {{
    print(try interpreter.output(at: index).shape.dimensions)
}}
"""


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an input."""
    size = _BYTES[dtype]
    for length in shape:
        size *= length
    return size
