"""Names of layers and tensors from those in an ONNX file: dotted paths that torch accepts.

Exporters leave the original paths in the names of weights (``layer1.0.conv1.weight``), of nodes
(``/layer1/layer1.0/conv1/Conv``) or in metadata; else the node's own name serves.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence

from onnx import NodeProto
from torch import nn

_WEIGHT = re.compile(r"(.+)[./](?:weight|bias|kernel|gamma|beta|scale|W|B)(?::0)?(?:_bias|_quantized)?$")
_SCOPES = "pkg.torch.onnx.name_scopes"
_DEEPEST, _LONGEST = 16, 200
_TAKEN = frozenset(dir(nn.Module())) | {"steps", "run", "fetch", "complete", "_steps", "_inputs", "_outputs"}


class Names:
    """Hands out paths that are unique and in nobody's way.

    Args:
        nodes: All nodes, so that a layer never takes the name of a scope.
    """

    def __init__(self, nodes: Iterable[NodeProto]) -> None:
        self._leaves: set[str] = set()  # layers and tensors
        self._scopes: set[str] = {""}
        for node in nodes:
            path = _node_path(node)
            self._scopes.update(".".join(path[:end]) for end in range(1, max(len(path) - 1, 0)))

    def layer(self, node: NodeProto, weights: Sequence[str] = ()) -> str:
        """A path for a node's layer, best after its weights."""
        choices = [parts for name in weights if (parts := _of_weight(name))]
        path = _node_path(node)
        if len(path) > 1 and (_scopes(node) or _says(path[-1], node.op_type)):
            choices.append(path[:-1])
        choices.append(path)
        for parts in choices:
            if self._is_free(joined := ".".join(parts)):
                return self._take(joined)
        return self._take(".".join(choices[0]), numbered=True)

    def tensor(self, name: str) -> str:
        """A path for a constant that belongs to no layer.

        It always has a dot: torch.onnx confuses a parameter 'val_3' with a value of that name that it makes.
        """
        parts = _clean([part for part in re.split(r"[./]", name) if part] or ["constant"])
        return self._take(".".join(parts if len(parts) > 1 else ["constants", *parts]), numbered=True)

    def _is_free(self, path: str) -> bool:
        parts = path.split(".")
        above = {".".join(parts[:end]) for end in range(1, len(parts))}
        return path not in self._leaves and path not in self._scopes and not above & self._leaves

    def _take(self, path: str, *, numbered: bool = False) -> str:
        if numbered and not self._is_free(path):
            above = path.rpartition(".")[0]
            if not all(
                self._is_scope(above.split("."), end) for end in range(1, above.count(".") + 2) if above
            ):
                path = path.replace(".", "_")
            number = 2
            wanted = path
            while not self._is_free(path):
                path, number = f"{wanted}_{number}", number + 1
        parts = path.split(".")
        self._leaves.add(path)
        self._scopes.update(".".join(parts[:end]) for end in range(1, len(parts)))
        return path

    def _is_scope(self, parts: list[str], end: int) -> bool:
        return ".".join(parts[:end]) not in self._leaves


def _says(part: str, op: str) -> bool:
    """Whether the last part of a node's name only repeats its operator: Conv, Conv_3, conv2d."""
    return re.sub(r"_\d+$", "", part).lower().replace("_", "")[:4] == op.lower()[:4]


def _of_weight(name: str) -> list[str]:
    found = _WEIGHT.fullmatch(name)
    return [] if found is None or "::" in name else _clean(re.split(r"[./]", found[1]))


def _scopes(node: NodeProto) -> list[str]:
    """['', 'layer1', 'layer1.conv1', 'conv2d']: the modules around a node, as torch.onnx records them."""
    text = next((item.value for item in node.metadata_props if item.key == _SCOPES), "")
    if not text or len(text) > _LONGEST * _DEEPEST:
        return []
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    valid = isinstance(names, list) and len(names) > 1 and all(isinstance(item, str) for item in names)
    return list(names) if valid else []


def _node_path(node: NodeProto) -> list[str]:
    """Parts of a node's path, the last one its own."""
    scopes = _scopes(node)
    if scopes:
        return _clean([*scopes[-2].split("."), scopes[-1]])
    name = node.name or next((item for item in node.output if item), "")
    if "/" not in name:
        return _clean([name.removeprefix("node_")]) if name else [node.op_type]
    parts: list[str] = []
    for part in name.split("/"):  # '/layer1/layer1.0/conv1/Conv': a part may repeat the one before
        before = ".".join(parts)
        parts += part.removeprefix(f"{before.rpartition('.')[2]}.").split(".") if before else part.split(".")
    return _clean(parts) or [node.op_type]


def _clean(parts: Sequence[str]) -> list[str]:
    """Identifiers, or numbers below the first; never an attribute that modules have."""
    cleaned = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in parts if part]
    if len(cleaned) > _DEEPEST or sum(map(len, cleaned)) > _LONGEST:
        cleaned = ["_".join(cleaned)[-_LONGEST:]]
    if cleaned and cleaned[0][0].isdigit():
        cleaned[0] = f"layer_{cleaned[0]}"  # runtimes want parameter names that are identifiers
    return [f"{part}_" if part in _TAKEN else part for part in cleaned]
