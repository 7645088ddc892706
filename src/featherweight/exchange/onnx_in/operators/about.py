"""What an operator becomes, and what of it is not read: the text of docs/onnx.md, kept beside the table."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from featherweight.exchange.onnx_in.operators import OPERATORS, families
from featherweight.exchange.onnx_in.read import OLDEST_OPSET

_MICROSOFT = "com.microsoft"

# Operator -> the layer that it becomes where its weights are constants; all others become functions.
LAYERS: Mapping[tuple[str, str], str] = {
    ("", "Relu"): "nn.ReLU",
    ("", "LeakyRelu"): "nn.LeakyReLU",
    ("", "PRelu"): "nn.PReLU, one slope or one per channel",
    ("", "Elu"): "nn.ELU",
    ("", "Celu"): "nn.CELU",
    ("", "ThresholdedRelu"): "nn.Threshold",
    ("", "Clip"): "nn.ReLU, nn.ReLU6, nn.Hardtanh",
    ("", "Sigmoid"): "nn.Sigmoid",
    ("", "HardSigmoid"): "nn.Hardsigmoid for a slope of 1/6",
    ("", "HardSwish"): "nn.Hardswish",
    ("", "Swish"): "nn.SiLU for alpha 1",
    ("", "Mish"): "nn.Mish",
    ("", "Tanh"): "nn.Tanh",
    ("", "Softplus"): "nn.Softplus",
    ("", "Softsign"): "nn.Softsign",
    ("", "Gelu"): "nn.GELU",
    ("", "Shrink"): "nn.Softshrink, nn.Hardshrink",
    ("", "Softmax"): "nn.Softmax",
    ("", "LogSoftmax"): "nn.LogSoftmax",
    ("", "Conv"): "nn.Conv1d, nn.Conv2d, nn.Conv3d",
    ("", "ConvTranspose"): "nn.ConvTranspose1d, 2d, 3d",
    ("", "Gather"): "nn.Embedding for rows of a constant table",
    ("", "MatMul"): "nn.Linear, the Add behind it as bias",
    ("", "Gemm"): "nn.Linear",
    ("", "BatchNormalization"): "nn.BatchNorm1d, 2d, 3d",
    ("", "InstanceNormalization"): "nn.InstanceNorm1d, 2d, 3d",
    ("", "GroupNormalization"): "nn.GroupNorm",
    ("", "LayerNormalization"): "nn.LayerNorm",
    ("", "RMSNormalization"): "nn.RMSNorm",
    ("", "SimplifiedLayerNormalization"): "nn.RMSNorm",
    ("", "LRN"): "nn.LocalResponseNorm",
    ("", "Dropout"): "nn.Dropout",
    ("", "MaxPool"): "nn.MaxPool1d, 2d, 3d",
    ("", "AveragePool"): "nn.AvgPool1d, 2d, 3d",
    ("", "GlobalAveragePool"): "nn.AdaptiveAvgPool1d, 2d, 3d",
    ("", "LSTM"): "nn.LSTM",
    ("", "GRU"): "nn.GRU for linear_before_reset 1",
    ("", "RNN"): "nn.RNN",
    (_MICROSOFT, "Gelu"): "nn.GELU",
    (_MICROSOFT, "FastGelu"): "nn.GELU without a bias",
    (_MICROSOFT, "FusedConv"): "nn.Conv1d, 2d, 3d",
    (_MICROSOFT, "FusedGemm"): "nn.Linear",
    (_MICROSOFT, "FusedMatMul"): "nn.Linear",
    (_MICROSOFT, "SimplifiedLayerNormalization"): "nn.RMSNorm",
    (_MICROSOFT, "SkipLayerNormalization"): "nn.LayerNorm",
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): "nn.RMSNorm",
    (_MICROSOFT, "EmbedLayerNormalization"): "nn.Embedding, nn.LayerNorm",
    (_MICROSOFT, "MatMulNBits"): "nn.Linear, dequantized",
    (_MICROSOFT, "Attention"): "nn.Linear for the three projections",
}

LIMITS: Mapping[tuple[str, str], str] = {
    ("", "BatchNormalization"): "no statistics per position (spatial 0)",
    ("", "BitCast"): "no types of less than a byte",
    ("", "Cast"): "no strings; int4, int2 and float4 are carried in wider types",
    ("", "CastLike"): "as Cast",
    ("", "Constant"): "no strings, no sparse tensors",
    ("", "ConvTranspose"): "no output_shape beyond one stride",
    ("", "Dropout"): "off: no random zeros in training mode",
    ("", "GRU"): "steps unrolled: linear_before_reset 0, clip, other activations, lengths",
    ("", "GridSample"): "five axes: not cubic",
    ("", "Identity"): "tensors only, no sequences or optional values",
    ("", "LSTM"): "steps unrolled: peepholes, input_forget, clip, other activations, lengths",
    ("", "MaxPool"): "indices only with pads of at most half the kernel",
    ("", "RoiAlign"): "a sampling_ratio of at least 1",
    ("", "RNN"): "steps unrolled: clip, other activations, lengths",
    ("", "Resize"): "align_corners counts whole output sizes, as ONNX Runtime does",
    ("", "TopK"): "uint64 from 2**63 on is not ordered",
    ("", "Upsample"): "opsets 7 to 9",
    ("", "Scatter"): "opsets 9 and 10",
    (_MICROSOFT, "Attention"): "no rotation, no shared buffer of its past",
    (_MICROSOFT, "FusedMatMul"): "no transposed batches",
    (_MICROSOFT, "GroupQueryAttention"): "a cache that grows by the new tokens; no bias, no positions",
    (_MICROSOFT, "MatMulNBits"): "2, 4 and 8 bits, no g_idx",
    (_MICROSOFT, "MultiHeadAttention"): "queries, keys and values apart",
    (_MICROSOFT, "RotaryEmbedding"): "no packed batches, no scale",
    (_MICROSOFT, "SkipLayerNormalization"): "its mean and deviation are not read",
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): "its deviation is not read",
}

# Written as ordinary operators before the graph is built; their integers become formats.
REWRITTEN: tuple[str, ...] = (
    *("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool"),
    *("QLinearAveragePool", "QLinearConcat", "QLinearSoftmax", "QGemm", "QAttention"),
    *("DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
)


def operator_table() -> str:
    """Markdown: one row an operator, by family."""
    lines = ["| operator | opsets | becomes | limits |", "|---|---|---|---|"]
    for domain, title, names in families():
        lines.append(f"| **{title}** | | | |")
        for name in sorted(names):
            key = (domain, name)
            limits = LIMITS.get(key, "")
            lines.append(f"| {name} | {_opsets(*key)} | {LAYERS.get(key, 'a function')} | {limits} |")
    lines.append("| **com.microsoft, integers: become ordinary operators with formats** | | | |")
    lines += [f"| {name} | 1 | float operators and formats | constant scales |" for name in sorted(REWRITTEN)]
    default = sum(not domain for domain, _ in OPERATORS)
    count = len(OPERATORS) - default + len(REWRITTEN)
    return "\n".join([f"{default} operators of the default domain, {count} of com.microsoft.", "", *lines])


def _opsets(domain: str, name: str) -> str:
    """The first and last opset in which an operator is read."""
    if domain:
        return "1"
    schemas = [
        item for item in onnx.defs.get_all_schemas_with_history() if (item.domain, item.name) == ("", name)
    ]
    if not schemas:
        return "of ONNX Runtime"
    first = max(min(item.since_version for item in schemas), OLDEST_OPSET)
    ended = [item.since_version for item in schemas if item.deprecated]
    last = min(ended) - 1 if ended else onnx.defs.onnx_opset_version()
    return f"{first} to {last}"
