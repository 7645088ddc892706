"""The C decoder gives back what bundles were made of, under the sanitizers too; its command; its use."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

import handmade
from bundle_samples import identity, sample
from c_reader import SANITIZED, SOURCES, Compile, accepted, refused, run
from featherweight.bundles.write import Member, write_bundle
from handmade import PREFIXED, ZSTD, Bundle


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


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
