"""The only thing that methods receive and return: a plain module and data beside it.

``Model = module + formats``. The module stays eager, float and trainable; how a
tensor will be stored is in ``formats``; what structure steps did is in ``edits``,
as data, so that the original module, the edits and a safetensors file rebuild it
without pickle.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.formats import TensorFormat
from featherweight.unrolled import unroll


@dataclass(frozen=True)
class Entry:
    """One way to call the module.

    Attributes:
        example_inputs: Flat tensors of one call; nested inputs are flattened by ``tree``.
        input_names: One per example input.
        output_names: One per flat output.
        dynamic_axes: Input name -> {axis: symbol}; the batch is usually ``{0: "batch"}``.
        method: The module's method to call.
        tree: How flat inputs become the call's positional arguments; None: as they are.
    """

    example_inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    method: str = "forward"
    tree: pytree.TreeSpec | None = None

    def arguments(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The positional arguments of a call with these flat inputs."""
        return inputs if self.tree is None else tuple(pytree.tree_unflatten(list(inputs), self.tree))


@dataclass(frozen=True)
class Remove:
    """The layer at ``path`` became ``nn.Identity``."""

    path: str


@dataclass(frozen=True)
class SetAttr:
    """An attribute of the layer at ``path`` was set to a JSON value, or to a new parameter.

    ``shape`` given: a float32 parameter of that shape, whose values are in the weights file.
    """

    path: str
    name: str
    value: Any = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Cut:
    """Indices of one axis of a parameter or buffer were removed; all names of a tied tensor lose them.

    Attributes:
        tensor: Its (first) name in the module.
        axis: Which axis.
        dropped: Sorted indices that went, of the axis as it was.
    """

    tensor: str
    axis: int
    dropped: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A layer of ``torch.nn`` (or ``Bypass``) as data.

    Attributes:
        kind: Class name in ``torch.nn``; one of ``LAYERS``.
        arguments: Of its constructor, by name; JSON data.
        layers: What a Sequential consists of.
    """

    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Layer, ...] = ()

    def build(self) -> nn.Module:
        """The layer with fresh weights.

        Raises:
            ValueError: No such layer may be built from data.
        """
        if self.kind not in LAYERS:
            raise ValueError(f"no layer '{self.kind}' is built from data")
        arguments = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.arguments.items()
        }
        kind: type[Any] = Bypass if self.kind == Bypass.__name__ else getattr(nn, self.kind)
        made: nn.Module = kind(*(layer.build() for layer in self.layers), **arguments)
        return made


LAYERS = frozenset(
    {"Sequential", "Identity", "Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d"}
    | {"ReLU", "ReLU6", "LeakyReLU", "Hardswish", "Hardsigmoid", "GELU", "SiLU", "Sigmoid", "Tanh"}
    | {
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "LayerNorm",
        "AvgPool2d",
        "MaxPool2d",
        "AdaptiveAvgPool2d",
        "Bypass",
    }
)


class Bypass(nn.Module):
    """What stays of a block with several arguments or results: it returns one of its arguments.

    Args:
        argument: Position or name of it.
        items: Length of the tuple that the block returned, whose other items are None; 0: no tuple.
    """

    def __init__(self, argument: int | str = 0, items: int = 0) -> None:
        super().__init__()
        self.argument, self.items = argument, items

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = kwargs[self.argument] if isinstance(self.argument, str) else args[self.argument]
        return (x, *[None] * (self.items - 1)) if self.items else x


@dataclass(frozen=True)
class Replace:
    """The layer at ``path`` became another one, whose values are in the weights file."""

    path: str
    layer: Layer


@dataclass(frozen=True)
class Unroll:
    """The module's code became data, since sizes are written into it; see ``unrolled.py``.

    Attributes:
        programs: Method -> the calls of its graph; JSON data.
        constants: Tensors that the programs read and that are no parameters: name -> [shape, dtype].
    """

    programs: Mapping[str, Any] = field(repr=False)
    constants: Mapping[str, Any] = field(default_factory=dict)


Edit = Remove | SetAttr | Cut | Replace | Unroll


def make_edit(module: nn.Module, edit: Edit) -> nn.Module:
    """Carry one edit out on a module, in place; ``Unroll`` makes another one of its layers and tensors.

    Returns:
        The module to go on with.
    """
    match edit:
        case Unroll(programs, constants):
            return unroll(module, programs, constants)
        case Remove(path):
            _put(module, path, nn.Identity().train(module.get_submodule(path).training))
        case Replace(path, layer):
            _put(module, path, layer.build().train(module.get_submodule(path).training))
        case Cut(tensor, axis, dropped):
            _cut(module, tensor, axis, dropped)
        case SetAttr(path, name, value, None):
            owner = module.get_submodule(path)
            held = getattr(owner, name, None)
            setattr(owner, name, tuple(value) if isinstance(held, tuple) else value)
        case SetAttr(path, name, _, tuple() as shape):
            module.get_submodule(path).register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def _cut(module: nn.Module, name: str, axis: int, dropped: tuple[int, ...]) -> None:
    owner, _, own = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), own)
    gone = set(dropped)
    keep = torch.tensor([index for index in range(tensor.shape[axis]) if index not in gone], dtype=torch.long)
    left = tensor.detach().index_select(axis, keep.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        left = nn.Parameter(left, requires_grad=tensor.requires_grad)
    for layer in module.modules():  # all names of a tied tensor
        for table in (layer._parameters, layer._buffers):
            for key, value in table.items():
                if value is tensor:
                    table[key] = left
        if isinstance(layer, nn.RNNBase):  # it keeps a list of its weights beside the table
            layer._flat_weights = [getattr(layer, key, None) for key in layer._flat_weights_names]


def encode_edit(edit: Edit) -> dict[str, Any]:
    """An edit as JSON data."""
    return {"kind": type(edit).__name__, **asdict(edit)}


def decode_edit(data: Mapping[str, Any]) -> Edit:
    """The edit that :func:`encode_edit` wrote.

    Raises:
        ValueError: There is no such edit.
    """
    values = {name: value for name, value in data.items() if name != "kind"}
    match data["kind"]:
        case "Remove":
            return Remove(**values)
        case "SetAttr":
            shape = values["shape"]
            return SetAttr(**{**values, "shape": None if shape is None else tuple(shape)})
        case "Cut":
            return Cut(values["tensor"], values["axis"], tuple(values["dropped"]))
        case "Replace":
            return Replace(values["path"], _layer(values["layer"]))
        case "Unroll":
            return Unroll(**values)
    raise ValueError(f"unknown edit '{data['kind']}'")


def _layer(data: Mapping[str, Any]) -> Layer:
    return Layer(data["kind"], data["arguments"], tuple(_layer(one) for one in data["layers"]))


@dataclass(frozen=True)
class Origin:
    """What a file says beside the model, which goes back into the file that is exported.

    Attributes:
        opset: Version of the default domain that the file is of; an export has at least this one.
        metadata: The file's own key-value pairs.
        notes: What was assumed when it was read, for the user.
    """

    opset: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A module, how it is called, how its tensors will be stored, and how it was made.

    Attributes:
        module: Plain, eager, float, trainable; never wrapped.
        entries: ``forward`` by default; encoder, decoder step, one per task.
        formats: By parameter name, or by name of a traced value; applied left to right.
        edits: What structure steps did, oldest first.
        key: Content hash of how the model was made; the store's address.
        traced: What was derived from the module already (see ``graph.trace``); goes with the module.
        origin: What the file said that it came from.
        structures: What was derived from modules of the same original, but for their values; all models that
            come from it share this.
    """

    module: nn.Module
    entries: Mapping[str, Entry]
    formats: Mapping[str, tuple[TensorFormat, ...]] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    key: str = ""
    traced: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    origin: Origin = field(default_factory=Origin, compare=False)
    structures: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def evolve(
        self,
        *,
        module: nn.Module | None = None,
        formats: Mapping[str, tuple[TensorFormat, ...]] | None = None,
        edits: tuple[Edit, ...] = (),
        key: str | None = None,
    ) -> Model:
        """A changed copy. ``edits`` are appended; nothing of this model changes.

        What changed is no longer what the key is of: without a new one the copy has none.
        """
        changed = module is not None or formats is not None or bool(edits)
        return replace(
            self,
            module=self.module if module is None else module,
            formats=self.formats if formats is None else dict(formats),
            edits=self.edits + edits,
            key=key if key is not None else "" if changed else self.key,
            traced=self.traced if module is None else {},
        )

    def copy_module(self) -> nn.Module:
        """A deep copy to edit."""
        return copy.deepcopy(self.module)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Parameters by their first name (a tied one appears once)."""
        return dict(self.module.named_parameters())

    def rebuild(self, edits: tuple[Edit, ...], tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module that these edits and tensors make of this (original) model."""
        module = self.copy_module()
        for edit in edits:
            module = make_edit(module, edit)
        module.load_state_dict(dict(tensors), strict=True)
        return module
