"""Bytes of a section: a run of the range coder, or what zstd and LZMA make of the rest."""

from __future__ import annotations

import lzma
from collections.abc import Iterable

import numpy as np
import zstandard
from numpy.typing import NDArray

from featherweight.bundles.tables import Array, Table
from featherweight_loader.codecs import LZMA, STORED, ZSTD

# Contexts of literals and positions for LZMA: text, plain bytes, and words of 2 and 4 bytes.
_PROPERTIES = ((3, 0, 2), (4, 0, 0), (0, 0, 0), (0, 2, 2), (1, 1, 1))
_HARD = 0.98  # bytes of which zstd leaves this share are not worth every try
_SAMPLE = 1 << 16  # bytes of each of four parts on which settings are tried
_FEW = 4 << 20  # bytes up to which all settings are tried, and the slowest of each


def coded(runs: Iterable[tuple[Table, Array]], modulus: Iterable[int]) -> bytes:
    """One run of the range coder over all symbols, in order.

    Args:
        runs: Symbols with the table of each array of them.
        modulus: For each array the number of symbols where they are of a ring, else 0.
    """
    import constriction

    encoder = constriction.stream.queue.RangeEncoder()
    for (table, symbols), ring in zip(runs, modulus, strict=True):
        if len(table.codes) == 1 or not len(symbols):
            continue
        index = symbols.astype(np.int32) - np.int32(table.lo)
        if ring:
            index %= ring
        model = constriction.stream.model.Categorical(table.frequencies, perfect=False)
        encoder.encode(index, model)
    words: NDArray[np.uint32] = encoder.get_compressed()
    return words.astype("<u4").tobytes()


def packed(data: bytes) -> tuple[int, bytes]:
    """The codec and the bytes of the smallest of raw, zstd and LZMA."""
    if not data:
        return STORED, data
    quick = len(zstandard.ZstdCompressor(level=3).compress(data))
    if len(data) > 1 << 14 and quick > _HARD * len(data):
        made = [
            (LZMA, _lzma(data, _PROPERTIES[2], 1)),
            (ZSTD, zstandard.ZstdCompressor(level=9).compress(data)),
        ]
    else:
        much = len(data) > _FEW
        best = _PROPERTIES[0] if much else _suited(data)
        made = [
            (LZMA, _lzma(data, best, 6 if much else 9 | lzma.PRESET_EXTREME)),
            (ZSTD, zstandard.ZstdCompressor(level=9 if much else 19).compress(data)),
        ]
    return min([(STORED, data), *made], key=lambda one: len(one[1]))


def _suited(data: bytes) -> tuple[int, int, int]:
    """The settings that suit a part of the data, for they suit the rest too."""
    size = len(data)
    if size > 4 * _SAMPLE:
        data = b"".join(data[at : at + _SAMPLE] for at in range(0, size, size // 4 // 4 * 4))
    return min(_PROPERTIES, key=lambda one: len(_lzma(data, one, 6)))


def _lzma(data: bytes, properties: tuple[int, int, int], preset: int) -> bytes:
    lc, lp, pb = properties
    told = {"id": lzma.FILTER_LZMA1, "preset": preset, "lc": lc, "lp": lp, "pb": pb}
    filters = [{**told, "dict_size": max(4096, len(data))}]
    stream = lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)
    return bytes([(pb * 5 + lp) * 9 + lc]) + _ended(stream, filters, len(data))


def _ended(stream: bytes, filters: list[dict[str, int]], size: int) -> bytes:
    """The stream without its end marker, which a reader does not need.

    One byte more stays than liblzma asks for, since a decoder may read a byte ahead.
    """
    for cut in range(10, 0, -1):
        if len(stream) <= cut + 5:
            continue
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=filters)
        if size > 1 << 16 and cut not in (4, 5):  # decoding again costs time, a byte more does not
            continue
        if len(decoder.decompress(stream[: len(stream) - cut], max_length=size)) == size:
            return stream[: len(stream) - cut + 1]
    return stream


def prefixed(data: bytes, prefix: bytes) -> bytes:
    """One zstd frame that refers to the files of a base."""
    log = min(27, max(10, (len(data) + len(prefix)).bit_length()))
    settings = zstandard.ZstdCompressionParameters.from_level(
        19, window_log=log, source_size=len(data), dict_size=len(prefix), enable_ldm=len(prefix) > 1 << 20
    )
    words = zstandard.ZstdCompressionDict(prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(dict_data=words, compression_params=settings).compress(data)
