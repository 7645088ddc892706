"""Which ordinary layer stands for which Keras layer: one small function each, in a table.

A layer that is not here, or a setting that a function refuses, raises ``Unmapped``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.exchange.keras_in.build import Call, Shape, Value, array, fill
from featherweight.exchange.keras_in.module import Affine, Attention, Einsum, Scale

Emitter = Callable[[Call], "Value | list[Value]"]

_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: Mapping[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_NORMS: Mapping[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


# ---- activations


def _softmax(value: Value, axis: int) -> Callable[[], nn.Module]:
    return lambda: nn.Softmax(dim=value.axis(axis))


_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_silu": nn.Hardswish,
    "hard_swish": nn.Hardswish,
    "mish": nn.Mish,
    "hard_tanh": nn.Hardtanh,
    "hard_shrink": nn.Hardshrink,
    "soft_shrink": nn.Softshrink,
    "tanh_shrink": nn.Tanhshrink,
    "log_sigmoid": nn.LogSigmoid,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}
_PLAIN_ACTIVATIONS = {"exponential": "exp", "squareplus": "squareplus"}


def activation_name(function: Any) -> str:
    """What Keras calls an activation function."""
    return "linear" if function is None else str(getattr(function, "__name__", type(function).__name__))


def activate(call: Call, value: Value, function: Any, *, own: bool = False) -> Value:
    """The value behind a layer's activation; ``own``: the activation is the layer itself."""
    name = activation_name(function)
    suffix = "" if own else f"_{name}"
    if name == "linear":
        return value
    if name in ("softmax", "log_softmax"):
        if value.rank == 1:
            raise call.refuse(f"has {name} over the batch")
        kind = nn.Softmax if name == "softmax" else nn.LogSoftmax
        return call.apply(lambda: kind(dim=value.axis(-1)), value, suffix)
    if name in _PLAIN_ACTIVATIONS:
        return call.function(_PLAIN_ACTIVATIONS[name], value)
    if name not in _ACTIVATIONS:
        raise call.refuse(f"has the activation '{name}'")
    return call.apply(_ACTIVATIONS[name], value, suffix)


def _activation(call: Call) -> Value:
    return activate(call, call.builder.floating(call.inputs[0]), call.layer.activation, own=True)


def _relu(call: Call) -> Value:
    layer, value = call.layer, call.builder.floating(call.inputs[0])
    ceiling, slope, threshold = layer.max_value, layer.negative_slope, layer.threshold
    ceiling = None if ceiling is None else float(ceiling)
    slope, threshold = float(slope or 0), float(threshold or 0)
    if threshold == 0 and ceiling is None:
        return call.apply(lambda: nn.LeakyReLU(slope) if slope else nn.ReLU(), value)
    if threshold == 0 and slope == 0 and ceiling is not None:
        return call.apply(lambda: nn.ReLU6() if ceiling == 6 else nn.Hardtanh(0.0, ceiling), value)
    return call.function("relu", value, slope=slope, threshold=threshold, ceiling=ceiling)


def _prelu(call: Call) -> Value:
    alpha = array(call.layer.alpha)
    if alpha.numel() not in (1, alpha.shape[-1]):
        raise call.refuse("has a slope for each position (no shared_axes)")
    value = call.moved()
    return call.apply(lambda: fill(nn.PReLU(alpha.numel()), weight=alpha.reshape(-1)), value)


def _softmax_layer(call: Call) -> Value:
    if call.the("mask") is not None or len(call.inputs) > 1:
        raise call.refuse("has a mask")
    axis, value = call.layer.axis, call.builder.floating(call.inputs[0])
    if not isinstance(axis, int):
        if len(axis) != 1:
            raise call.refuse("works over several axes")
        axis = axis[0]
    return call.apply(_softmax(value, axis), value)


# ---- products


def _linear(kernel: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(kernel.shape[0], kernel.shape[1], bias=bias is not None)
    fill(made, weight=kernel.T.contiguous(), bias=bias)
    return made


def _bias(layer: Any) -> Tensor | None:
    return array(layer.bias) if getattr(layer, "bias", None) is not None else None


def _dense(call: Call) -> Value:
    if call.layer.lora_enabled or getattr(call.layer, "quantization_mode", None):
        raise call.refuse("is quantized or has LoRA weights")
    value = call.plain()
    made = call.apply(lambda: _linear(array(call.layer.kernel), _bias(call.layer)), value)
    return activate(call, made, call.layer.activation)


def _einsum_dense(call: Call) -> Value:
    layer, value = call.layer, call.plain()
    kernel = array(layer.kernel)
    made = call.apply(lambda: Einsum(layer.equation, kernel, _bias(layer)), value)
    return activate(call, made, layer.activation)


def _embedding(call: Call) -> Value:
    layer, value = call.layer, call.inputs[0]
    if layer.mask_zero:
        raise call.refuse("makes a mask (mask_zero)")
    table = array(layer.embeddings)
    number = call.builder.function("long", (value.number,))
    return call.apply(
        lambda: fill(nn.Embedding(*table.shape), weight=table), replace(value, number=number, moved=False)
    )


# ---- convolutions


def _spatial(call: Call, value: Value) -> tuple[int | None, ...]:
    first = getattr(call.layer, "data_format", "channels_last") == "channels_first"
    return value.shape[2:] if first else value.shape[1:-1]


def _maps(call: Call) -> tuple[Value, bool]:
    """The input with its channels on axis 1, and whether Keras has them elsewhere."""
    if getattr(call.layer, "data_format", "channels_last") == "channels_first":
        return call.plain(), False
    return call.moved(), True


def _same_pads(size: int | None, kernel: int, stride: int, dilation: int) -> tuple[int, int] | None:
    """'same' padding of one axis, before and behind; None where the size must be known and is not."""
    wide = (kernel - 1) * dilation + 1
    if stride == 1:
        total = wide - 1
    elif size is None:
        return None
    else:
        total = max(0, ((size + stride - 1) // stride - 1) * stride + wide - size)
    return total // 2, total - total // 2


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return (int(value),) * rank if isinstance(value, int) else tuple(int(item) for item in value)


def _padded(
    call: Call, value: Value, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Value, tuple[int, ...]]:
    """The input of a convolution, padded as far as the layer itself cannot, and what it shall pad."""
    rank, padding = len(kernel), call.layer.padding
    none = (0,) * rank
    if padding == "valid":
        return value, none
    if padding == "causal":
        grown = call.builder.function("pad", (value.number,), pads=((kernel[0] - 1) * dilation[0], 0))
        return replace(value, number=grown), none
    sizes = _spatial(call, value)
    pads = [_same_pads(*item) for item in zip(sizes, kernel, stride, dilation, strict=True)]
    known = [pair for pair in pads if pair is not None]
    if len(known) < len(pads):
        settings = {"kernel": kernel, "stride": stride, "dilation": dilation, "mode": "constant"}
        return replace(value, number=call.builder.function("same", (value.number,), **settings)), none
    if all(left == right for left, right in known):
        return value, tuple(left for left, _ in known)
    flat = tuple(number for pair in reversed(known) for number in pair)
    return replace(value, number=call.builder.function("pad", (value.number,), pads=flat)), none


def _conv(call: Call) -> Value:
    layer = call.layer
    value, moved = _maps(call)
    kernel = array(layer.kernel)
    rank = kernel.dim() - 2
    weight = kernel.permute(rank + 1, rank, *range(rank)).contiguous()
    made = _convolve(call, value, weight, _bias(layer), groups=layer.groups)
    return activate(call, replace(made, moved=moved), layer.activation)


def _convolve(
    call: Call, value: Value, weight: Tensor, bias: Tensor | None, groups: int, suffix: str = ""
) -> Value:
    """A convolution with the layer's padding, strides and dilation."""
    layer, rank = call.layer, weight.dim() - 2
    stride, dilation = _tuple(layer.strides, rank), _tuple(layer.dilation_rate, rank)
    size = tuple(weight.shape[2:])
    value, padding = _padded(call, value, size, stride, dilation)

    def make() -> nn.Module:
        kind: Any = _CONVOLUTIONS[rank]
        made = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            size,
            stride,
            padding,
            dilation,
            groups,
            bias is not None,
        )
        return fill(made, weight=weight, bias=bias)

    return call.apply(make, value, suffix)


def _by_channel(kernel: Tensor) -> Tensor:
    """(..., channels, multiplier) -> (channels * multiplier, 1, ...)."""
    rank = kernel.dim() - 2
    turned = kernel.permute(rank, rank + 1, *range(rank))
    return turned.reshape(-1, 1, *turned.shape[2:]).contiguous()


def _depthwise(call: Call) -> Value:
    value, moved = _maps(call)
    kernel = array(call.layer.kernel)
    made = _convolve(call, value, _by_channel(kernel), _bias(call.layer), groups=kernel.shape[-2])
    return activate(call, replace(made, moved=moved), call.layer.activation)


def _separable(call: Call) -> Value:
    layer = call.layer
    value, moved = _maps(call)
    depthwise, pointwise = array(layer.depthwise_kernel), array(layer.pointwise_kernel)
    rank = depthwise.dim() - 2
    first = _convolve(call, value, _by_channel(depthwise), None, depthwise.shape[-2], ".depthwise")
    weight = pointwise.permute(rank + 1, rank, *range(rank)).contiguous()
    bias = _bias(layer)

    def make() -> nn.Module:
        kind: Any = _CONVOLUTIONS[rank]
        return fill(
            kind(weight.shape[1], weight.shape[0], 1, bias=bias is not None), weight=weight, bias=bias
        )

    made = call.apply(make, first, ".pointwise")
    return activate(call, replace(made, moved=moved), layer.activation)


def _conv_transpose(call: Call) -> Value:
    from keras.src.backend.common.backend_utils import compute_conv_transpose_output_crops_for_torch

    layer = call.layer
    value, moved = _maps(call)
    kernel = array(layer.kernel)
    rank = kernel.dim() - 2
    stride, dilation = _tuple(layer.strides, rank), _tuple(layer.dilation_rate, rank)
    crops = compute_conv_transpose_output_crops_for_torch(
        (1, *(8,) * rank, 1), tuple(kernel.shape), stride, layer.padding, layer.output_padding, dilation
    )
    weight = kernel.permute(rank + 1, rank, *range(rank)).contiguous()
    bias = _bias(layer)
    inside = all(
        0 <= left - right < max(s, d) and left >= 0
        for (left, right), s, d in zip(crops, stride, dilation, strict=True)
    )
    padding = tuple(left for left, _ in crops) if inside else (0,) * rank
    extra = tuple(left - right for left, right in crops) if inside else (0,) * rank

    def make() -> nn.Module:
        kind: Any = _TRANSPOSED[rank]
        made = kind(
            weight.shape[0], weight.shape[1], tuple(weight.shape[2:]), stride, padding, extra, 1,
            bias is not None, dilation,
        )  # fmt: skip
        return fill(made, weight=weight, bias=bias)

    made = call.apply(make, value)
    if not inside:
        made = call.function("crop", made, crops=tuple((int(a), int(b)) for a, b in crops), first=2)
    return activate(call, replace(made, moved=moved), layer.activation)


# ---- pooling, padding, sizes


def _pool(kind: str) -> Emitter:
    def emit(call: Call) -> Value:
        layer = call.layer
        value, moved = _maps(call)
        rank = value.rank - 2
        size = _tuple(layer.pool_size, rank)
        stride = size if layer.strides is None else _tuple(layer.strides, rank)
        ceil, padding = False, (0,) * rank
        if layer.padding == "same":
            pads = [
                _same_pads(n, k, s, 1) for n, k, s in zip(_spatial(call, value), size, stride, strict=True)
            ]
            known = [pair for pair in pads if pair is not None]
            if len(known) < len(pads):
                raise call.refuse("pads to 'same' where the size is open")
            if all(left == right for left, right in known):
                padding = tuple(left for left, _ in known)
            elif kind == "Max" and not any(left for left, _ in known):
                ceil = True  # the odd element is at the end, where a pool may look over the edge
            else:
                flat = tuple(n for pair in reversed(known) for n in pair)
                grown = call.builder.function("pad", (value.number,), pads=flat, mode="replicate")
                value = replace(value, number=grown)

        def make() -> nn.Module:
            pool: Any = getattr(nn, f"{kind}Pool{rank}d")
            if kind == "Max":
                return pool(size, stride, padding, ceil_mode=ceil)  # type: ignore[no-any-return]
            return pool(size, stride, padding, count_include_pad=False)  # type: ignore[no-any-return]

        return replace(call.apply(make, value), moved=moved)

    return emit


def _global_pool(kind: str) -> Emitter:
    def emit(call: Call) -> Value:
        value, moved = _maps(call)
        rank = value.rank - 2
        (number,) = call.builder.layer(
            call.path, lambda: getattr(nn, f"Adaptive{kind}Pool{rank}d")(1), (value.number,)
        )
        if not call.layer.keepdims:
            return call.result(call.builder.function("flatten", (number,)))
        return call.result(number, moved)

    return emit


def _zero_padding(call: Call) -> Value:
    value, moved = _maps(call)
    padding: Any = call.layer.padding
    pairs = [padding] if isinstance(padding[0], int) else list(padding)
    flat = tuple(int(n) for pair in reversed(pairs) for n in pair)
    return replace(call.function("pad", value, pads=flat), moved=moved)


def _cropping(call: Call) -> Value:
    value, moved = _maps(call)
    cropping: Any = call.layer.cropping
    pairs = [cropping] if isinstance(cropping[0], int) else list(cropping)
    crops = tuple((int(a), int(b)) for a, b in pairs)
    return replace(call.function("crop", value, crops=crops, first=2), moved=moved)


_RESIZE = {"nearest": "nearest", "bilinear": "bilinear"}


def _upsampling(call: Call) -> Value:
    value, moved = _maps(call)
    rank = value.rank - 2
    factors = tuple(float(n) for n in _tuple(call.layer.size, rank))
    mode = getattr(call.layer, "interpolation", "nearest")
    if mode not in _RESIZE:
        raise call.refuse(f"interpolates by '{mode}'")
    open_corners = None if mode == "nearest" else False
    made = call.apply(lambda: nn.Upsample(None, factors, mode, open_corners), value)
    return replace(made, moved=moved)


def _resizing(call: Call) -> Value:
    layer = call.layer
    if layer.crop_to_aspect_ratio or getattr(layer, "pad_to_aspect_ratio", False):
        raise call.refuse("keeps the aspect ratio")
    if layer.interpolation not in _RESIZE or getattr(layer, "antialias", False):
        raise call.refuse(f"interpolates by '{layer.interpolation}'")
    value, moved = _maps(call)
    made = call.function("resize", value, size=(layer.height, layer.width), mode=_RESIZE[layer.interpolation])
    return replace(made, moved=moved)


# ---- normalization


def _batch_norm(call: Call) -> Value:
    layer, rank = call.layer, call.inputs[0].rank
    axis = layer.axis % rank
    if axis == rank - 1:
        value = call.moved()
    elif axis == 1:
        value = call.plain()
    else:
        raise call.refuse(f"works on axis {layer.axis}")
    mean, variance = array(layer.moving_mean), array(layer.moving_variance)
    gamma = array(layer.gamma) if layer.scale else torch.ones_like(mean)
    beta = array(layer.beta) if layer.center else torch.zeros_like(mean)

    def make() -> nn.Module:
        kind: Any = _NORMS[rank]
        made = kind(len(mean), eps=layer.epsilon, momentum=1 - layer.momentum)
        return fill(made, weight=gamma, bias=beta, running_mean=mean, running_var=variance)

    return call.apply(make, value)


def _layer_norm(call: Call) -> Value:
    layer, value = call.layer, call.plain()
    axes = sorted(axis % value.rank for axis in ([layer.axis] if isinstance(layer.axis, int) else layer.axis))
    if axes != list(range(value.rank - len(axes), value.rank)):
        raise call.refuse(f"works on axes {layer.axis}")
    shape = [size for size in value.shape[axes[0] :] if size is not None]
    if len(shape) < len(axes) or getattr(layer, "rms_scaling", False):
        raise call.refuse("works on open axes, or scales by rms")
    gamma = array(layer.gamma) if layer.scale else None
    beta = array(layer.beta) if layer.center else None

    def make() -> nn.Module:
        made = nn.LayerNorm(shape, layer.epsilon, elementwise_affine=gamma is not None, bias=beta is not None)
        if gamma is None and beta is not None:
            made = nn.LayerNorm(shape, layer.epsilon)
        return fill(made, weight=gamma, bias=beta)

    return call.apply(make, value)


def _rms_norm(call: Call) -> Value:
    layer, value = call.layer, call.plain()
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if [axis % value.rank for axis in axes] != [value.rank - 1]:
        raise call.refuse(f"works on axis {layer.axis}")
    scale = array(layer.scale)
    return call.apply(lambda: fill(nn.RMSNorm(scale.shape[0], layer.epsilon), weight=scale), value)


def _group_norm(call: Call) -> Value:
    layer, rank = call.layer, call.inputs[0].rank
    axis = layer.axis % rank
    if axis not in (rank - 1, 1):
        raise call.refuse(f"works on axis {layer.axis}")
    value = call.moved() if axis == rank - 1 else call.plain()
    channels = call.inputs[0].shape[axis]
    if channels is None:
        raise call.refuse("works on an open axis")
    gamma = array(layer.gamma) if layer.scale else torch.ones(channels)
    beta = array(layer.beta) if layer.center else torch.zeros(channels)
    groups = channels if layer.groups == -1 else layer.groups

    def make() -> nn.Module:
        return fill(nn.GroupNorm(groups, channels, layer.epsilon), weight=gamma, bias=beta)

    return call.apply(make, value)


def _rescaling(call: Call) -> Value:
    scale, offset = array(call.layer.scale), array(call.layer.offset)
    value = call.inputs[0] if scale.numel() == offset.numel() == 1 else call.builder.plain(call.inputs[0])
    return call.apply(lambda: Affine(scale, offset), value)


def _normalization(call: Call) -> Value:
    layer, value = call.layer, call.builder.plain(call.inputs[0])
    mean, deviation = array(layer.mean), array(layer.variance).sqrt().clamp(min=1e-7)
    if layer.invert:
        return call.apply(lambda: Affine(deviation, mean), value)
    return call.apply(lambda: Affine(1 / deviation, -mean / deviation), value)


def _unit_normalization(call: Call) -> Value:
    axis, value = call.layer.axis, call.plain()
    axes = [axis] if isinstance(axis, int) else list(axis)
    if len(axes) != 1:
        raise call.refuse("works over several axes")
    return call.function("normalize", value, axis=value.axis(axes[0]))


# ---- attention


def _attention(call: Call) -> Value:
    layer = call.layer
    masks = [name for name in ("query_mask", "value_mask", "key_mask") if call.the(name) is not None]
    if masks or layer._attention_axes not in (None, (1,), [1]) or call.the("return_attention_scores"):
        raise call.refuse("has masks of its inputs, other axes, or returns its scores")
    given = dict(
        zip(
            ("query", "value", "key", "query_mask", "value_mask", "key_mask", "mask"), call.args, strict=False
        )
    )
    given |= call.kwargs or {}
    query: Value = given["query"]
    value: Value = given["value"]
    key: Value = value if given.get("key") is None else given["key"]
    if len(query.shape) != 3:
        raise call.refuse("takes more than one axis of positions")
    mask = given.get("attention_mask", given.get("mask"))
    causal = bool(given.get("use_causal_mask", False))
    if causal and mask is not None:
        raise call.refuse("has a causal mask and another one")
    heads = layer.num_heads

    def into(dense: Any) -> nn.Linear:
        kernel = array(dense.kernel)
        bias = None if dense.bias is None else array(dense.bias).reshape(-1)
        return _linear(kernel.reshape(kernel.shape[0], -1), bias)

    def make() -> nn.Module:
        out = array(layer._output_dense.kernel)
        bias = None if layer._output_dense.bias is None else array(layer._output_dense.bias)
        made = Attention(
            into(layer._query_dense), into(layer._key_dense), into(layer._value_dense),
            _linear(out.reshape(-1, out.shape[-1]), bias), heads,
        )  # fmt: skip
        made.causal = causal
        return made

    build = call.builder
    values = [build.plain(build.floating(item)) for item in (query, value, key)]
    numbers = [item.number for item in values] + ([mask.number] if mask is not None else [])
    (number,) = build.layer(call.path, make, numbers)
    return call.result(number)


# ---- joining and shaping


def together(call: Call, values: list[Value]) -> list[Value]:
    """Values in one order of axes: with channels moved where all are maps of one rank and one is moved."""
    values = [call.builder.floating(value) for value in values]
    ranks = {value.rank for value in values}
    if any(value.moved for value in values) and len(ranks) == 1:
        return [call.builder.moved(value) for value in values]
    return [call.builder.plain(value) for value in values]


def _merge(op: str) -> Emitter:
    def emit(call: Call) -> Value:
        values = together(call, list(call.inputs))
        ranks = {value.rank for value in values}
        if len(ranks) > 1:
            raise call.refuse("joins values of different ranks")
        return call.function(op, *values) if op == "average" else call.function("merge", *values, op=op)

    return emit


def _concatenate(call: Call) -> Value:
    values = together(call, list(call.inputs))
    return call.function("concatenate", *values, axis=values[0].axis(call.layer.axis))


def _dot(call: Call) -> Value:
    axes = call.layer.axes
    pair = (axes, axes) if isinstance(axes, int) else tuple(axes)
    values = [call.builder.plain(call.builder.floating(value)) for value in call.inputs]
    turned = tuple(axis % value.rank for axis, value in zip(pair, values, strict=True))
    if values[0].rank != values[1].rank:
        raise call.refuse("joins values of different ranks")
    return call.function("dot", *values, axes=turned, normalize=bool(call.layer.normalize))


def _flatten(call: Call) -> Value:
    value = call.builder.plain(call.inputs[0])
    if value.rank < 3:
        return value if value.rank == 2 else call.function("unsqueeze", value, axis=1)
    return replace(call.function("flatten", value), integer=value.integer)


def _reshape(call: Call) -> Value:
    value = call.builder.plain(call.inputs[0])
    *ones, channels = call.layer.target_shape
    if value.rank == 2 and ones and all(size == 1 for size in ones):  # a map of one place, as gates have
        made = call.function("reshape", value, shape=(int(channels), *(1 for _ in ones)))
        return replace(made, moved=True, integer=value.integer)
    made = call.function("reshape", value, shape=tuple(int(n) for n in call.layer.target_shape))
    return replace(made, integer=value.integer)


def _layer_scale(call: Call) -> Value:
    gamma = array(call.layer.gamma)
    value = call.inputs[0]
    shape = (-1, *(1,) * (value.rank - 2)) if value.moved else (-1,)
    return call.apply(lambda: Scale(gamma.reshape(shape)), value)


def _scaled_sum(call: Call) -> Value:
    one, other = together(call, list(call.inputs))
    scaled = call.function("binary", other, op="multiply", other=float(call.layer.scale))
    return call.function("merge", one, scaled, op="add")


def _permute(call: Call) -> Value:
    value = call.builder.plain(call.inputs[0])
    return replace(call.function("permute", value, dims=(0, *call.layer.dims)), integer=value.integer)


def _repeat_vector(call: Call) -> Value:
    return call.function("repeat", call.plain(), count=int(call.layer.n))


def _same_value(call: Call) -> Value:
    return call.inputs[0]


def _dropout(call: Call) -> Value:
    value = call.inputs[0]
    return call.apply(lambda: nn.Dropout(float(getattr(call.layer, "rate", 0.0))), value)


def _time_distributed(call: Call) -> Value:
    from featherweight.exchange.keras_in.walk import emit_layer

    value, inner = call.plain(), call.layer.layer
    shape: Shape = (None, *value.shape[2:])
    folded = Value(call.builder.function("fold_time", (value.number,)), shape)
    (made,) = emit_layer(call.builder, inner, f"{call.path}", (folded,))
    made = call.builder.plain(made)
    number = call.builder.function("unfold_time", (made.number, value.number))
    return call.result(number)


_IDENTITIES = (
    "StochasticDepth",
    *("Identity", "ActivityRegularization", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    *(
        "RandomBrightness",
        "RandomContrast",
        "RandomFlip",
        "RandomRotation",
        "RandomTranslation",
        "RandomZoom",
    ),
    *(
        "RandomColorDegeneration",
        "RandomColorJitter",
        "RandomElasticTransform",
        "RandomErasing",
        "RandomGrayscale",
    ),
    *("RandomHue", "RandomSaturation", "RandomShear", "RandomSharpness", "RandomInvert", "RandomPerspective"),
    *("RandomGaussianBlur", "RandomPosterization"),
)


def _ranked(name: str, emitter: Emitter, ranks: str = "123") -> dict[str, Emitter]:
    return {name.replace("#", rank): emitter for rank in ranks}


LAYERS: Mapping[str, Emitter] = {
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU": lambda c: c.apply(
        lambda: nn.LeakyReLU(float(c.layer.negative_slope)), c.builder.floating(c.inputs[0])
    ),
    "ELU": lambda c: c.apply(lambda: nn.ELU(float(c.layer.alpha)), c.builder.floating(c.inputs[0])),
    "PReLU": _prelu,
    "Softmax": _softmax_layer,
    "Dense": _dense,
    "EinsumDense": _einsum_dense,
    "Embedding": _embedding,
    **_ranked("Conv#D", _conv),
    **_ranked("Conv#DTranspose", _conv_transpose),
    **_ranked("DepthwiseConv#D", _depthwise, "12"),
    **_ranked("SeparableConv#D", _separable, "12"),
    **_ranked("MaxPooling#D", _pool("Max")),
    **_ranked("AveragePooling#D", _pool("Avg")),
    **_ranked("GlobalAveragePooling#D", _global_pool("Avg")),
    **_ranked("GlobalMaxPooling#D", _global_pool("Max")),
    **_ranked("ZeroPadding#D", _zero_padding),
    **_ranked("Cropping#D", _cropping),
    **_ranked("UpSampling#D", _upsampling),
    "Resizing": _resizing,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm,
    "UnitNormalization": _unit_normalization,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "MultiHeadAttention": _attention,
    "Add": _merge("add"),
    "Subtract": _merge("subtract"),
    "Multiply": _merge("multiply"),
    "Maximum": _merge("maximum"),
    "Minimum": _merge("minimum"),
    "Average": _merge("average"),
    "Concatenate": _concatenate,
    "Dot": _dot,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Permute": _permute,
    "RepeatVector": _repeat_vector,
    "Dropout": _dropout,
    **_ranked("SpatialDropout#D", _dropout),
    "TimeDistributed": _time_distributed,
    "LayerScale": _layer_scale,  # of ConvNeXt in keras.applications
    "CustomScaleLayer": _scaled_sum,  # of Inception-ResNet there
    **dict.fromkeys(_IDENTITIES, _same_value),
}
