"""Turns an ONNX file into OpenVINO's IR, under names that can be found again; runs in the converter's child.

Part of ``openvino.py``. OpenVINO's reader folds what was half precision back into float32, cuts grouped
weights into matrices without a name, and counts unnamed nodes on from model to model; all three are set right
here, so that the file holds what was asked for and the same model is the same file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from featherweight.errors import TargetError
from featherweight.runtimes._openvino_session import silent

_PASSING = frozenset({"Convert", "Subtract", "Multiply", "Reshape", "Transpose"})
_WEIGHT_OF = {
    "Convolution": 1,
    "GroupConvolution": 1,
    "ConvolutionBackpropData": 1,
    "GroupConvolutionBackpropData": 1,
    "MatMul": 1,
    "Gather": 0,
}


def convert(
    source: str,
    target: str,
    weights: Mapping[str, tuple[str, str]],
    constants: Mapping[str, str],
    keep: Collection[str],
) -> list[str]:
    """Write ``target`` (and its ``.bin``) from an ONNX file.

    Args:
        source: The ONNX file.
        target: The IR's XML file.
        weights: Weight -> the tensor that holds it restored, and one that a layer makes with it.
        constants: Tensor that ends a layer -> the name of the constant that is added there.
        keep: Tensors whose names stay in the file.

    Returns:
        Those of ``keep`` that are still there.
    """
    silent()
    import openvino as ov

    model = ov.convert_model(source)
    tensors = {name: output for node in model.get_ops() for output in node.outputs() for name in output.names}
    for name, (restored, made) in weights.items():
        found = tensors.get(restored) or _read_by(tensors.get(made))
        if found is None or not _name_weight(found, name):
            raise TargetError(f"openvino's reader lost '{name}'", fix="exclude its layer under where")
    for tensor, name in constants.items():
        if tensor in tensors:
            _name_constant(tensors[tensor].get_node(), name)
    given = {name for value in (*model.inputs, *model.outputs) for name in value.names}
    for node in model.get_ops():
        for output in node.outputs():
            output.set_names(output.names & (given | set(keep)))
    _share_ranges(model)
    _number(model)
    for about in ("conversion_parameters", "Runtime_version"):
        if about in model.rt_info:
            del model.rt_info[about]
    ov.save_model(model, target, compress_to_fp16=False)
    _indent_less(Path(target))
    return sorted(set(keep) & set(tensors))


def _read_by(made: Any) -> Any:
    """The weight that the layer reads which makes a tensor, perhaps behind a sum with its bias."""
    node = None if made is None else made.get_node()
    while node is not None and node.get_type_name() == "Add":
        node = node.input_value(0).get_node()
    place = None if node is None else _WEIGHT_OF.get(node.get_type_name())
    return None if node is None or place is None else node.input_value(place)


def _name_weight(restored: Any, name: str) -> bool:
    """Name the constant behind a restored weight; one that was half precision becomes it again."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    node = restored.get_node()
    while node.get_type_name() in _PASSING:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return False
    if node.get_element_type() == ov.Type.f32:
        half = ops.constant(node.data.astype(np.float16), name=name)
        back = ops.convert(half, "f32")
        for user in list(node.output(0).get_target_inputs()):
            user.replace_source_output(back.output(0))
    node.set_friendly_name(name if node.get_element_type() != ov.Type.f32 else f"{name}.single")
    return True


def _name_constant(last: Any, name: str) -> None:
    for value in last.input_values():
        if value.get_node().get_type_name() == "Constant":
            value.get_node().set_friendly_name(name)


def _share_ranges(model: Any) -> None:
    """What is rounded has one range before and behind, and constants are most of a small file."""
    import numpy as np

    for node in model.get_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        for before, behind in ((1, 3), (2, 4)):
            one, two = (node.input_value(index).get_node() for index in (before, behind))
            if {one.get_type_name(), two.get_type_name()} == {"Constant"} and np.array_equal(
                one.data, two.data
            ):
                node.input(behind).replace_source_output(one.output(0))


def _indent_less(path: Path) -> None:
    """A fifth of the XML is tabs and line ends."""
    tree = ElementTree.parse(path)
    for element in tree.iter():
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _number(model: Any) -> None:
    """Names that hold a counter of the whole process are counted anew."""
    seen: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        name, _, count = node.get_friendly_name().rpartition("_")
        if count.isdigit() and name in {*_FOLDED, node.get_type_name()}:
            node.set_friendly_name(f"{name}.{seen[name]}")
            seen[name] += 1


_FOLDED = frozenset(
    {"Reshape", "Concat", "Range", "Transpose", "Unsqueeze", "Squeeze", "Convert", "Multiply"}
)
