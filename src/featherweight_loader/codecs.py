"""Unpacks sections: stored, zstd, LZMA, or zstd behind a base; to the declared size, never more."""

from __future__ import annotations

import lzma

from featherweight_loader.errors import DamagedBundle, NewerBundle

STORED, ZSTD, LZMA, CODES, PREFIXED = range(5)

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SMALLEST_DICTIONARY = 4096
_LARGEST_DICTIONARY = 2**32 - 1  # what the decoder can be told
_PROPERTIES = 9 * 5 * 5


def unpacked(codec: int, packed: bytes, raw: int, *, prefix: bytes = b"", where: str = "") -> bytes:
    """What the bytes stand for.

    Args:
        codec: Any but :data:`CODES`, which stays as it is.
        packed: As they lie in the file.
        raw: How many they become; no more is ever allocated for them.
        prefix: Of :data:`PREFIXED`: the base's bytes.
        where: For the error.

    Raises:
        DamagedBundle: They are something else, or become more or fewer bytes.
        NewerBundle: There is no such codec.
    """
    if codec in (STORED, CODES):
        found = packed
    elif codec in (ZSTD, PREFIXED):
        found = _zstd(packed, raw, prefix if codec == PREFIXED else b"", where)
    elif codec == LZMA:
        found = _lzma(packed, raw, where)
    else:
        raise NewerBundle(f"the bundle is packed with codec {codec}", where=where, fix="update the loader")
    if len(found) != raw:
        raise DamagedBundle(f"{raw} bytes were declared, {len(found)} are there", where=where)
    return found


def _zstd(packed: bytes, raw: int, prefix: bytes, where: str) -> bytes:
    import zstandard

    if packed[:4] != _ZSTD_MAGIC:
        raise DamagedBundle("this is no zstd frame", where=where)
    try:
        told = zstandard.get_frame_parameters(packed)
        if told.content_size not in (raw, zstandard.CONTENTSIZE_UNKNOWN):
            raise DamagedBundle(
                f"{raw} bytes were declared, the zstd frame holds {told.content_size}", where=where
            )
        if not raw:  # the decoder takes no size of 0 as a bound
            return bytes(zstandard.ZstdDecompressor().stream_reader(packed).read(1))
        before = None
        if prefix:
            before = zstandard.ZstdCompressionDict(prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
        decoder = zstandard.ZstdDecompressor(dict_data=before)
        return decoder.decompress(packed, max_output_size=raw, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedBundle(f"a zstd frame is damaged: {error}", where=where) from error


def _lzma(packed: bytes, raw: int, where: str) -> bytes:
    if not packed or packed[0] >= _PROPERTIES:
        raise DamagedBundle("these are no properties of LZMA", where=where)
    rest, lc = divmod(packed[0], 9)
    pb, lp = divmod(rest, 5)
    if lc + lp > 4 or raw > _LARGEST_DICTIONARY:
        raise DamagedBundle("these are no properties of LZMA", where=where)
    if not raw:
        return b""
    dictionary = max(raw, _SMALLEST_DICTIONARY)
    told = {"id": lzma.FILTER_LZMA1, "dict_size": dictionary, "lc": lc, "lp": lp, "pb": pb}
    try:
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=[told])
        return decoder.decompress(packed[1:], max_length=raw)
    except (lzma.LZMAError, EOFError) as error:
        raise DamagedBundle(f"an LZMA stream is damaged: {error}", where=where) from error
