"""Each feature of the format alone, in bundles written by hand from docs/fw-format.md."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
import zstandard

import featherweight_loader as loader
import handmade
from featherweight_loader import DamagedBundle, MissingBase
from handmade import ARTIFACT, LZMA, PREFIXED, RAW, STORED, ZSTD, Bundle, Codes, Map, normal, piece

NOTES = b"what is no array " * 20


def decoded(
    data: bytes, *told: bytes, bundle: Bundle, codes: Codes | None = None, raw: bytes = b"", base: bytes = b""
) -> bytes:
    """What the loader makes of a file of pieces one behind the other, whose digest it must have."""
    section = bundle.section(raw) if raw else 0
    words = codes.section() if codes else 0
    bundle.file("m.bin", data, raw=section, codes=words, pieces=[(0, one) for one in told])
    return loader.read(bundle.bytes(), base=base or None).data("m.bin")


class TestCodecs:
    @pytest.mark.parametrize("codec", [STORED, ZSTD, LZMA])
    @pytest.mark.parametrize("data", [b"", b"x", NOTES, bytes(normal(5000))])
    def test_sections(self, codec: int, data: bytes) -> None:
        bundle = Bundle()
        bundle.plain("a.bin", data, codec=codec)
        assert loader.read(bundle.bytes()).data("a.bin") == data

    @pytest.mark.parametrize("codec", [STORED, ZSTD, LZMA])
    def test_heads(self, codec: int) -> None:
        bundle = Bundle()
        bundle.plain("a.bin", NOTES)
        found = loader.read(bundle.bytes(codec))
        assert found.data("a.bin") == NOTES
        assert found.bytes == len(bundle.bytes(codec))

    def test_a_zstd_frame_that_does_not_tell_its_size(self) -> None:
        out = io.BytesIO()
        with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as stream:
            stream.write(NOTES)
        assert zstandard.frame_content_size(out.getvalue()) == -1
        bundle = Bundle()
        bundle.sections.append((ZSTD, out.getvalue(), len(NOTES)))
        bundle.file("a.bin", NOTES, rest=1)
        assert loader.read(bundle.bytes()).data("a.bin") == NOTES

    def test_behind_the_artifact_files_of_the_base(self) -> None:
        first, second = bytes(normal(3000, 1)), bytes(normal(3000, 2))
        base = Bundle()
        base.plain("one.bin", first)
        base.plain("notes.md", NOTES, handmade.DOCUMENT)
        base.plain("two.bin", second)
        old = base.bytes()
        bundle = Bundle(base=bytes.fromhex(loader.read(old).identity))
        bundle.file("one.bin", second + first, rest=bundle.section(second + first, PREFIXED, first + second))
        new = bundle.bytes()
        assert len(bundle.sections[0][1]) < 100
        assert loader.read(new, base=old).data("one.bin") == second + first
        with pytest.raises(MissingBase, match="update"):
            loader.read(new).data("one.bin")


class TestPlanes:
    @pytest.mark.parametrize("lo", [None, 0, 128, 255, 2**63 - 1])
    def test_bytes_wrap_around(self, lo: int | None) -> None:
        bundle, data = Bundle(), normal(1000)
        codes = Codes(bundle)
        told = codes.plane(data.view(np.uint8), modulus=256, lo=lo)
        assert decoded(data.tobytes(), piece(1000, 8, told), bundle=bundle, codes=codes) == data.tobytes()

    @pytest.mark.parametrize("bits", [1, 2, 4])
    @pytest.mark.parametrize("common", [None, 0])
    def test_less_than_a_byte(self, bits: int, common: int | None) -> None:
        bundle, values = Bundle(), np.random.default_rng(0).integers(0, 1 << bits, 240)
        codes = Codes(bundle)
        told = piece(240, bits, codes.plane(values, modulus=1 << bits, common=common, lo=(1 << bits) + 1))
        data = bytes(
            sum(int(values[i + j]) << j * bits for j in range(8 // bits)) for i in range(0, 240, 8 // bits)
        )
        assert decoded(data, told, bundle=bundle, codes=codes) == data

    @pytest.mark.parametrize("bits", [16, 32])
    @pytest.mark.parametrize("rotated", [False, True])
    @pytest.mark.parametrize("stored", [0, 1])
    def test_a_plane_for_each_byte(self, bits: int, rotated: bool, stored: int) -> None:
        """Some planes are stored, the others coded; a float's sign may go to the lowest bit."""
        bundle = Bundle()
        values = np.random.default_rng(0).normal(0, 1, 500).astype(f"<f{bits // 8}")
        words = [int(word) for word in values.view(f"<u{bits // 8}")]
        if rotated:
            words = [word << 1 & (1 << bits) - 1 | word >> bits - 1 for word in words]
        codes, told, raw = Codes(bundle), [], b""
        for place in range(bits // 8):
            plane = [word >> 8 * place & 255 for word in words]
            told.append(RAW if place < stored else codes.plane(plane, modulus=256))
            raw += bytes(plane) if place < stored else b""
        one = piece(500, bits, *told, rotated=rotated)
        assert decoded(values.tobytes(), one, bundle=bundle, codes=codes, raw=raw) == values.tobytes()

    @pytest.mark.parametrize("bits", [8, 16, 32])
    @pytest.mark.parametrize("colours", [1, 3, 256, 300])
    @pytest.mark.parametrize("common", [None, 0])
    def test_palettes(self, bits: int, colours: int, common: int | None) -> None:
        bundle, rng = Bundle(), np.random.default_rng(0)
        values = rng.integers(0, 256, (colours, bits // 8), np.uint8)
        picks = rng.integers(0, colours, 900)
        codes = Codes(bundle)
        told = codes.plane(picks, modulus=None, common=common)
        data = values[picks].tobytes()
        one = piece(900, bits, told, palette=values.tobytes())
        assert decoded(data, one, bundle=bundle, codes=codes) == data

    @pytest.mark.parametrize("value", [0, 7])
    def test_constants_take_no_words(self, value: int) -> None:
        bundle = Bundle()
        codes = Codes(bundle)
        told = codes.plane([value] * 4000, modulus=256)
        data = bytes([value] * 4000)
        assert decoded(data, piece(4000, 8, told), bundle=bundle, codes=codes) == data
        assert bundle.sections == [(handmade.CODES, b"", 0)]

    def test_no_elements(self) -> None:
        bundle = Bundle()
        codes = Codes(bundle)
        told = codes.plane([], modulus=256, maps=(Map(3, [1], 2), None), common=4)
        assert decoded(b"", piece(0, 8, told), bundle=bundle, codes=codes) == b""


def split(n: int) -> list[tuple[Map | None, Map | None]]:
    """Maps of all sorts over n elements: of rows, of columns, both, uneven, finer and coarser."""
    rng = np.random.default_rng(0)

    def made(inner: int, count: int, many: int) -> Map:
        return Map(inner, [int(one) for one in rng.integers(0, many, count)], many)

    return [
        (made(36, n // 36, 3), None),
        (None, made(9, 4, 2)),
        (made(36, n // 36, 16), made(9, 4, 16)),
        (made(7, 5, 4), made(1, 11, 5)),
        (made(2**40, 1, 2), made(1, n, 2)),
    ]


class TestContexts:
    @pytest.mark.parametrize("index", range(5))
    @pytest.mark.parametrize("common", [None, 0])
    def test_maps(self, index: int, common: int | None) -> None:
        bundle, data = Bundle(), normal(3600, spread=2.0)
        codes = Codes(bundle)
        told = codes.plane(data.view(np.uint8), modulus=256, maps=split(3600)[index], common=common)
        assert decoded(data.tobytes(), piece(3600, 8, told), bundle=bundle, codes=codes) == data.tobytes()

    def test_more_elements_than_are_decoded_at_once(self) -> None:
        bundle, n = Bundle(), 200_000
        data = normal(n)
        rows = Map(100, [int(one) for one in np.random.default_rng(1).integers(0, 3, n // 100)], 3)
        codes = Codes(bundle)
        told = codes.plane(data.view(np.uint8), modulus=256, maps=(rows, Map(1, [0, 1, 1, 0, 1], 2)))
        assert decoded(data.tobytes(), piece(n, 8, told), bundle=bundle, codes=codes) == data.tobytes()

    def test_classes_of_a_palette(self) -> None:
        bundle, picks = Bundle(), np.random.default_rng(0).integers(0, 290, 600)
        values = np.arange(290, dtype="<u2")
        codes = Codes(bundle)
        maps = (Map(20, [0, 1] * 15, 2), None)
        one = piece(600, 16, codes.plane(picks, modulus=None, maps=maps), palette=values.tobytes())
        data = values[picks].tobytes()
        assert decoded(data, one, bundle=bundle, codes=codes) == data


class TestDifferences:
    @pytest.mark.parametrize(
        ("bits", "rotated"), [(2, False), (4, False), (8, False), (16, True), (32, True)]
    )
    def test_to_the_base(self, bits: int, rotated: bool) -> None:
        rng = np.random.default_rng(bits)
        old, new = rng.integers(0, 256, 500, np.uint8), rng.integers(0, 256, 480, np.uint8)
        base = Bundle()
        base.plain("folder/m.bin", old.tobytes())
        before = base.bytes()
        bundle = Bundle(base=bytes.fromhex(loader.read(before).identity))
        codes, n = Codes(bundle), 480 * 8 // bits
        pairs = zip(planes(new, bits, rotated), planes(old[13:493], bits, rotated), strict=True)
        told = [
            codes.plane([x - y for x, y in zip(one, two, strict=True)], modulus=min(256, 1 << bits))
            for one, two in pairs
        ]
        one = piece(n, bits, *told, rotated=rotated, base=("folder/m.bin", 13))
        data = new.tobytes()
        assert decoded(data, one, bundle=bundle, codes=codes, base=before) == data

    @pytest.mark.parametrize(
        ("path", "offset"), [("m.bin", 1), ("m.bin", 2**62), ("other.bin", 0), ("m.md", 0)]
    )
    def test_to_what_the_base_does_not_hold(self, path: str, offset: int) -> None:
        base = Bundle()
        base.plain("m.bin", NOTES)
        base.plain("m.md", NOTES, handmade.DOCUMENT)
        before = base.bytes()
        bundle = Bundle(base=bytes.fromhex(loader.read(before).identity))
        codes = Codes(bundle)
        told = piece(len(NOTES), 8, codes.plane([0] * len(NOTES), modulus=256), base=(path, offset))
        with pytest.raises(DamagedBundle, match="base"):
            decoded(NOTES, told, bundle=bundle, codes=codes, base=before)

    def test_a_base_that_is_an_update_itself(self) -> None:
        bundles: list[bytes] = []
        opened: loader.Bundle | None = None
        for step in range(3):
            data = NOTES + bytes([step]) * 40
            made = Bundle(base=bytes.fromhex(opened.identity) if opened else b"")
            before = opened.data("m.bin") if opened else b""
            made.file("m.bin", data, rest=made.section(data, PREFIXED if opened else ZSTD, before))
            bundles.append(made.bytes())
            opened = loader.read(bundles[-1], base=opened)
            assert opened.data("m.bin") == data
        with pytest.raises(MissingBase, match="update"):
            loader.read(bundles[2], base=bundles[1]).data("m.bin")
        with pytest.raises(MissingBase, match="made from"):
            loader.read(bundles[2], base=bundles[0])


def planes(data: np.ndarray, bits: int, rotated: bool) -> list[list[int]]:
    """The values of each plane, by the words of the page."""
    number = int.from_bytes(data.tobytes(), "little")
    mask = (1 << bits) - 1
    elements = [number >> i * bits & mask for i in range(len(data) * 8 // bits)]
    if rotated:
        elements = [one << 1 & mask | one >> bits - 1 for one in elements]
    return [[one >> 8 * place & 255 for one in elements] for place in range(max(bits // 8, 1))]


class TestFiles:
    def test_gaps_and_shared_sections(self) -> None:
        """Two files share rest and raw planes; each has codes of its own; a third is a copy."""
        bundle = Bundle()
        contents, told, words = [], [], []
        for seed in (1, 2):
            coded, raw = normal(50, seed), normal(30, seed + 10)
            codes = Codes(bundle)
            told.append(
                [
                    (3, piece(50, 8, codes.plane(coded.view(np.uint8), modulus=256))),
                    (0, piece(30, 8, RAW)),
                ]
            )
            contents.append((b"abc", coded.tobytes(), raw.tobytes(), b"tail" * seed))
            words.append(codes)
        rest = bundle.section(b"".join(one[0] + one[3] for one in contents), ZSTD)
        raw_planes = bundle.section(b"".join(one[2] for one in contents), LZMA)
        for index, (one, pieces, codes) in enumerate(zip(contents, told, words, strict=True)):
            name, data = f"{index}.bin", b"".join(one)
            bundle.file(name, data, rest=rest, raw=raw_planes, codes=codes.section(), pieces=pieces)
        bundle.copy("same.bin", b"".join(contents[1]), 1)
        found = loader.read(bundle.bytes())
        for name, one in (("same.bin", contents[1]), ("1.bin", contents[1]), ("0.bin", contents[0])):
            assert found.data(name) == b"".join(one)
        found.check()

    def test_all_of_it_together(self) -> None:
        new, old, files = handmade.everything()
        bundle = loader.read(new, base=old)
        bundle.check()
        assert {path: bundle.data(path) for path in bundle.files} == files
        assert {section.codec for section in bundle.sections} == {1, 2, 3, 4}

    @pytest.mark.parametrize("tables", [[1], [3, 0, 0, 255], [0, 0, 1], list(range(256)), [255] * 65536])
    def test_tables(self, tables: Sequence[int]) -> None:
        """Symbols of frequency 0 are coded too; every symbol comes at least once."""
        bundle = Bundle()
        table = bundle.table(0, tables)
        codes = Codes(bundle)
        symbols = np.arange(len(tables))
        codes.push_by(symbols, table)
        told = b"\1\0" + handmade.varint(table)
        data = symbols.astype("<u2").tobytes()
        one = piece(len(tables), 16, told, palette=np.arange(len(tables), dtype="<u2").tobytes())
        assert decoded(data, one, bundle=bundle, codes=codes) == data


def test_the_kinds_of_files() -> None:
    bundle = Bundle()
    for kind, name in ((ARTIFACT, "artifact"), (handmade.DOCUMENT, "document"), (handmade.PROBE, "probe")):
        bundle.plain(f"{name}.bin", name.encode(), kind)
    found = loader.read(bundle.bytes())
    assert {path: file.kind for path, file in found.files.items()} == {
        f"{name}.bin": name for name in ("artifact", "document", "probe")
    }
