"""The C decoder under the sanitizers: what is wrong is refused as by Python; memory is bounded."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

import featherweight_loader
import handmade
from bundle_samples import sample
from c_reader import accepted, refused, run
from featherweight_loader import BundleError
from handmade import LZMA, PREFIXED, STORED, ZSTD, Bundle, Codes, Map, piece
from mutation import mutated

MOST = 16 << 20  # bytes that a mutated bundle may ask for


def refused_by_python(data: bytes, base: bytes) -> str:
    """Why the Python loader does not read all of it, empty where it does."""
    try:
        featherweight_loader.read(data, base=base or None, max_bytes=MOST).check()
    except BundleError as error:
        return str(error)
    return ""


def has_another_frame(data: bytes, whole: bytes) -> bool:
    """Whether a zstd frame is damaged behind its digest: versions of libzstd differ on what becomes of it."""
    try:
        sections = featherweight_loader.read(data, max_bytes=MOST).sections
    except BundleError:
        return False
    known = {section.sha256 for section in featherweight_loader.read(whole).sections}
    return any(one.codec in (ZSTD, PREFIXED) and one.sha256 not in known for one in sections)


class TestHostile:
    @pytest.mark.parametrize("seed", range(8))
    def test_mutated_bundles_are_read_as_python_reads_them(
        self, sanitized: Path, tmp_path: Path, seed: int
    ) -> None:
        rng, one = random.Random(seed), sample(seed + 1000)
        whole = one.bundle.bytes(ZSTD)
        paths, expected = [], []
        for number in range(100):
            data = mutated(whole, rng, one.base or None)
            paths.append(tmp_path / f"{number}.fw")
            paths[-1].write_bytes(data)
            expected.append(refused_by_python(data, one.base))
        (tmp_path / "base.fw").write_bytes(one.base)
        base = ("--base", tmp_path / "base.fw") if one.base else ()
        found = accepted(sanitized, paths, *base, "--max-bytes", str(MOST))
        for path, by_c, why in zip(paths, found, expected, strict=True):
            assert by_c != bool(why) or has_another_frame(path.read_bytes(), whole), (path.name, why)
        assert not all(found)

    def test_files_cut_off_anywhere(self, sanitized: Path, tmp_path: Path) -> None:
        whole = sample(5).bundle.bytes(ZSTD)
        paths = []
        for length in itertools.chain(range(0, 70), range(70, len(whole), 9)):
            paths.append(tmp_path / f"{length}.fw")
            paths[-1].write_bytes(whole[:length])
        assert not any(accepted(sanitized, paths))

    @pytest.mark.parametrize(
        ("path", "fine"),
        [
            *(
                (path, True)
                for path in ("a", "a/b.c", "ä/ö", "con1", "comx", "com", "x.con", ".a", "a b", "com12")
            ),
            *(
                (path, False)
                for path in ("", "/a", "a//b", "a/", "..", "../a", "a/../b", ".", "a.", "a ", "a\\b")
            ),
            *(
                (path, False)
                for path in ("c:a", "a?", "a\0", "a\x1f", "a\x7f", "a\x85", "CON", "nul.txt", "x/Com1")
            ),
            *(
                (path, False)
                for path in ("lpt\u00b2.x", "conin$", "aux .b", "a" * 256, b"\xff", b"\xed\xa0\x80")
            ),
            *((path, False) for path in (b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe2\x82")),
        ],
    )
    def test_paths(self, sanitized: Path, tmp_path: Path, path: str | bytes, fine: bool) -> None:
        bundle = Bundle()
        bundle.file(path, b"")
        (tmp_path / "a.fw").write_bytes(bundle.bytes())
        assert accepted(sanitized, [tmp_path / "a.fw"]) == [fine]
        assert (refused_by_python(bundle.bytes(), b"") == "") is fine

    @pytest.mark.parametrize(
        ("paths", "fine"),
        [
            (("a", "A"), False),
            (("a/b", "a"), False),
            (("a", "a-b", "a.b", "A/b"), False),
            (("a/b", "a/c", "a.b", "a-b", "ab"), True),
            (("ä", "Ä"), True),
        ],
    )
    def test_paths_that_collide(
        self, sanitized: Path, tmp_path: Path, paths: tuple[str, ...], fine: bool
    ) -> None:
        bundle = Bundle()
        for path in paths:
            bundle.file(path, b"")
        (tmp_path / "a.fw").write_bytes(bundle.bytes())
        assert accepted(sanitized, [tmp_path / "a.fw"]) == [fine]
        assert (refused_by_python(bundle.bytes(), b"") == "") is fine

    def test_bombs_are_bounded(self, fw: Path, tmp_path: Path) -> None:
        """Under an address space of 100 MB; the bundles themselves take some hundred bytes."""
        large = 3 << 30
        constant, bundle = tmp_path / "constant.fw", Bundle()
        codes = Codes(bundle)
        told = piece(large, 8, codes.plane([7] * 4, modulus=256))
        bundle.file("m.bin", b"", codes=codes.section(), pieces=[(0, told)], size=large)
        constant.write_bytes(bundle.bytes())
        assert "not enough memory" in refused(fw, "check", constant, memory=100_000)
        assert "more bytes than" in refused(fw, "check", constant, "--max-bytes", "1000000", memory=100_000)
        assert "more bytes than" in refused(fw, "list", constant, "--max-bytes", "1000000", memory=100_000)
        zeros = bytes(8 << 20)
        for codec in (ZSTD, LZMA):
            bundle = Bundle()
            bundle.file("m.bin", b"", rest=bundle.section(zeros, codec, raw=large), size=large)
            (tmp_path / "packed.fw").write_bytes(bundle.bytes())
            assert "not enough memory" in refused(fw, "check", tmp_path / "packed.fw", memory=100_000)
            bundle = Bundle()
            bundle.file("m.bin", b"", rest=bundle.section(zeros, codec, raw=1000), size=1000)
            (tmp_path / "packed.fw").write_bytes(bundle.bytes())
            assert refused(fw, "check", tmp_path / "packed.fw", memory=100_000)

    def test_the_tables_of_a_large_head_are_bounded(self, fw: Path, tmp_path: Path) -> None:
        """Of 8 MiB of tables, all of them used: four times as much, and 32 MiB to search them faster."""
        bundle = Bundle()
        codes = Codes(bundle)
        values = handmade.varint
        tables = [bundle.table(number, [1] * 32768) for number in range(256)]
        maps = [Map(16, list(range(16)), 16), Map(1, list(range(16)), 16)]
        told = bytes([1, 3])
        for one in maps:
            told += values(one.inner) + values(16) + values(16) + values(codes.push(one.classes, None, 0))
        for number in tables:
            told += values(number)
            codes.push_by(np.array([5]), number)
        data = (np.arange(256) + 5).astype(np.uint8).tobytes()
        bundle.file("m.bin", data, codes=codes.section(), pieces=[(0, piece(256, 8, told))])
        (tmp_path / "a.fw").write_bytes(bundle.bytes(STORED))
        run(fw, "check", tmp_path / "a.fw", memory=120_000)
