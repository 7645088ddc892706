"""The C decoder against what bundles were made of and against the Python loader, under the sanitizers."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import featherweight_loader
import handmade
from featherweight.bundles.write import Member, write_bundle
from featherweight_loader import BundleError
from handmade import CODES, LZMA, PREFIXED, PROBE, RAW, STORED, ZSTD, Bundle, Codes, Map, piece

SOURCES = Path(featherweight_loader.__file__).parent / "c"
CLEAN = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover")
MOST = 16 << 20  # bytes that a mutated bundle may ask for

Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """``compiled(name, sources, *flags)``: a program of these sources, fw.c and libzstd."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("c")
    (folder / "zstd.c").write_text(
        "#include <zstd.h>\nint main(void) { return ZSTD_versionNumber() < 10400; }\n"
    )
    tried = [compiler, str(folder / "zstd.c"), "-lzstd", "-o", str(folder / "zstd")]
    if subprocess.run(tried, check=False, capture_output=True).returncode:
        pytest.skip("no zstd.h and libzstd to compile with: apt-get install libzstd-dev")

    def compile_(name: str, sources: Sequence[Path], *flags: str) -> Path:
        out = folder / name
        paths = [str(path) for path in (*sources, SOURCES / "fw.c")]
        command = [compiler, *CLEAN, *flags, f"-I{SOURCES}", *paths, "-lzstd", "-o", str(out)]
        made = subprocess.run(command, check=False, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return out

    return compile_


@pytest.fixture(scope="session")
def fw(compiled: Compile) -> Path:
    return compiled("fw", [SOURCES / "fw_cli.c"], "-O2")


@pytest.fixture(scope="session")
def sanitized(compiled: Compile) -> Path:
    return compiled("fw-sanitized", [SOURCES / "fw_cli.c"], *SANITIZED)


def run(program: Path, *arguments: str | Path, code: int = 0, memory: int = 0) -> str:
    """Its stdout, or its stderr where the code tells of failure; ``memory``: kilobytes of address space."""
    limited = ["bash", "-c", f'ulimit -v {memory}; exec "$0" "$@"'] if memory else []
    done = subprocess.run(
        [*limited, program, *arguments], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    assert (done.stderr == "") == (code == 0)
    return done.stderr if code else done.stdout


def refused(program: Path, *arguments: str | Path, memory: int = 0) -> str:
    """The one line that it says."""
    (line,) = run(program, *arguments, code=2, memory=memory).splitlines()
    assert line.startswith("fw: ")
    return line


def accepted(program: Path, bundles: Sequence[Path], *more: str | Path) -> list[bool]:
    """Which of many bundles it reads whole, all in one process; no report of a sanitizer."""
    done = subprocess.run(
        [program, "check", *bundles, *more], check=False, capture_output=True, text=True, timeout=280
    )
    assert done.returncode in (0, 2), done.stderr
    whole = {line.partition(": whole, ")[0] for line in done.stdout.splitlines()}
    told = done.stderr.splitlines()
    assert all(line.startswith("fw: ") for line in told), done.stderr
    assert len(whole) + len(told) == len(bundles)
    return [str(path) in whole for path in bundles]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


# ---- bundles of all sorts ----


@dataclass(frozen=True)
class Sample:
    """A bundle in the making, its base's bytes (empty where it needs none), and what its files hold."""

    bundle: Bundle
    base: bytes
    files: dict[str, bytes]


def random_map(rng: np.random.Generator, n: int) -> Map | None:
    if rng.random() < 0.5:
        return None
    inner, most, many = int(rng.integers(1, max(n, 1) + 1)), max(n, 1), int(rng.integers(2, 17))
    if rng.random() < 0.5:
        inner = int(rng.integers(1, 10))
    most = (most - 1) // inner + 1
    count = int(rng.integers(1, most + 1)) if rng.random() < 0.7 else most
    return Map(inner, [int(one) for one in rng.integers(0, many, count)], many)


def random_plane(rng: np.random.Generator, codes: Codes, values: np.ndarray, modulus: int | None) -> bytes:
    n = len(values)
    common = int(values[rng.integers(n)]) if n and rng.random() < 0.4 else None
    lo = int(rng.integers(0, 2**63 - 1)) if modulus and rng.random() < 0.2 else None
    maps = (random_map(rng, n), random_map(rng, n))
    return codes.plane([int(one) for one in values], modulus=modulus, maps=maps, common=common, lo=lo)


def taken_apart(data: np.ndarray, bits: int, rotated: bool) -> list[np.ndarray]:
    """The planes of bytes."""
    if bits < 8:
        return [(data[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1).reshape(-1)]
    words = data.view(f"<u{bits // 8}").astype(np.uint64)
    if rotated:
        words = (words << np.uint64(1) | words >> np.uint64(bits - 1)) & np.uint64(2**bits - 1)
    return [words >> np.uint64(8 * place) & np.uint64(255) for place in range(bits // 8)]


@dataclass(frozen=True)
class Part:
    """How the head tells a piece, its bytes, those of its planes that are not coded, and whether any is."""

    told: bytes
    data: bytes
    raw: bytes
    coded: bool


def random_part(rng: np.random.Generator, codes: Codes, old: bytes) -> Part:
    bits = int(2 ** rng.integers(0, 6))
    size = max(1, bits // 8)
    count = int(rng.choice([0, 1, 5, 40, 300, 12000 // size], p=[0.05, 0.1, 0.2, 0.4, 0.2, 0.05]))
    data = np.clip(rng.normal(20, 9, count * size), 0, 255).astype(np.uint8)
    n = count * 8 // min(bits, 8)
    if bits >= 8 and rng.random() < 0.3:
        values = rng.integers(0, 256, (int(rng.integers(1, 300)), size), np.uint8)
        picks = np.minimum(rng.geometric(0.05, n) - 1, len(values) - 1)
        told = random_plane(rng, codes, picks, None)
        return Part(piece(n, bits, told, palette=values.tobytes()), values[picks].tobytes(), b"", True)
    rotated = bits >= 16 and rng.random() < 0.5
    planes = taken_apart(data, bits, rotated)
    modulus, base = min(256, 1 << bits), None
    if len(old) > len(data) and rng.random() < 0.4:
        base = ("old/model.bin", int(rng.integers(0, len(old) - len(data))))
        before = np.frombuffer(old, np.uint8, len(data), base[1])
        pairs = zip(planes, taken_apart(before, bits, rotated), strict=True)
        planes = [(one.astype(np.int64) - two.astype(np.int64)) % modulus for one, two in pairs]
    told, raw = [], b""
    for plane in planes:
        stored = bits >= 8 and rng.random() < 0.2
        told.append(RAW if stored else random_plane(rng, codes, plane, modulus))
        raw += plane.astype(np.uint8).tobytes() if stored else b""
    coded = any(one != RAW for one in told)
    return Part(piece(n, bits, *told, rotated=rotated, base=base), data.tobytes(), raw, coded)


def identity(data: bytes) -> bytes:
    return handmade.digest(data[: 64 + struct.unpack_from("<I", data, 12)[0]])


def sample(seed: int) -> Sample:
    """A bundle of a few files, with anything in them that the format has."""
    rng = np.random.default_rng(seed)
    before, old = b"", b""
    if rng.random() < 0.5:
        base, old = Bundle(), rng.integers(0, 256, 900, np.uint8).tobytes()
        base.plain("old/model.bin", old)
        base.plain("old/about.md", old, handmade.DOCUMENT)
        before = base.bytes(ZSTD)
    bundle, files = Bundle(base=identity(before) if before else b""), {}
    codes, parts = [], []
    for number in range(int(rng.integers(1, 4))):
        own = Codes(bundle)
        found = [
            (b"gap" * int(rng.integers(0, 3)), random_part(rng, own, old)) for _ in range(rng.integers(4))
        ]
        files[f"folder/{number}.bin"] = b"".join(gap + part.data for gap, part in found) + b"the end"
        codes.append(own)
        parts.append(found)
    rests = [b"".join(gap for gap, _ in found) + b"the end" for found in parts]
    raws = [b"".join(part.raw for _, part in found) for found in parts]
    packings = [STORED, ZSTD, LZMA, *([PREFIXED] if old else [])]

    def sections(contents: list[bytes]) -> list[int]:
        if rng.random() < 0.5:
            contents = [b"".join(contents)]
        made = [bundle.section(one, int(rng.choice(packings)), old) if one else 0 for one in contents]
        return made if len(made) == len(parts) else made * len(parts)

    rest, raw = sections(rests), sections(raws)
    for i, (path, data) in enumerate(files.items()):
        words = codes[i].section() if any(part.coded for _, part in parts[i]) else 0
        pieces = [(len(gap), part.told) for gap, part in parts[i]]
        bundle.file(path, data, rest=rest[i], raw=raw[i], codes=words, pieces=pieces)
    if rng.random() < 0.5:
        files["copy.bin"] = files["folder/0.bin"]
        bundle.copy("copy.bin", files["copy.bin"], 0, PROBE)
    return Sample(bundle, before, files)


def read_by_python(data: bytes, base: bytes) -> bool:
    """Whether the Python loader reads all of it."""
    try:
        featherweight_loader.read(data, base=base or None, max_bytes=MOST).check()
    except BundleError:
        return False
    return True


class TestDecoding:
    def test_all_of_the_format(self, fw: Path, sanitized: Path, tmp_path: Path) -> None:
        new, old, files = handmade.everything()
        (tmp_path / "new.fw").write_bytes(new)
        (tmp_path / "old.fw").write_bytes(old)
        for program in (fw, sanitized):
            folder = tmp_path / program.name
            run(program, "unpack", tmp_path / "new.fw", folder, "--base", tmp_path / "old.fw")
            assert contents(folder) == files

    @pytest.mark.parametrize("first", [0, 60, 120, 180])
    def test_pieces_of_every_sort(self, sanitized: Path, tmp_path: Path, first: int) -> None:
        """The digest of each file is that of what was coded, so that reading it is to get it back."""
        for seed in range(first, first + 60):
            one, path = sample(seed), tmp_path / f"{seed}.fw"
            path.write_bytes(one.bundle.bytes(seed % 3))
            if one.base:
                (tmp_path / "base.fw").write_bytes(one.base)
            folder = tmp_path / str(seed)
            run(sanitized, "unpack", path, folder, *(("--base", tmp_path / "base.fw") if one.base else ()))
            assert contents(folder) == one.files

    def test_what_the_toolkit_writes(self, fw: Path, sanitized: Path, tmp_path: Path) -> None:
        """Weights that are dense, sparse, with a palette, int4, float, constant; an update of them."""
        rng = np.random.default_rng(0)
        dense = np.clip(np.rint(rng.normal(0, 25, 60_000)), -127, 127).astype(np.int8)
        sparse = np.where(rng.random(60_000) < 0.9, 0, dense).astype(np.int8)
        nibbles = (rng.integers(0, 16, 30_000) & rng.integers(0, 16, 30_000)).astype(np.uint8)
        palette = rng.normal(0, 1, 16).astype(np.float32)[rng.integers(0, 16, 20_000)]
        floats = rng.normal(0, 0.05, 20_000).astype(np.float32)
        files = {
            "dense.bin": dense.tobytes(),
            "sparse.bin": sparse.tobytes(),
            "nibbles.bin": (nibbles | nibbles[::-1] << 4).tobytes(),
            "palette.bin": palette.tobytes(),
            "floats.bin": floats.tobytes(),
            "halves.bin": floats.astype(np.float16).tobytes(),
            "zeros.bin": bytes(50_000),
            "mixed.bin": b"head" * 99 + dense[:9000].tobytes() + b"graph" * 99 + palette[:4000].tobytes(),
            "empty.bin": b"",
        }
        later = dict(files)
        later["dense.bin"] = np.where(rng.random(60_000) < 0.02, dense + 1, dense).astype(np.int8).tobytes()
        old, new = tmp_path / "old.fw", tmp_path / "new.fw"
        documents = [Member("card/about.md", b"# About\n" * 50, "document")]
        write_bundle(old, [Member(path, data) for path, data in files.items()] + documents)
        write_bundle(new, [Member(path, data) for path, data in later.items()] + documents, base=old)
        for program in (fw, sanitized):
            folder = tmp_path / program.name
            run(program, "unpack", old, folder)
            assert contents(folder) == files | {"card/about.md": documents[0].read()}
            run(program, "unpack", new, folder / "later", "--base", old)
            assert contents(folder / "later") == later | {"card/about.md": documents[0].read()}

    def test_an_update_of_an_update(self, sanitized: Path, tmp_path: Path) -> None:
        paths, before = [], b""
        for step in range(3):
            data = b"weights of a model " * 20 + bytes([step]) * 30
            made = Bundle(base=identity(paths[-1].read_bytes()) if paths else b"")
            made.file("m.bin", data, rest=made.section(data, PREFIXED if paths else ZSTD, before))
            paths.append(tmp_path / f"{step}.fw")
            paths[-1].write_bytes(made.bytes())
            before = data
        first, second, third = paths
        run(sanitized, "check", third, "--base", second, "--base", first)
        assert "give the bundle" in refused(sanitized, "check", third, "--base", second)
        assert "give the bundle" in refused(sanitized, "check", second)
        assert "not the bundle" in refused(sanitized, "check", third, "--base", first)
        assert "not the bundle" in refused(sanitized, "check", third, "--base", second, "--base", third)
        assert "stands alone" in refused(sanitized, "check", second, "--base", first, "--base", first)

    def test_a_zstd_frame_and_nothing_else(self, sanitized: Path, tmp_path: Path) -> None:
        good = handmade.packed(ZSTD, b"some text " * 9)
        skippable = struct.pack("<II", 0x184D2A50, 3) + b"abc"
        for frame, fine in [(good, True), (good + b"\0", False), (good + good, False), (skippable, False)]:
            bundle = Bundle()
            bundle.sections.append((ZSTD, frame, 90 if fine or frame[:4] == good[:4] else 0))
            bundle.file("a.txt", b"some text " * 9 if bundle.sections[0][2] else b"", rest=1)
            (tmp_path / "a.fw").write_bytes(bundle.bytes())
            assert accepted(sanitized, [tmp_path / "a.fw"]) == [fine]


def flipped(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed, inserted, taken away, or the end cut off."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(out))) if out else 0
        match int(rng.integers(6)):
            case 0 if out:
                out[at] ^= 1 << int(rng.integers(8))
            case 1 if out:
                out[at] = int(rng.choice([0, 1, 127, 128, 255]))
            case 2 if out:
                out[at] = (out[at] + int(rng.choice([1, 255]))) % 256
            case 3:
                out.insert(at, int(rng.integers(256)))
            case 4:
                del out[at : at + int(rng.integers(1, 4))]
            case _ if rng.random() < 0.2:
                del out[at:]
    return bytes(out)


def mutated(rng: np.random.Generator, one: Sample) -> bytes:
    """A bundle that is wrong somewhere, mostly where no digest tells."""
    bundle = Bundle(one.bundle.base, one.bundle.tables, [], list(one.bundle.sections), one.bundle.files)
    body = b"".join(data for _, data, _ in bundle.sections)
    match int(rng.integers(5)):
        case 0:
            return flipped(rng, bundle.bytes(ZSTD))
        case 1 if bundle.sections:
            index = int(rng.integers(len(bundle.sections)))
            codec, data, size = bundle.sections[index]
            data = flipped(rng, data)
            bundle.sections[index] = (codec, data, len(data) if codec in (STORED, CODES) else size)
            return bundle.bytes(LZMA)
        case 2:
            front = bytearray(bundle.bytes(STORED))
            front[int(rng.integers(64))] = int(rng.choice([0, 1, 2, 3, 255]))
            return bytes(front)
        case _:
            head = flipped(rng, bundle.head())
            codec = int(rng.integers(3))
            return handmade.wrapped(handmade.packed(codec, head), len(head), body, codec)


class TestHostile:
    @pytest.mark.parametrize("seed", range(8))
    def test_mutated_bundles_are_read_as_python_reads_them(
        self, sanitized: Path, tmp_path: Path, seed: int
    ) -> None:
        rng, one = np.random.default_rng(seed), sample(seed + 1000)
        paths, expected = [], []
        for number in range(100):
            data = mutated(rng, one)
            paths.append(tmp_path / f"{number}.fw")
            paths[-1].write_bytes(data)
            expected.append(read_by_python(data, one.base))
        (tmp_path / "base.fw").write_bytes(one.base)
        base = ("--base", tmp_path / "base.fw") if one.base else ()
        found = accepted(sanitized, paths, *base, "--max-bytes", str(MOST))
        different = [path.name for path, c, python in zip(paths, found, expected, strict=True) if c != python]
        assert different == []
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
        assert read_by_python(bundle.bytes(), b"") is fine

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
        assert read_by_python(bundle.bytes(), b"") is fine

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


class TestCommand:
    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Path:
        made = Bundle()
        made.plain("model.bin", b"weights" * 9)
        made.plain("docs/about.md", b"about", handmade.DOCUMENT)
        path = tmp_path / "there" / "m.fw"
        path.parent.mkdir()
        path.write_bytes(made.bytes())
        return path

    def test_lists(self, fw: Path, bundle: Path) -> None:
        assert run(fw, "list", bundle) == "63\tartifact\tmodel.bin\n5\tdocument\tdocs/about.md\n"

    def test_unpacks_into_a_folder_that_is_new_or_empty(self, fw: Path, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for folder in ("new", "empty", "other/"):
            run(fw, "unpack", bundle, f"{tmp_path}/{folder}")
            assert contents(tmp_path / folder) == {"model.bin": b"weights" * 9, "docs/about.md": b"about"}
        assert "already" in refused(fw, "unpack", bundle, tmp_path / "new")
        (tmp_path / "link").symlink_to(tmp_path / "away")
        assert "already" in refused(fw, "unpack", bundle, tmp_path / "link")
        assert "No such" in refused(fw, "unpack", bundle, tmp_path / "not" / "there")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "new", "other", "there"]

    def test_writes_all_or_nothing(self, fw: Path, bundle: Path, tmp_path: Path) -> None:
        data = bytearray(bundle.read_bytes())
        data[-1] ^= 1  # in the last section, so that the first file is fine
        bundle.write_bytes(data)
        assert "docs/about.md: a section has another SHA-256" in refused(
            fw, "unpack", bundle, tmp_path / "out"
        )
        assert list(tmp_path.iterdir()) == [bundle.parent]

    def test_says_how_it_is_used(self, fw: Path, bundle: Path) -> None:
        for arguments in (["list"], ["what", bundle], ["unpack", bundle], ["check", bundle, "--base"]):
            assert refused(fw, *arguments).startswith("fw: use: ")
        for size in ("0", "-1", "x", "1x", "99999999999999999999"):
            assert refused(fw, "check", bundle, "--max-bytes", size).startswith("fw: use: ")

    def test_tells_which_file_cannot_be_read(self, fw: Path, bundle: Path, tmp_path: Path) -> None:
        assert "No such file" in refused(fw, "check", tmp_path / "none.fw")
        assert refused(fw, "check", tmp_path)
        (tmp_path / "text.fw").write_text("what is this")
        assert "text.fw: this is no .fw bundle" in refused(fw, "check", tmp_path / "text.fw")


EXAMPLE = """
int main(int count, char **arguments)
{
    static uint8_t data[1 << 16];
    FILE *stream = fopen(arguments[count - 1], "rb");
    size_t size = stream ? fread(data, 1, sizeof data, stream) : 0;
    if (stream) fclose(stream);
    return open_model(data, size, print);
}
"""
PRINT = "\nstatic void print(const uint8_t *data, size_t size) { fwrite(data, 1, size, stdout); }\n"

FAILING = r"""
#include "fw.h"
#include <stdio.h>
#include <stdlib.h>

static long left;

static void *take(void *user, size_t bytes) { return --*(long *)user < 0 ? NULL : malloc(bytes); }

static void give(void *user, void *pointer)
{
    (void)user;
    free(pointer);
}

static fw_status open_one(const char *name, uint8_t *data, size_t room, fw_bundle **bundle)
{
    fw_limits limits = {0, 0, take, give, &left};
    FILE *stream = fopen(name, "rb");
    size_t size = fread(data, 1, room, stream);
    fclose(stream);
    return fw_open(data, size, &limits, bundle);
}

static fw_status read_all(fw_bundle *bundle)
{
    fw_status status = FW_OK;
    size_t i;
    for (i = 0; i < fw_count(bundle) && status == FW_OK; i++) {
        fw_file file;
        uint8_t *out;
        fw_file_at(bundle, i, &file);
        out = malloc(file.size + 1);
        status = fw_read(bundle, i, out, file.size);
        free(out);
    }
    return status;
}

/* Lets each allocation fail in turn; prints how many there are. */
int main(int count, char **names)
{
    static uint8_t data[2][1 << 20];
    long allowed;
    for (allowed = 0; count == 3; allowed++) {
        fw_bundle *new = NULL, *old = NULL;
        fw_status status;
        left = allowed;
        status = open_one(names[1], data[0], sizeof data[0], &new);
        if (status == FW_OK) status = open_one(names[2], data[1], sizeof data[1], &old);
        if (status == FW_OK) status = fw_set_base(new, old);
        if (status == FW_OK) status = read_all(new);
        fw_close(new);
        fw_close(old);
        if (status == FW_OK) break;
        if (status != FW_NO_MEMORY) return 1;
    }
    printf("%ld\n", allowed);
    return 0;
}
"""


class TestEmbedding:
    def test_the_example_of_the_readme(self, compiled: Compile, tmp_path: Path) -> None:
        """Compiled with every warning, as the page has it."""
        (code,) = re.findall(r"```c\n(.*?)```", (SOURCES / "README.md").read_text(), re.DOTALL)
        (tmp_path / "example.c").write_text(code + PRINT + EXAMPLE)
        program = compiled("example", [tmp_path / "example.c"], *SANITIZED)
        for path, code_ in (("model.onnx", 0), ("other.onnx", 2)):
            bundle = Bundle()
            bundle.plain(path, b"a model")
            (tmp_path / path).write_bytes(bundle.bytes())
            told = run(program, tmp_path / path, code=code_)
            assert told == ("model.fw: it holds no such file\n" if code_ else "a model")

    def test_every_allocation_may_fail(self, compiled: Compile, tmp_path: Path) -> None:
        """Nothing leaks, nothing is read after it was freed, and the status says why."""
        new, old, _ = handmade.everything()
        (tmp_path / "new.fw").write_bytes(new)
        (tmp_path / "old.fw").write_bytes(old)
        (tmp_path / "failing.c").write_text(FAILING)
        program = compiled("failing", [tmp_path / "failing.c"], *SANITIZED)
        assert int(run(program, tmp_path / "new.fw", tmp_path / "old.fw")) > 20

    def test_every_error_has_a_text(self, compiled: Compile, tmp_path: Path) -> None:
        header = (SOURCES / "fw.h").read_text()
        names = re.findall(r"^    (FW_\w+)(?: = 0)?,? ", header[: header.index("fw_status;")], re.MULTILINE)
        asked = "".join(f"puts(fw_error_text({name})); " for name in [*names, "(fw_status)999"])
        (tmp_path / "texts.c").write_text(
            f'#include "fw.h"\n#include <stdio.h>\nint main(void) {{ {asked} return 0; }}\n'
        )
        texts = run(compiled("texts", [tmp_path / "texts.c"])).splitlines()
        assert len(set(texts)) == len(names) + 1 > 20
