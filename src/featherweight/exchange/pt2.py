"""A ``.pt2`` file of ``torch.export.save`` -> ONNX, without letting the file run code.

``torch.export.load`` is not safe on its own (torch 2.13): it falls back from ``weights_only`` to plain
pickle, evaluates sizes with ``sympy.sympify``, resolves operators by ``getattr`` from ``torch``, and loads
compiled libraries. So the archive is read first as plain zip and JSON, and whatever could reach one of
these is refused.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import operator
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from featherweight.errors import LoadError
from featherweight.exchange.weights import load_safely

_FIX = (
    "export to ONNX where the model was made: torch.onnx.export(program, dynamo=True); "
    "--allow-pickle trusts this file"
)
_TARGET = re.compile(r"torch\.ops\.(aten|prims|higher_order|quantized_decomposed)\.[a-z_]\w*(\.\w+)?")
_PLAIN = re.compile(r"(_operator|math)\.[a-z]\w*|torch\.sym_[a-z]+")
_REFUSED = ("from_file", "attrgetter", "methodcaller", "itemgetter", "call")
_SYMBOL = re.compile(r"[a-z]+\d+")
_FUNCTION = re.compile(
    r"Symbol|Integer|Float|Rational|Add|Mul|Pow|(?:Python)?Mod|(?:Floor|Ceil|Clean)Div|ModularIndexing|Max|Min"
    r"|Where|Equality|Unequality|(?:Strict)?(?:Less|Greater)Than|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|floor|ceiling"
    r"|(?:Trunc|Round|Floor|Ceil)ToInt|ToFloat|(?:Int|Float)TrueDiv"
)
_NODES = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.keyword,
    ast.BinOp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.UnaryOp,
    ast.USub,
)
_LARGEST_POWER = 8
_LONGEST = 2000  # characters of a size; longer ones exist only to cost time


def pt2_to_onnx(path: Path, *, allow_pickle: bool = False) -> bytes:
    """The program of an archive as a serialized ONNX model.

    Raises:
        LoadError: No archive of ``torch.export.save``; one that could run code, unless ``allow_pickle``;
            or an operator that has no ONNX form.
    """
    if not allow_pickle:
        check_archive(path)
    try:
        with _quiet():
            program = torch.export.load(path)
    except Exception as error:  # torch raises many kinds on a malformed archive
        raise LoadError(
            f"'{path}' cannot be read as an exported program: {_first_line(error)}",
            fix="save it again with torch.export.save of torch 2.8 or newer",
        ) from error
    try:
        with _quiet():
            exported = torch.onnx.export(program, (), dynamo=True, verbose=False)
        if exported is None:
            raise LoadError(f"'{path}' has no ONNX form", fix="give path.py:callable with --weights")
        return bytes(exported.model_proto.SerializeToString())
    except Exception as error:  # the exporter raises whatever its translations raise
        raise LoadError(
            f"'{path}' has an operator without an ONNX form: {_first_line(error)}",
            fix="give path.py:callable with --weights",
        ) from error


def check_archive(path: Path) -> None:
    """Refuse an archive that could run code when torch loads it.

    Raises:
        LoadError: It could, or is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if sum(info.file_size for info in infos) > 2 * path.stat().st_size:
                raise LoadError(f"'{path}' unpacks to far more than its size", fix=_FIX)
            records = {info.filename.partition("/")[2]: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise LoadError(f"'{path}' is no .pt2 archive: {error}", fix=_FIX) from error
    if not any(name.startswith("models/") for name in records):
        raise LoadError(
            f"'{path}' holds no program of torch.export.save",
            fix="save it again with torch.export.save of torch 2.8 or newer",
        )
    for name, content in records.items():
        if name.startswith("data/aotinductor/"):
            raise LoadError(f"'{path}' holds compiled code ('{name}'), which was not loaded", fix=_FIX)
        if name.endswith(".json"):
            _inspect_json(content, path, name)
        elif name.startswith(("data/sample_inputs/", "data/weights/", "data/constants/")) and name.endswith(
            ".pt"
        ):
            _inspect_pickle(content, path, name)


def _inspect_pickle(content: bytes, path: Path, name: str) -> None:
    try:
        load_safely(io.BytesIO(content))
    except (pickle.UnpicklingError, ValueError) as error:  # torch would fall back to plain pickle
        kind = "of more than tensors" if isinstance(error, pickle.UnpicklingError) else "that is unreadable"
        raise LoadError(
            f"'{path}' holds a pickle {kind} ('{name}'); it was not loaded",
            fix=_FIX,
        ) from error


def _inspect_json(content: bytes, path: Path, name: str) -> None:
    try:
        document = json.loads(content)
        for key, value in _items(document):
            if key == "use_pickle" and value:
                raise LoadError(f"'{path}' holds a pickled tensor ('{name}'); it was not loaded", fix=_FIX)
            if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value)):
                raise LoadError(f"'{path}' holds an object that is no tensor ('{value}')", fix=_FIX)
            if key in ("target", "as_operator") and isinstance(value, str) and not _known(value):
                raise LoadError(f"'{path}' calls '{value[:80]}', which is no operator of torch", fix=_FIX)
            if key == "expr_str" and not _is_size(str(value)):
                raise LoadError(f"'{path}' holds a size that is no arithmetic: '{str(value)[:80]}'", fix=_FIX)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"'{path}' is malformed in '{name}': {_first_line(error)}", fix=_FIX) from error


def _items(document: Any) -> Iterator[tuple[str, Any]]:
    """All pairs of key and value in nested JSON."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield key, value
            yield from _items(value)
    elif isinstance(document, list):
        for value in document:
            yield from _items(value)


def _known(target: str) -> bool:
    """An operator of torch, or a pure function of ``operator`` or ``math``; others could do anything."""
    parts = target.split(".")
    if set(parts) & set(_REFUSED):
        return False
    if _PLAIN.fullmatch(target):
        return callable(getattr(operator, parts[1], None)) or parts[0] in ("math", "torch")
    if not _TARGET.fullmatch(target) or any(part.startswith("__") and "class" in part for part in parts):
        return False
    found: Any = torch
    for part in parts[1:]:
        found = getattr(found, part, None)
    return isinstance(found, (torch._ops.OperatorBase, torch._ops.OpOverloadPacket))


def _is_size(text: str) -> bool:
    """Arithmetic on symbols, as sympy prints it; torch gives this text to ``eval``."""
    if len(text) > _LONGEST:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_arithmetic(node) for node in ast.walk(tree))


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return bool(_FUNCTION.fullmatch(node.id) or _SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and bool(_FUNCTION.fullmatch(node.func.id))
        power = named and node.func.id == "Pow"  # type: ignore[attr-defined]
        return named and (not power or _is_small_power(node))
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) or bool(_SYMBOL.fullmatch(str(node.value)))
    return isinstance(node, _NODES)


def _is_small_power(node: ast.Call) -> bool:
    """A symbol to a small literal power: others take sympy for ever."""
    if len(node.args) != 2:
        return False
    base, exponent = (ast.unparse(item) for item in node.args)
    number = re.fullmatch(r"(?:Integer\()?(-?\d)\)?", exponent)
    return base.startswith("Symbol(") and number is not None and abs(int(number[1])) <= _LARGEST_POWER


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines that torch's exporter makes about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
