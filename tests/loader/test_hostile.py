"""Bundles that want something else: every one is refused with the loader's own errors, and leaves nothing."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import featherweight_loader as loader
import handmade
from featherweight_loader import BundleError, DamagedBundle, NewerBundle, TooLarge
from handmade import CODES, LZMA, MAGIC, RAW, STORED, ZSTD, Bundle, digest, piece, varint, wrapped
from mutation import mutated

NOTES = b"some words " * 30
MOST = 2**63 - 1


def refused(data: bytes, kind: type[BundleError] = DamagedBundle, match: str | None = None) -> None:
    """Opening and decoding it raises this error."""
    with pytest.raises(kind, match=match) as error:
        loader.read(data).check()
    assert type(error.value) is kind


class TestPaths:
    @pytest.mark.parametrize(
        "path",
        [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/./b",
            "a//b",
            "a/",
            ".",
            "..",
            "C:/x",
            "C:x",
            "a\\b",
            "\\\\host\\share",
            "a\0b",
            "a\nb",
            "a\x7fb",
            "a\x9fb",
            "a:stream",
            'a"b',
            "a*",
            "a?",
            "<a>",
            "a|b",
            "x.",
            "x ",
            "folder./x",
            "nul",
            "NUL.txt",
            "a/Con",
            "aux.tar.gz",
            "com1",
            "LPT9.log",
            "com¹",
            "prn .txt",
            "conin$",
            "x" * 256,
            "é" * 128,
        ],
        ids=ascii,
    )
    def test_that_lead_elsewhere(self, path: str, tmp_path: Path) -> None:
        bundle = Bundle()
        bundle.plain(path, NOTES)
        refused(bundle.bytes())
        with pytest.raises(DamagedBundle):
            loader.read(bundle.bytes()).unpack(tmp_path / "out")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("path", [b"\xff", b"a\xc0\x80", b"\xed\xa0\x80"])
    def test_that_are_no_text(self, path: bytes) -> None:
        bundle = Bundle()
        bundle.file(path, b"")
        refused(bundle.bytes(), match="UTF-8")

    @pytest.mark.parametrize(
        "paths", [("a", "a"), ("a", "A"), ("a", "a/b"), ("A/b", "a"), ("x/y/z", "X/Y"), ("n/é", "N/é")]
    )
    def test_that_collide(self, paths: tuple[str, str]) -> None:
        refused(handmade.simple(dict.fromkeys(paths, NOTES)) if paths[0] != paths[1] else _twice(paths[0]))

    @pytest.mark.parametrize(
        "path", ["a", "a.b/c.d", "console", "nula", "com10", "é/ü", "a b", ".hidden", "x..y"]
    )
    def test_that_are_fine(self, path: str, tmp_path: Path) -> None:
        loader.read(handmade.simple({path: NOTES})).unpack(tmp_path / "out")
        assert (tmp_path / "out" / path).read_bytes() == NOTES


def _twice(path: str) -> bytes:
    bundle = Bundle()
    bundle.plain(path, NOTES)
    bundle.plain(path, NOTES)
    return bundle.bytes()


class TestDamage:
    def test_every_cut(self) -> None:
        new, old, _ = handmade.everything()
        base = loader.read(old)
        for length in range(len(new)):
            with pytest.raises(DamagedBundle):
                loader.read(new[:length], base=base)

    def test_every_byte(self) -> None:
        """Without a signature too, no byte of a bundle can be another."""
        new, old, _ = handmade.everything()
        base = loader.read(old)
        for place in range(len(new)):
            other = bytearray(new)
            other[place] ^= 1 << place % 8
            with pytest.raises(BundleError):
                loader.read(bytes(other), base=base).check()

    def test_a_version_that_is_newer(self) -> None:
        head = Bundle().head()
        refused(wrapped(head, len(head), b"", version=2), NewerBundle)

    @pytest.mark.parametrize("codec", [3, 4, 5, 255])
    def test_heads_in_unknown_codecs(self, codec: int) -> None:
        head = Bundle().head()
        refused(wrapped(head, len(head), b"", codec), NewerBundle)

    def test_sections_in_unknown_codecs(self) -> None:
        bundle = Bundle()
        bundle.sections.append((5, NOTES, len(NOTES)))
        bundle.file("a", NOTES, rest=1)
        refused(bundle.bytes(), NewerBundle)

    @pytest.mark.parametrize("place", [11, 20, 23])
    def test_bytes_that_must_be_zero(self, place: int) -> None:
        data = bytearray(handmade.simple({"a": NOTES}))
        data[place] = 1
        refused(bytes(data), match="must be 0")

    def test_something_else_altogether(self) -> None:
        for data in (b"", b"PK\3\4", NOTES, MAGIC, MAGIC + b"\0" * 56):
            with pytest.raises(BundleError):
                loader.read(data)

    def test_a_long_tail(self) -> None:
        refused(handmade.simple({"a": NOTES}) + b"\0" * (2 << 20), match="stand behind")

    def test_words_behind_the_head(self) -> None:
        bundle = Bundle(tail=b"\0")
        bundle.plain("a", NOTES)
        refused(bundle.bytes(), match="behind its end")

    @pytest.mark.parametrize("codec", [ZSTD, LZMA])
    def test_sections_that_are_not_what_they_say(self, codec: int) -> None:
        for junk in (b"", b"\0", b"\xff" * 20, NOTES, handmade.packed(codec, NOTES)[:-6]):
            bundle = Bundle()
            bundle.sections.append((codec, junk, len(NOTES)))
            bundle.file("a", NOTES, rest=1)
            refused(bundle.bytes())

    @pytest.mark.parametrize(
        ("codec", "off"),  # a reader stops in LZMA where the size is reached
        [
            (codec, off)
            for codec in (STORED, ZSTD, LZMA, CODES)
            for off in (-1, 1)
            if (codec, off) != (LZMA, -1)
        ],
    )
    def test_sections_of_another_size(self, codec: int, off: int) -> None:
        bundle = Bundle()
        bundle.section(NOTES + b"\0" * 2, codec, raw=len(NOTES) + 2 + off)
        bundle.file("a", (NOTES + b"\0" * 3)[: len(NOTES) + 2 + off], rest=1)
        refused(bundle.bytes())

    def test_a_file_with_another_digest(self) -> None:
        bundle = Bundle()
        bundle.file("a", NOTES, rest=bundle.section(NOTES[::-1]))
        refused(bundle.bytes(), match="file has another digest")

    def test_words_behind_the_codes(self) -> None:
        bundle = Bundle()
        codes = handmade.Codes(bundle)
        told = codes.plane(list(NOTES), modulus=256)
        codes.section()
        codec, words, size = bundle.sections.pop()
        bundle.sections.append((codec, words + b"\1\0\0\0" * 2, size + 8))  # a coder looks one ahead
        bundle.file("a", NOTES, codes=1, pieces=[(0, piece(len(NOTES), 8, told))])
        refused(bundle.bytes(), match="behind their end")


def _head(tell: Callable[[Bundle], None]) -> bytes:
    bundle = Bundle()
    tell(bundle)
    return bundle.bytes()


def _piece(told: bytes, *, tables: int = 1, raw: bytes = b"", codes: bytes | None = None) -> bytes:
    """A bundle of one file of NOTES' size with this piece, whatever it says."""

    def tell(bundle: Bundle) -> None:
        for lo in range(tables):
            bundle.table(lo, [1, 1])
        bundle.section(NOTES)
        if raw:
            bundle.section(raw)
        if codes is not None:
            bundle.section(codes, CODES)
        bundle.file(
            "a",
            NOTES,
            rest=1,
            raw=2 if raw else 0,
            codes=len(bundle.sections) if codes is not None else 0,
            pieces=[(0, told)],
        )

    return _head(tell)


class TestHeads:
    @pytest.mark.parametrize(
        "told",
        [
            varint(MOST) + b"\3\0",
            varint(2**60) + b"\5\0\0\0\0",
            varint(len(NOTES) + 1) + b"\3\0",
            varint(3) + b"\2\1\0\0",
            varint(8) + b"\6\0",
            varint(8) + b"\x43\0",
            varint(8) + b"\x0b\0",
            varint(8) + b"\x1a\1\1\0\1\0\0",
            varint(8) + b"\x1c\1\1\0\1\0\0",
            varint(8) + b"\x13\0",
            varint(8) + b"\x13" + varint(65537),
            varint(8) + b"\x13" + varint(MOST),
            varint(8) + b"\x13\1\0\0",
            varint(8) + b"\2\0",
            varint(8) + b"\3\3",
            varint(8) + b"\3\1\4\0",
            varint(8) + b"\3\1\0" + varint(1),
            varint(8) + b"\3\1\0" + varint(MOST),
            varint(8) + b"\3\1\1\0\1\2\0\0\0",
            varint(8) + b"\3\1\1" + varint(1) + varint(0) + b"\2\0\0\0",
            varint(8) + b"\3\1\1" + varint(1) + varint(2**24 + 1) + b"\2\0\0\0",
            varint(8) + b"\3\1\1" + varint(1) + varint(9) + b"\2\0\0\0",
            varint(8) + b"\3\1\1" + varint(MOST) + varint(2) + b"\2\0\0\0",
            varint(8) + b"\3\1\1" + varint(1) + varint(1) + b"\1\0\0",
            varint(8) + b"\3\1\1" + varint(1) + varint(1) + b"\x11" + b"\0" * 18,
            varint(8) + b"\3\2\0\0" + varint(256) + b"\0",
            varint(8) + b"\3\2\0\0" + varint(MOST) + b"\0",
            varint(8) + b"\x23\1a\0\0",
            varint(8) + b"\x23\3../\0\1\0\0",
            b"\x80" * 10,
            b"\xff" * 20,
        ],
        ids=lambda told: told[:12].hex(),
    )
    def test_pieces(self, told: bytes) -> None:
        for codes in (None, b"\0" * 8):
            refused(_piece(told, codes=codes))

    @pytest.mark.parametrize("gap", [len(NOTES), MOST])
    def test_gaps(self, gap: int) -> None:
        def tell(bundle: Bundle) -> None:
            bundle.section(NOTES)
            bundle.section(b"x" * 8)
            bundle.file("a", NOTES, rest=1, raw=2, pieces=[(gap, piece(8, 8, RAW))])

        refused(_head(tell))

    def test_sections_that_files_do_not_use_up(self) -> None:
        for size in (len(NOTES) - 1, len(NOTES) + 1):

            def tell(bundle: Bundle, size: int = size) -> None:
                bundle.file("a", NOTES[:size], rest=bundle.section(NOTES), size=size)

            refused(_head(tell))
        refused(_head(lambda bundle: bundle.sections.append((STORED, NOTES, len(NOTES)))), match="uses")
        refused(_head(lambda bundle: bundle.sections.append((STORED, b"", 0))), match="uses")

    def test_sections_in_two_roles(self) -> None:
        def tell(bundle: Bundle) -> None:
            both = bundle.section(NOTES)
            bundle.file("a", NOTES, rest=both, raw=both, pieces=[(0, piece(8, 8, RAW))])

        refused(_head(tell), match="used twice")

    @pytest.mark.parametrize("section", [2, 4096, MOST])
    def test_sections_that_there_are_not(self, section: int) -> None:
        def tell(bundle: Bundle) -> None:
            bundle.section(NOTES)
            bundle.file("a", NOTES, rest=section)

        refused(_head(tell), match="no section")

    @pytest.mark.parametrize("index", [0, 1, 2, 3, MOST])
    def test_copies_of_none(self, index: int) -> None:
        """File 0 is one, 1 a copy of it, 2 what is tried: 0 has other bytes, 1 is a copy, 2 is itself."""

        def tell(bundle: Bundle) -> None:
            bundle.plain("a", NOTES)
            bundle.copy("b", NOTES, 0)
            bundle.copy("c", NOTES[1:] if index == 0 else NOTES, index)

        refused(_head(tell), match="copy")

    def test_bytes_in_no_section(self) -> None:
        refused(_head(lambda bundle: bundle.file("a", NOTES)), match="no section")

    def test_tables_without_frequencies(self) -> None:
        for table in (b"\0\0", b"\0\2\0\0", b"\0" + varint(65537), b"\0" + varint(MOST), varint(5)):

            def tell(bundle: Bundle, table: bytes = table) -> None:
                bundle.tables.append(table)

            refused(_head(tell))

    @pytest.mark.parametrize("place", range(4))
    def test_counts_that_are_too_large(self, place: int) -> None:
        for count in (65537, 2**32, MOST):
            head = b"\0" + b"\0" * place + varint(count)
            refused(wrapped(head, len(head), b""))

    def test_first_bytes(self) -> None:
        for head in (b"", b"\2", b"\1", b"\1" + b"x" * 31):
            refused(wrapped(head, len(head), b""))

    def test_more_pieces_than_any_bundle_has(self) -> None:
        def tell(bundle: Bundle) -> None:
            bundle.file("a", b"", pieces=[(0, piece(0, 8, RAW))] * 65537)

        refused(_head(tell), match="pieces")


class TestBombs:
    def test_sizes_are_checked_before_anything_is_decoded(self) -> None:
        def tell(bundle: Bundle) -> None:
            bundle.sections.append((ZSTD, b"no zstd", 2**40))
            bundle.file("a", b"", rest=1, size=2**40)

        refused(_head(tell), TooLarge)
        data = handmade.simple({"a": bytes(2000), "b": bytes(2000)})
        with pytest.raises(TooLarge, match="3999"):
            loader.read(data, max_bytes=3999)
        loader.read(data, max_bytes=4000).check()

    def test_sums_do_not_overflow(self) -> None:
        def tell(bundle: Bundle) -> None:
            for name in "abcd":
                bundle.file(name, b"", size=2**62)

        refused(_head(tell), TooLarge)

    def test_files_that_are_larger_than_their_sections(self) -> None:
        table = Bundle()
        one = table.table(0, [1])
        table.section(b"", CODES)
        table.file("a", b"", codes=1, pieces=[(0, piece(2**33, 8, b"\1\0" + varint(one)))], size=2**33)
        refused(table.bytes(), TooLarge)

    @pytest.mark.skipif(sys.platform == "win32", reason="no limits of address space there")
    def test_memory_is_bounded(self, tmp_path: Path) -> None:
        """In a child that may take little: whatever is declared, an error of ours and little memory."""
        for index, data in enumerate(_bombs()):
            (tmp_path / f"{index}.fw").write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, os.fspath(tmp_path)],
            check=False,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert set(told["errors"]) <= {"DamagedBundle", "TooLarge"}
        assert told["peak"] < 250 << 20, told


def _bombs() -> list[bytes]:
    zeros = zstandard.ZstdCompressor(level=1).compress(bytes(512 << 20))
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    unsized = b"".join(stream.compress(bytes(1 << 24)) for _ in range(32)) + stream.flush()
    lzma = handmade.packed(LZMA, bytes(64 << 20))
    small = zstandard.ZstdCompressor(level=1).compress(bytes(60 << 20))
    bombs = [wrapped(small, 60 << 20, b"", ZSTD), wrapped(small, 1000, b"", ZSTD)]
    bombs += [wrapped(lzma, 1000, b"", LZMA), wrapped(unsized, 1000, b"", ZSTD)]
    for codec, data in ((ZSTD, zeros), (ZSTD, unsized), (LZMA, lzma)):
        for size in (1000, 3 << 30):
            bundle = Bundle()
            bundle.sections.append((codec, data, size))
            bundle.file("a", b"", rest=1, size=size)
            bombs.append(bundle.bytes())
    bundle = Bundle()
    table = bundle.table(0, [1])
    bundle.section(b"", CODES)
    bundle.file("a", b"", codes=1, pieces=[(0, piece(3 << 30, 8, b"\1\0" + varint(table)))], size=3 << 30)
    bombs.append(bundle.bytes())
    head = b"\0\0\0" + varint(4096)
    for index in range(4096):
        name = f"{index}".encode()
        head += varint(len(name)) + name + b"\0" + varint(1 << 20) + digest(b"") + b"\0\0\0\0\0"
    return [*bombs, wrapped(head, len(head), b"")]


_CHILD = """
import json, resource, sys
from pathlib import Path
import numpy, constriction, zstandard, lzma
import featherweight_loader as loader
import featherweight_loader.files
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
statm = Path("/proc/self/statm")
held = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 1 << 30
resource.setrlimit(resource.RLIMIT_AS, (held + (300 << 20),) * 2)
before, errors = peak(), []
for path in sorted(Path(sys.argv[1]).glob("*.fw")):
    try:
        loader.read(path).check()
        errors.append("none")
    except loader.BundleError as error:
        errors.append(type(error).__name__)
print(json.dumps({"errors": errors, "peak": peak() - before}))
"""


class TestFolders:
    def test_nothing_is_left_of_what_fails(self, tmp_path: Path) -> None:
        bundle = Bundle()
        bundle.plain("a/fine.bin", NOTES)
        bundle.file("b/bad.bin", NOTES, rest=bundle.section(NOTES[::-1]))
        with pytest.raises(DamagedBundle):
            loader.read(bundle.bytes()).unpack(tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_folder_with_files_stays_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_bytes(b"mine")
        (tmp_path / "link").symlink_to(tmp_path / "out")
        for name in ("out", "link", "out/mine"):
            with pytest.raises(BundleError, match="already"):
                loader.read(handmade.simple({"a": NOTES})).unpack(tmp_path / name)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(BundleError, match="cannot write"):
            loader.read(handmade.simple({"a": NOTES})).unpack(tmp_path / "file" / "out")


@pytest.fixture(scope="module")
def whole() -> tuple[bytes, bytes]:
    new, old, _ = handmade.everything()
    return new, old


@settings(max_examples=400, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_whatever_goes_wrong(whole: tuple[bytes, bytes], seed: int) -> None:
    """Mutated bundles raise our errors alone; what one unpacks to has the digests that it tells."""
    new, old = whole
    rng = random.Random(seed)
    data = mutated(new, rng, old)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            bundle = loader.read(data, base=old, max_bytes=1 << 24)
            written = bundle.unpack(out)
        except BundleError:
            assert not list(Path(folder).iterdir())
        else:
            assert {path.relative_to(out).as_posix() for path in written} == set(bundle.files)
            for path, file in bundle.files.items():
                assert digest((out / path).read_bytes()).hex() == file.sha256
            assert [path.name for path in Path(folder).iterdir()] == ["out"]


def test_the_head_is_where_the_first_bytes_say() -> None:
    """The oracle's own sums: what tests lie about is right where they do not."""
    data = handmade.simple({"a": NOTES})
    packed, raw, body = struct.unpack_from("<II4xQ", data, 12)
    assert 64 + packed + body == len(data)
    assert zstandard.frame_content_size(data[64 : 64 + packed]) == raw
