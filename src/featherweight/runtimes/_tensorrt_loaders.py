"""Short programs that build an engine from the ONNX file and run it: trtexec's line, Python and C++.

Part of ``tensorrt.py``. Networks are strongly typed: precision is what the file says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from featherweight.runtime import Artifact, Signature

_Inputs = Sequence[tuple[str, str, tuple[int, ...]]]


def command(file: str, details: Mapping[str, Any], inputs: _Inputs) -> str:
    """What builds and times an engine on the device."""
    parts = ["trtexec", f"--onnx={file}", "--stronglyTyped"]
    shapes = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, _, shape in inputs)
    parts += [f"--shapes={shapes}"] if shapes else []
    parts += ["--sparsity=enable"] if details.get("two_to_four") else []
    return " ".join([*parts, f"--saveEngine={file.removesuffix('onnx')}engine"])


def loaders(artifact: Artifact, signature: Signature) -> dict[str, str]:
    """File name -> text."""
    file, sparse = artifact.entries[signature.entry], bool(artifact.details.get("two_to_four"))
    line = command(file, artifact.details, signature.inputs)
    return {
        "load.py": _python(file, line, sparse, signature),
        "load.cpp": _cpp(file, line, sparse, signature),
    }


def _python(file: str, line: str, sparse: bool, signature: Signature) -> str:
    shapes = {name: shape for name, _, shape in signature.inputs}
    flag = "config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)  # two of four are zeros\n" if sparse else ""
    return f'''"""Written, not measured. The same from the command line: {line}"""
from pathlib import Path

import numpy as np
import tensorrt as trt
from cuda.bindings import runtime as cuda  # pip install cuda-python

shapes = {shapes!r}
log = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
if not parser.parse_from_file(str(Path(__file__).with_name({file!r}))):
    raise SystemExit(parser.get_error(0).desc())
config, profile = builder.create_builder_config(), builder.create_optimization_profile()
{flag}for name, shape in shapes.items():
    profile.set_shape(name, shape, shape, shape)
config.add_optimization_profile(profile)
engine = trt.Runtime(log).deserialize_cuda_engine(builder.build_serialized_network(network, config))
context = engine.create_execution_context()
for name, shape in shapes.items():
    context.set_input_shape(name, shape)
buffers = {{}}
for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
    host = np.zeros(tuple(context.get_tensor_shape(name)), trt.nptype(engine.get_tensor_dtype(name)))
    device = cuda.cudaMalloc(max(host.nbytes, 1))[1]
    buffers[name] = host, device
    cuda.cudaMemcpy(device, host.ctypes.data, host.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
    context.set_tensor_address(name, int(device))
context.execute_async_v3(0)
cuda.cudaDeviceSynchronize()
for name in {list(signature.outputs)!r}:
    host, device = buffers[name]
    cuda.cudaMemcpy(host.ctypes.data, device, host.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
    print(host.shape)
'''


def _cpp(file: str, line: str, sparse: bool, signature: Signature) -> str:
    shapes = ", ".join(
        f"{{{json.dumps(name)}, nvinfer1::Dims{{{len(shape)}, {{{', '.join(map(str, shape))}}}}}}}"
        for name, _, shape in signature.inputs
    )
    flag = (
        "    config->setFlag(nvinfer1::BuilderFlag::kSPARSE_WEIGHTS);  // two of four are zeros\n"
        if sparse
        else ""
    )
    return f"""// Written, not measured. The same from the command line: {line}
#include <NvInfer.h>
#include <NvOnnxParser.h>
#include <cuda_runtime_api.h>
#include <iostream>
#include <map>
#include <memory>
#include <string>

struct Log : nvinfer1::ILogger {{
    void log(Severity severity, char const* text) noexcept override {{
        if (severity <= Severity::kWARNING) std::cerr << text << std::endl;
    }}
}};

int main() {{
    Log log;
    std::map<std::string, nvinfer1::Dims> shapes{{{shapes}}};
    std::unique_ptr<nvinfer1::IBuilder> builder{{nvinfer1::createInferBuilder(log)}};
    auto typed = 1U << static_cast<uint32_t>(nvinfer1::NetworkDefinitionCreationFlag::kSTRONGLY_TYPED);
    std::unique_ptr<nvinfer1::INetworkDefinition> network{{builder->createNetworkV2(typed)}};
    std::unique_ptr<nvonnxparser::IParser> parser{{nvonnxparser::createParser(*network, log)}};
    if (!parser->parseFromFile({json.dumps(file)}, 2)) return 1;
    std::unique_ptr<nvinfer1::IBuilderConfig> config{{builder->createBuilderConfig()}};
{flag}    auto* profile = builder->createOptimizationProfile();
    for (auto const& [name, shape] : shapes)
        for (auto end : {{nvinfer1::OptProfileSelector::kMIN, nvinfer1::OptProfileSelector::kOPT,
                         nvinfer1::OptProfileSelector::kMAX}})
            profile->setDimensions(name.c_str(), end, shape);
    config->addOptimizationProfile(profile);
    std::unique_ptr<nvinfer1::IHostMemory> plan{{builder->buildSerializedNetwork(*network, *config)}};
    std::unique_ptr<nvinfer1::IRuntime> runtime{{nvinfer1::createInferRuntime(log)}};
    std::unique_ptr<nvinfer1::ICudaEngine> engine{{
        runtime->deserializeCudaEngine(plan->data(), plan->size())}};
    std::unique_ptr<nvinfer1::IExecutionContext> context{{engine->createExecutionContext()}};
    for (auto const& [name, shape] : shapes) context->setInputShape(name.c_str(), shape);
    for (int i = 0; i < engine->getNbIOTensors(); ++i) {{
        auto const* name = engine->getIOTensorName(i);
        auto shape = context->getTensorShape(name);
        std::size_t bytes = 8;  // of an element, at most
        for (int axis = 0; axis < shape.nbDims; ++axis) bytes *= shape.d[axis];
        void* memory = nullptr;
        cudaMalloc(&memory, bytes);
        cudaMemset(memory, 0, bytes);
        context->setTensorAddress(name, memory);
    }}
    return context->enqueueV3(nullptr) && cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}}
"""
