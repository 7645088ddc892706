"""ncnn on CPU: pnnx makes float files, and this package stores formats in them.

What its kernels ask for: symmetric signed integers, activations per tensor, weights per channel. There
are integer kernels for convolutions and linear layers alone, which quantize what they read and return
floats, or integers where all readers are such convolutions. Depthwise convolutions are slower in integers
than in float on x86, by 2 to 3. There is no batch: a session takes one example after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featherweight.runtime import Artifact, Json, Kernel, Role, Runtime, Session, Signature, Stored, Target

if TYPE_CHECKING:
    from featherweight.formats import TensorFormat
    from featherweight.graph import Graph, Node
    from featherweight.model import Model

_STATIC = frozenset({"conv2d", "linear"})
_HALF = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
    | {"linear", "lstm", "gru", "embedding"}
)


class Ncnn(Runtime):
    """Tencent's ncnn, CPU kernels."""

    extra = "ncnn"
    packages = ("ncnn", "pnnx")
    module = "ncnn"
    float_outputs = _STATIC

    def supports(
        self, op: str, weight: TensorFormat | None, activation: TensorFormat | None, target: Target
    ) -> bool:
        from featherweight.formats import Dynamic, FloatCast, IntQuant, PerGroup

        if isinstance(activation, Dynamic):
            return False
        if weight is None:
            return activation is None or (op in _STATIC and activation.width == 8)
        if isinstance(weight, FloatCast):
            return activation is None and weight.dtype == "float16" and op in _HALF
        if not isinstance(weight, IntQuant):
            return False
        if activation is None:
            return op == "linear" and weight.width in (4, 6, 8)
        grouped = isinstance(weight.granularity, PerGroup)
        return op in _STATIC and weight.width == 8 and activation.width == 8 and not grouped

    def integers_pay(self, node: Node, graph: Graph, target: Target) -> bool:
        """Depthwise kernels in int8 take 2 to 3 times as long as in float32 on x86."""
        shape = graph.parameter_shapes[node.parameters["weight"]]
        depthwise = node.op == "conv2d" and node.attributes.get("groups", 1) > 1 and shape[1] == 1
        return not depthwise or target.resolved().isa.startswith("arm")

    def realise(self, fmt: TensorFormat, target: Target, role: Role) -> TensorFormat:
        from featherweight.runtimes._ncnn_formats import realise

        return realise(fmt, role)

    def lower(self, model: Model, target: Target, out: Path) -> Artifact:
        from featherweight.runtimes._ncnn_lower import lower
        from featherweight.tools.palettes import in_floats

        return lower(self, in_floats(model), target, out)

    def open(self, artifact: Artifact, target: Target) -> Session:
        from featherweight.runtimes._ncnn_session import Session as Opened

        return Opened(artifact, target)

    def stored(self, artifact: Artifact) -> Mapping[str, Stored]:
        from featherweight.runtimes._ncnn_look import stored

        return stored(artifact)

    def tunings(self, target: Target) -> Sequence[Mapping[str, Json]]:
        sets: list[dict[str, Json]] = [
            {"use_winograd_convolution": False},
            {"use_sgemm_convolution": False},
            {"use_packing_layout": False},
            {"lightmode": False},
        ]
        return [*({"num_threads": n} for n in range(target.threads - 1, 0, -1)), *sets]

    def values(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Mapping[str, np.ndarray]:
        from featherweight.runtimes._ncnn_look import values

        return values(artifact, target, inputs, entry)

    def kernels(
        self, artifact: Artifact, target: Target, inputs: Sequence[np.ndarray], *, entry: str = "forward"
    ) -> Sequence[Kernel]:
        from featherweight.runtimes._ncnn_look import kernels

        return kernels(artifact, target, inputs, entry)

    def loaders(self, artifact: Artifact, target: Target, signature: Signature) -> Mapping[str, str]:
        from featherweight.runtimes._ncnn_loaders import loaders

        return loaders(artifact, target, signature)


PLUGIN = Ncnn
