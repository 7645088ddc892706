"""How each runtime opens and calls its files; a runtime's package is imported when its artifact is opened.

An artifact's description comes with the bundle, so of a runtime's options only those are taken that change
how it computes: none that names a file.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featherweight_loader.errors import BundleError
from featherweight_loader.sessions import Artifact, Runner

_ORT = frozenset(
    {"intra_op_num_threads", "inter_op_num_threads", "enable_mem_pattern", "enable_cpu_mem_arena"}
    | {"enable_mem_reuse", "graph_optimization_level", "execution_mode", "execution_order"}
    | {"use_deterministic_compute", "log_severity_level"}
)
_OPENVINO = frozenset(
    {"INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT", "PERFORMANCE_HINT_NUM_REQUESTS"}
    | {"INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "EXECUTION_MODE_HINT"}
    | {"ENABLE_CPU_PINNING", "ENABLE_HYPER_THREADING", "SCHEDULING_CORE_TYPE", "KV_CACHE_PRECISION"}
    | {"CPU_DENORMALS_OPTIMIZATION", "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE", "ENABLE_TENSOR_PARALLEL"}
)
_LITERT = {
    "preserve_all_tensors": "experimental_preserve_all_tensors",
    "disable_delegate_clustering": "experimental_disable_delegate_clustering",
    "latest_features": "experimental_default_delegate_latest_features",
    "disable_node_fusion": "experimental_disable_delegate_node_fusion",
}
_MNN = frozenset({"precision", "memory", "power", "winograd"})
_NCNN_SHORTER = (
    *("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"),
    *("use_bf16_packed", "use_bf16_storage"),
)


def _checked(artifact: Artifact, known: frozenset[str], threads: int) -> dict[str, Any]:
    """The options, with no more threads than the caller gave."""
    for name in artifact.options:
        if name not in known:
            raise BundleError(
                f"the artifact asks {artifact.runtime} for '{name}', which the loader does not set",
                fix="unpack the bundle, and set it in your own program",
            )
    return {
        name: min(value, threads) if "threads" in name.lower() and isinstance(value, int) else value
        for name, value in artifact.options.items()
    }


class OnnxRuntime:
    """Microsoft's ONNX Runtime on CPU."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        for name, value in _checked(artifact, _ORT, threads).items():
            levels = ort.GraphOptimizationLevel.__members__ if name == "graph_optimization_level" else {}
            setattr(options, name, levels.get(value, value))
        single = set(artifact.files) == set(artifact.entries.values())
        place = None if single else artifact.unpacked(self)  # weights beside the graph
        self._sessions = {
            entry: ort.InferenceSession(
                artifact.data(entry) if place is None else os.fspath(place / file),
                options,
                providers=["CPUExecutionProvider"],
            )
            for entry, file in artifact.entries.items()
        }

    def run(self, inputs: Sequence[np.ndarray], entry: str) -> tuple[np.ndarray, ...]:
        """One call."""
        session = self._sessions[entry]
        names = [value.name for value in session.get_inputs()]
        return tuple(session.run(None, dict(zip(names, inputs, strict=True))))


class OpenVino:
    """OpenVINO's CPU plugin; compiled for each of the first shapes, since that is faster than for any."""

    _shapes = 4
    _rounded = 128

    def __init__(self, artifact: Artifact, threads: int) -> None:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it calls home
        import openvino

        self._core, self._tensor = openvino.Core(), openvino.Tensor
        self._settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self._rounded if artifact.details.get("dynamic") else 0,
            **_checked(artifact, _OPENVINO, threads),
        }
        place = artifact.unpacked(self)
        self._models = {
            entry: self._core.read_model(os.fspath(place / file)) for entry, file in artifact.entries.items()
        }
        self._requests: dict[tuple[object, ...], Any] = {}

    def run(self, inputs: Sequence[np.ndarray], entry: str) -> tuple[np.ndarray, ...]:
        """One call."""
        wanted = len(self._models[entry].inputs)
        if len(inputs) != wanted:
            raise ValueError(f"'{entry}' takes {wanted} inputs, not {len(inputs)}")
        arrays = [np.require(array, requirements=["C", "W"]) for array in inputs]
        request = self._request(entry, arrays)
        for index, array in enumerate(arrays):
            request.set_input_tensor(index, self._tensor(array, shared_memory=True))
        request.infer()
        return tuple(tensor.data.copy() for tensor in request.output_tensors)

    def _request(self, entry: str, arrays: Sequence[np.ndarray]) -> Any:
        key: tuple[object, ...] = (entry, *(array.shape for array in arrays))
        if key in self._requests:
            return self._requests[key]
        model = self._models[entry]
        if sum(one[0] == entry for one in self._requests) < self._shapes:
            if any(value.get_partial_shape().is_dynamic for value in model.inputs):
                model = model.clone()
                model.reshape({index: list(array.shape) for index, array in enumerate(arrays)})
        else:
            key = (entry,)
        if key not in self._requests:
            compiled = self._core.compile_model(model, "CPU", self._settings)
            self._requests[key] = compiled.create_infer_request()
        return self._requests[key]


class LiteRT:
    """Google's LiteRT, its interpreter with the XNNPACK delegate."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        options = _checked(artifact, frozenset({"threads", "resolver", "dynamic", *_LITERT}), threads)
        arguments = {_LITERT[name]: value for name, value in options.items() if name in _LITERT}
        arguments["num_threads"] = options.get("threads", threads)
        if "resolver" in options:
            arguments["experimental_op_resolver_type"] = OpResolverType[options["resolver"]]
        told = artifact.details["entries"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that keeping all tensors takes memory
            self._entries = {
                entry: _LiteRTEntry(Interpreter(model_content=artifact.data(entry), **arguments), told[entry])
                for entry in artifact.entries
            }

    def run(self, inputs: Sequence[np.ndarray], entry: str) -> tuple[np.ndarray, ...]:
        """One call; row by row where the file takes no more at once."""
        return self._entries[entry].run(inputs)


class _LiteRTEntry:
    """One ``.tflite``, and what was told of it when it was made."""

    def __init__(self, runner: Any, told: Mapping[str, Any]) -> None:
        self._runner = runner
        self._batched, self._batches = list(told["batched"]), bool(told["batches"])
        self._types = [np.dtype(dtype) for _, dtype in told["outputs"]]
        self._inputs, self._outputs = runner.get_input_details(), runner.get_output_details()
        runner.allocate_tensors()

    def run(self, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        if len(inputs) != len(self._inputs):
            raise ValueError(f"it takes {len(self._inputs)} inputs, not {len(inputs)}")
        rows = inputs[self._batched[0]].shape[0] if self._batched else 1
        if rows == 1 or not self._batched or self._batches:
            return self._once(inputs)
        answers = [
            self._once([x[row : row + 1] if i in self._batched else x for i, x in enumerate(inputs)])
            for row in range(rows)
        ]
        return tuple(np.concatenate(parts) for parts in zip(*answers, strict=True))

    def _once(self, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        runner, changed = self._runner, False
        for detail, x in zip(self._inputs, inputs, strict=True):
            if self._batched and detail["shape"][0] != x.shape[0]:
                runner.resize_tensor_input(detail["index"], x.shape)
                changed = True
        if changed:
            runner.allocate_tensors()
            self._inputs = runner.get_input_details()
        for detail, x in zip(self._inputs, inputs, strict=True):
            runner.set_tensor(detail["index"], _stored(x, detail))
        runner.invoke()
        found = (_real(runner.get_tensor(detail["index"]), detail) for detail in self._outputs)
        return tuple(y.astype(kind, copy=False) for y, kind in zip(found, self._types, strict=True))


def _stored(x: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """An input as the file takes it: integers where it does, of a real value."""
    scale, zero_point = detail["quantization"]
    kind = np.dtype(detail["dtype"])
    if not scale or kind.kind not in "iu" or x.dtype.kind != "f":
        return np.ascontiguousarray(x, kind)
    ends = np.iinfo(kind)
    steps: np.ndarray = np.clip(np.rint(x / scale) + zero_point, ends.min, ends.max)
    return steps.astype(kind)


def _real(y: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    """An output's real value, where the file gives integers for one."""
    scale, zero_point = detail["quantization"]
    if not scale or y.dtype.kind not in "iu":
        return y
    real: np.ndarray = (y.astype(np.float32) - zero_point) * np.float32(scale)
    return real


class ExecuTorch:
    """PyTorch's runtime for devices; its Python bindings need torch. A file takes one example."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._threads = _checked(artifact, frozenset({"threads"}), threads).get("threads", threads)
        self._torch = importlib.import_module("torch")  # whose libraries the bindings are linked with
        self._bindings = importlib.import_module("executorch.extension.pybindings._portable_lib")
        self._place, self._files = artifact.unpacked(self), artifact.entries
        self._batched = artifact.details["batched"]
        self._modules: dict[str, Any] = {}
        self._load()

    def _load(self) -> None:
        """The pool of threads is the process's: a change of its size ends the one that files hold."""
        self._modules.clear()
        if self._bindings._threadpool_get_thread_count() != self._threads:
            self._bindings._unsafe_reset_threadpool(self._threads)
        self._modules = {
            entry: self._bindings._load_for_executorch(os.fspath(self._place / file))
            for entry, file in self._files.items()
        }
        for module in self._modules.values():
            module.method_meta("forward")  # a file that is none is found now, not at the first call

    def run(self, inputs: Sequence[np.ndarray], entry: str) -> tuple[np.ndarray, ...]:
        """One call, example by example."""
        if self._bindings._threadpool_get_thread_count() != self._threads:
            self._load()
        cut, joined = self._batched[entry]["inputs"], self._batched[entry]["outputs"]
        pairs = list(zip(inputs, cut, strict=True))
        count = next((len(x) for x, by_example in pairs if by_example), 1)
        rows = [
            self._once(entry, [x[i : i + 1] if by_example else x for x, by_example in pairs])
            for i in range(count)
        ]
        if not rows:
            empty = self._once(entry, [np.zeros((1, *x.shape[1:]), x.dtype) if c else x for x, c in pairs])
            return tuple(y[:0] if by_example else y for y, by_example in zip(empty, joined, strict=True))
        return tuple(
            np.concatenate(column) if by_example and count > 1 else column[0]
            for column, by_example in zip(zip(*rows, strict=True), joined, strict=True)
        )

    def _once(self, entry: str, inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        tensors = [self._torch.from_numpy(np.require(x, requirements=["C", "W"])) for x in inputs]
        return tuple(output.numpy() for output in self._modules[entry].run_method("forward", tensors))


class Mnn:
    """Alibaba's MNN, CPU back end."""

    _hint, _winograd, _resize = 3, 1, 3  # Interpreter::HintMode of Winograd's tiles, SessionInfoCode

    def __init__(self, artifact: Artifact, threads: int) -> None:
        with _quiet():
            self._mnn = importlib.import_module("MNN")
        options = _checked(artifact, _MNN, threads)
        level = options.pop("winograd", self._winograd)
        config = {"backend": "CPU", "numThread": threads, "precision": "high", **options}
        place = artifact.unpacked(self)
        self._entries = {
            entry: self._open(os.fspath(place / file), level, config)
            for entry, file in artifact.entries.items()
        }
        self._signatures = artifact.details["signatures"]

    def _open(self, path: str, level: int, config: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        with _quiet():
            interpreter = self._mnn.Interpreter(path)
            interpreter.setSessionHint(self._hint, level)
            session = interpreter.createSession(config)
        self._check(interpreter, session)
        return interpreter, session, dict(interpreter.getSessionInputAll(session))

    def run(self, inputs: Sequence[np.ndarray], entry: str) -> tuple[np.ndarray, ...]:
        """One call, after making room for the shapes of the inputs."""
        interpreter, session, tensors = self._entries[entry]
        given = dict(zip(self._signatures[entry]["inputs"], inputs, strict=True))
        given = {name: array for name, array in given.items() if name in tensors}
        changed = [name for name, array in given.items() if tuple(tensors[name].getShape()) != array.shape]
        for name in changed:
            interpreter.resizeTensor(tensors[name], given[name].shape)
        if changed:
            interpreter.resizeSession(session)
            self._check(interpreter, session)
        for name, array in given.items():
            tensors[name].copyFrom(self._tensor(array.shape, tensors[name].getDataType(), array))
        interpreter.runSession(session)
        return tuple(
            self._host(interpreter.getSessionOutput(session, name)).astype(dtype, copy=False)
            for name, dtype in self._signatures[entry]["outputs"]
        )

    def _host(self, tensor: Any) -> np.ndarray:
        shape = tensor.getShape()
        copy = self._tensor(shape, tensor.getDataType(), None)
        tensor.copyToHostTensor(copy)
        return np.array(copy.getNumpyData()).reshape(shape)

    def _tensor(self, shape: Sequence[int], kind: Any, array: np.ndarray | None) -> Any:
        mnn = self._mnn
        kinds = ((mnn.Halide_Type_Float, np.float32), (mnn.Halide_Type_Uint8, np.uint8))
        dtype: type[np.generic] = next((dtype for known, dtype in kinds if kind == known), np.int32)
        data = np.zeros(shape, dtype) if array is None else np.ascontiguousarray(array, dtype)
        return mnn.Tensor(tuple(shape), kind, data, mnn.Tensor_DimensionType_Caffe)

    def _check(self, interpreter: Any, session: Any) -> None:
        """MNN only prints that it could not prepare a session, and crashes when that is run."""
        if interpreter.getSessionInfo(session, self._resize) != 0:
            raise BundleError("mnn cannot prepare the artifact for inputs of this shape")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MNN prints to standard output what it sees of the machine; its errors still come as exceptions."""
    import ctypes

    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class Ncnn:
    """Tencent's ncnn; it knows no batch, so one example after the other."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        ncnn = importlib.import_module("ncnn")
        plain = ncnn.Option()
        known = {name for name in dir(plain) if isinstance(getattr(plain, name), (bool, int))}
        half = {"use_fp16_storage": True} if all(artifact.details["half"].values()) else {}
        options = {
            **dict.fromkeys(_NCNN_SHORTER, False),
            "num_threads": threads,
            **half,
            **_checked(artifact, frozenset(known), threads),
        }
        self._ncnn, self._signatures = ncnn, artifact.details["signatures"]
        place = artifact.unpacked(self)
        self._nets = {entry: self._open(place / file, options) for entry, file in artifact.entries.items()}

    def _open(self, param: Path, options: Mapping[str, Any]) -> Any:
        net = self._ncnn.Net()
        for name, value in options.items():
            setattr(net.opt, name, value)
        binary = param.with_suffix(".bin")
        if net.load_param(os.fspath(param)) != 0 or net.load_model(os.fspath(binary)) != 0:
            raise BundleError(f"ncnn cannot load '{param.name}'", fix="install the version that wrote it")
        return net

    def run(self, inputs: Sequence[np.ndarray], entry: str) -> tuple[np.ndarray, ...]:
        """One call, example by example."""
        told = self._signatures[entry]
        for x, (name, _, shape) in zip(inputs, told["inputs"], strict=True):
            if list(x.shape[1:]) != list(shape) or len(x) != len(inputs[0]):
                raise ValueError(f"'{name}' is {tuple(shape)} for one example, not {tuple(x.shape[1:])}")
        rows = [self._once(inputs, index, entry) for index in range(len(inputs[0]))]
        return tuple(
            np.stack([row[place] for row in rows]).reshape(len(rows), *shape).astype(dtype, copy=False)
            if rows
            else np.empty((0, *shape), dtype)
            for place, (_, dtype, shape) in enumerate(told["outputs"])
        )

    def _once(self, inputs: Sequence[np.ndarray], index: int, entry: str) -> list[np.ndarray]:
        told, net = self._signatures[entry], self._nets[entry]
        extractor = net.create_extractor()
        held = [self._matrix(x[index : index + 1] if told["batched"] else x[index]) for x in inputs]
        for name, blob in zip(net.input_names(), held, strict=True):
            extractor.input(name, blob)
        found = []
        for name, *_ in told["outputs"]:
            code, blob = extractor.extract(name)
            if code != 0:
                raise BundleError(f"ncnn stopped with code {code} before '{name}'")
            found.append(np.array(blob).reshape(-1))
        del extractor, held
        return found

    def _matrix(self, x: np.ndarray) -> Any:
        """An example as ncnn's matrix, which keeps a copy of its own."""
        held = np.ascontiguousarray(x, np.float32 if x.dtype.kind == "f" else np.int32)
        return self._ncnn.Mat(held).clone()


RUNNERS: Mapping[str, Callable[[Artifact, int], Runner]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "litert": LiteRT,
    "executorch": ExecuTorch,
    "mnn": Mnn,
    "ncnn": Ncnn,
}
