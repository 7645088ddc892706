"""What a bundle tells of itself, the folders it is unpacked to, and the loader's command."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import featherweight_loader as loader
import handmade
from featherweight_loader import BundleError, MissingBase, MissingPart
from featherweight_loader.__main__ import main
from handmade import DOCUMENT, PROBE, ZSTD, Bundle

FILES = {"model.bin": b"\1\2\3" * 50, "folder/other.bin": b"", "card.md": b"# Model", "probe.npz": b"0"}


@pytest.fixture
def data() -> bytes:
    bundle = Bundle()
    for path, content in FILES.items():
        kind = DOCUMENT if path.endswith(".md") else PROBE if path.endswith(".npz") else handmade.ARTIFACT
        bundle.plain(path, content, kind)
    return bundle.bytes(ZSTD, signature=b'{"payload": ""}')


class TestRead:
    def test_what_it_tells(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "m.fw").write_bytes(data)
        end = 64 + struct.unpack_from("<I", data, 12)[0]
        for source in (data, tmp_path / "m.fw", str(tmp_path / "m.fw")):
            bundle = loader.read(source)
            assert bundle.identity == hashlib.sha256(data[:end]).hexdigest()
            assert bundle.bytes == len(data)
            assert bundle.base == ""
            assert bundle.signed
            assert bundle.signature == b'{"payload": ""}'
            assert list(bundle.files) == list(FILES)
            assert [file.kind for file in bundle.files.values()] == [
                "artifact",
                "artifact",
                "document",
                "probe",
            ]
            for path, content in FILES.items():
                file = bundle.files[path]
                assert (file.path, file.bytes) == (path, len(content))
                assert file.sha256 == hashlib.sha256(content).hexdigest()
                assert bundle.data(path) == content
            assert len(bundle.sections) == 4
            assert bundle.sections[0].raw == 150
            bundle.check()

    def test_the_signature_is_no_part_of_the_identity(self, data: bytes) -> None:
        bare = loader.read(data[: -len(b'{"payload": ""}')])
        assert bare.identity == loader.read(data).identity
        assert not bare.signed

    def test_nothing_is_decoded_before_it_is_asked_for(self, data: bytes) -> None:
        """A section that is damaged does not keep the others from being read."""
        where = data.index(b"\x28\xb5\x2f\xfd", 64 + struct.unpack_from("<I", data, 12)[0])
        damaged = data[:where] + b"x" + data[where + 1 :]
        bundle = loader.read(damaged)
        assert bundle.data("card.md") == b"# Model"
        with pytest.raises(loader.DamagedBundle, match="section has another digest"):
            bundle.data("model.bin")

    def test_a_file_that_changes_while_it_is_open(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "m.fw").write_bytes(data)
        bundle = loader.read(tmp_path / "m.fw")
        (tmp_path / "m.fw").write_bytes(data[:-60])
        with pytest.raises(BundleError):
            bundle.check()

    def test_what_is_not_there(self, data: bytes, tmp_path: Path) -> None:
        for source in (tmp_path / "none.fw", tmp_path):
            with pytest.raises(BundleError, match="cannot read"):
                loader.read(source)
        with pytest.raises(MissingPart, match="no 'x'"):
            loader.read(data).data("x")

    def test_a_base_is_not_needed_to_look(self) -> None:
        new, old, files = handmade.everything()
        bundle = loader.read(new)
        assert bundle.base == loader.read(old).identity
        assert list(bundle.files) == list(files)
        with pytest.raises(MissingBase, match="update"):
            bundle.check()
        with pytest.raises(MissingBase, match="made from"):
            loader.read(new, base=new)
        loader.read(new, base=loader.read(old)).check()


class TestUnpack:
    @pytest.mark.parametrize("there", [False, True])
    def test_files(self, data: bytes, tmp_path: Path, there: bool) -> None:
        out = tmp_path / "some" / "out"
        if there:
            out.mkdir(parents=True)
        written = loader.read(data).unpack(out)
        assert written == [out / path for path in FILES]
        assert {path: (out / path).read_bytes() for path in FILES} == FILES
        assert list(out.parent.iterdir()) == [out]

    def test_some_kinds(self, data: bytes, tmp_path: Path) -> None:
        loader.read(data).unpack(tmp_path / "out", kinds=("document", "probe"))
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["card.md", "probe.npz"]


class TestCommand:
    def test_list(self, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "m.fw").write_bytes(data)
        assert main(["list", str(tmp_path / "m.fw")]) == 0
        assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == list(FILES)

    def test_check_and_unpack(self, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "m.fw").write_bytes(data)
        assert main(["check", str(tmp_path / "m.fw")]) == 0
        assert loader.read(data).identity in capsys.readouterr().out
        assert main(["unpack", str(tmp_path / "m.fw"), str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "model.bin").read_bytes() == FILES["model.bin"]
        assert main(["unpack", str(tmp_path / "m.fw"), str(tmp_path / "out")]) == 2
        assert "there already" in capsys.readouterr().err

    def test_updates(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        new, old, _ = handmade.everything()
        (tmp_path / "new.fw").write_bytes(new)
        (tmp_path / "old.fw").write_bytes(old)
        assert main(["check", str(tmp_path / "new.fw")]) == 2
        assert capsys.readouterr().err.startswith("MissingBase: ")
        assert main(["check", str(tmp_path / "new.fw"), "--base", str(tmp_path / "old.fw")]) == 0

    def test_errors(self, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "m.fw").write_bytes(data[:-100])
        assert main(["check", str(tmp_path / "m.fw")]) == 2
        assert "fetch it again" in capsys.readouterr().err
        (tmp_path / "m.fw").write_bytes(data)
        assert main(["check", str(tmp_path / "m.fw"), "--max-bytes", "10"]) == 2
        assert capsys.readouterr().err.startswith("TooLarge: ")

    def test_as_a_module(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "featherweight_loader", "list", str(tmp_path / "none.fw")],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_all_that_is_public_is_there() -> None:
    assert all(hasattr(loader, name) for name in loader.__all__)
    assert sorted(loader.__all__) == list(loader.__all__)
