"""The symbols of one run of the range coder, and the planes that are put together from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from featherweight_loader.errors import DamagedBundle
from featherweight_loader.head import Table
from featherweight_loader.pieces import Coding, Map

_CHUNK = 1 << 16  # symbols at once: the coder hands out four bytes for each
_MODELS = 64  # kept, of those used last
_BYTE = np.arange(256)
FREQUENCIES = np.where(_BYTE < 32, _BYTE, (16 + _BYTE % 16) * 2.0 ** (_BYTE // 16 - 1)).astype(np.float64)


class Coder:
    """Takes symbols from the words of a section, in their order."""

    def __init__(self, words: bytes, tables: Sequence[Table], where: str) -> None:
        import constriction

        native = np.asarray(np.frombuffer(words, "<u4"), np.uint32)
        self._decoder = constriction.stream.queue.RangeDecoder(native)
        self._categorical = constriction.stream.model.Categorical
        self._tables = tables
        self._models: dict[int, Any] = {}
        self._where = where

    def plane(self, coding: Coding, n: int, limit: int, *, wraps: bool) -> np.ndarray:
        """The next plane: ``n`` values below ``limit``, modulo it where the plane ``wraps``."""
        out = np.empty(n, np.uint8 if limit <= 256 else np.uint16)
        if coding.split is None:
            self._contexts(out, coding, limit, wraps)
            return out
        flags = np.empty(n, np.uint8)
        self._contexts(flags, coding, 2, False)
        common, table = coding.split
        others = np.empty(np.count_nonzero(flags), out.dtype)
        self._fill(others, table, limit, wraps)
        out[:] = common
        out[flags.view(np.bool_)] = others
        return out

    def end(self) -> None:
        """Refuse words that nothing was coded with.

        Raises:
            DamagedBundle: There are some.
        """
        if not self._decoder.maybe_exhausted():
            raise DamagedBundle("codes go on behind their end", where=self._where)

    def _contexts(self, out: np.ndarray, coding: Coding, limit: int, wraps: bool) -> None:
        classes = [self._classes(one) for one in coding.maps]
        if len(coding.tables) == 1 or not out.size:
            self._fill(out, coding.tables[0], limit, wraps)
            return
        run, contexts = _cells(out.size, coding.maps, classes)
        counts = np.zeros(len(coding.tables), np.int64)
        for start in range(0, len(contexts), _CHUNK):
            counts += np.bincount(contexts[start : start + _CHUNK], minlength=len(counts))
        ends = np.cumsum(counts)
        sorted_rows = np.empty((len(contexts), run), out.dtype)
        for table, begin, end in zip(coding.tables, ends - counts, ends, strict=True):
            self._fill(sorted_rows[begin:end].reshape(-1), table, limit, wraps)
        _scatter(sorted_rows, contexts, ends - counts, out.reshape(-1, run))

    def _classes(self, one: Map | None) -> np.ndarray | None:
        if one is None:
            return None
        classes = np.empty(one.count, np.uint8)
        self._fill(classes, one.table, one.classes, False)
        return classes

    def _fill(self, out: np.ndarray, table: int, limit: int, wraps: bool) -> None:
        """The next ``out.size`` symbols by one table."""
        told = self._tables[table]
        lo = told.lo % limit if wraps else told.lo
        if not out.size:
            return
        if not wraps and lo >= limit:
            raise self._too_large(lo, limit)
        if len(told.frequencies) == 1:
            out[:] = lo
            return
        model = self._model(table)
        checked = not wraps and lo + len(told.frequencies) > limit
        for start in range(0, out.size, _CHUNK):
            part = out[start : start + _CHUNK]
            symbols = self._symbols(model, part.size)
            if lo:
                symbols += lo
            if checked and symbols.max() >= limit:
                raise self._too_large(int(symbols.max()), limit)
            if wraps and limit < 256:
                symbols &= limit - 1
            part[:] = symbols

    def _symbols(self, model: Any, count: int) -> np.ndarray:
        try:
            symbols: np.ndarray = self._decoder.decode(model, count)
        except AssertionError as error:  # what constriction raises of words that no encoder writes
            raise DamagedBundle("codes are damaged", where=self._where, fix="fetch the file again") from error
        return symbols

    def _model(self, table: int) -> Any:
        model = self._models.pop(table, None)
        if model is None:
            frequencies = FREQUENCIES[np.frombuffer(self._tables[table].frequencies, np.uint8)]
            model = self._categorical(frequencies, perfect=False)
        if len(self._models) >= _MODELS:
            del self._models[next(iter(self._models))]
        self._models[table] = model
        return model

    def _too_large(self, value: int, limit: int) -> DamagedBundle:
        return DamagedBundle(f"a symbol of {value} is not below {limit}", where=self._where)


def _cells(
    n: int, maps: Sequence[Map | None], classes: Sequence[np.ndarray | None]
) -> tuple[int, np.ndarray]:
    """How many neighbours always share a context, and the context of each such run."""
    run = math.gcd(n, *(one.inner for one in maps if one))
    contexts = np.zeros(n // run, np.uint8)
    for one, found in zip(maps, classes, strict=True):
        if one is None or found is None:
            continue
        contexts *= np.uint8(one.classes)
        contexts += np.resize(np.repeat(found, min(one.inner // run, len(contexts))), len(contexts))
    return run, contexts


def _scatter(rows: np.ndarray, contexts: np.ndarray, begins: np.ndarray, out: np.ndarray) -> None:
    """Rows that lie context by context, back to where they belong."""
    begins = begins.copy()
    for start in range(0, len(contexts), _CHUNK):
        part = contexts[start : start + _CHUNK]
        counts = np.bincount(part, minlength=len(begins))
        taken = [rows[begin : begin + count] for begin, count in zip(begins, counts, strict=True) if count]
        out[start : start + len(part)][np.argsort(part, kind="stable")] = np.concatenate(taken)
        begins += counts
