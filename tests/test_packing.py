"""Bundles as a user sees them: packed, signed, verified, unpacked and opened."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featherweight as fw
import featherweight_loader
from featherweight.cli import main
from featherweight.engine.timing import Limits
from featherweight.errors import BundleError, LoadError, OutputError

QUICK = Limits(seconds=0.2, least_seconds=0.0, warmup_s=0.01, throughput_s=0.02, memory_repeats=1)
NET = '''"""A small network."""
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    module = nn.Sequential(*body, nn.Flatten(), nn.Linear(2048, 32), nn.Linear(32, 4)).eval()
    nn.init.normal_(module[-2].weight, std=0.02)
    return module


def better():
    module = net()
    module[-1].bias.data += 0.5
    return module
'''
RECIPE = "version: 1\nsteps:\n  - fold: {}\n  - quantize: {}\n"
INPUTS = np.random.default_rng(7).standard_normal((40, 3, 8, 8)).astype(np.float32)


@dataclass(frozen=True)
class Made:
    """What the tests pack.

    Attributes:
        home: Where all lies: a folder whose name must be in no bundle.
        fitted: What fit wrote for onnxruntime.
        lowered: What lower wrote for openvino.
        signed: A signed bundle of ``fitted``.
        unsigned: A bundle of ``lowered``.
        both: A signed bundle of both.
        update: A signed update of ``signed``.
        told: What was told of the bundles, by their names.
    """

    home: Path
    fitted: Path
    lowered: Path
    signed: Path
    unsigned: Path
    both: Path
    update: Path
    told: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    home = tmp_path_factory.mktemp("secret-home")
    (home / "private_net.py").write_text(NET)
    (home / "int8.yaml").write_text(RECIPE)
    data = home / "private_data.npz"
    np.savez(data, x=INPUTS[:32], y=np.arange(32) % 4, x_train=INPUTS[32:], y_train=np.arange(8) % 4)
    for name in ("key", "other"):
        for command in (
            ["genpkey", "-algorithm", "ed25519", "-out", f"{name}.pem"],
            ["pkey", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"],
        ):
            subprocess.run(["openssl", *command], cwd=home, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATHERWEIGHT_CACHE", str(home / "cache"))
        given: dict[str, Any] = {"recipe": str(home / "int8.yaml")}
        net = f"{home / 'private_net.py'}"
        fw.fit(f"{net}:net", str(data), out=home / "fitted", limits=QUICK, tune=False, **given)
        fw.lower(f"{net}:net", data=str(data), out=home / "lowered", runtime="openvino", **given)
        fw.lower(f"{net}:better", data=str(data), out=home / "better", **given)
    (home / "fitted" / "LICENSE").write_text("Free to use.\n")
    fitted, lowered, key = home / "fitted", home / "lowered", home / "key.pem"
    files = {name: home / f"{name}.fw" for name in ("model", "unsigned", "both", "update")}
    told = {
        "model": fw.pack(fitted, files["model"], sign=key),
        "unsigned": fw.pack(lowered, files["unsigned"]),
        "both": fw.pack([fitted, lowered], files["both"], sign=key),
        "update": fw.pack(home / "better", files["update"], base=files["model"], sign=key),
    }
    return Made(home, fitted, lowered, *files.values(), told)


def flipped(file: Path, place: int, out: Path) -> Path:
    """A copy with one byte changed."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1 + place % 255
    out.write_bytes(data)
    return out


def again(file: Path, out: Path, change: Callable[[dict[str, bytes]], None], key: Path | None = None) -> Path:
    """A bundle of other files under the same names, whole and even signed, as a liar would make it."""
    from featherweight.bundles.signing import Envelope, private_key
    from featherweight.bundles.statement import statement
    from featherweight.bundles.write import Member, write_bundle

    bundle = featherweight_loader.read(file)
    files = {path: bundle.data(path) for path in bundle.files}
    change(files)
    kinds = {path.split("/")[0]: one.kind for path, one in bundle.files.items()}
    write_bundle(
        out, [Member(path, data, kinds[path.split("/")[0]], "onnxruntime") for path, data in files.items()]
    )
    if key is not None:
        made = featherweight_loader.read(out)
        digests = {path: one.sha256 for path, one in made.files.items()}
        envelope = Envelope.signed(statement("model.fw", made.identity, digests), private_key(key))
        out.write_bytes(out.read_bytes() + envelope.to_bytes())
    return out


class TestPack:
    def test_holds_what_belongs_to_the_artifact(self, made: Made) -> None:
        kinds = {path: one.kind for path, one in featherweight_loader.read(made.signed).files.items()}
        documents = ("recipe.yaml", "result.json", "model_card.md", "artifact.json", "LICENSE")
        assert kinds == {
            "model.onnx": "artifact",
            "probe/onnxruntime.json": "probe",
            **dict.fromkeys((*documents, "load.py", "load.cpp", "Load.java"), "document"),
        }

    def test_tells_what_each_file_takes(self, made: Made) -> None:
        told = made.told["unsigned"]
        assert told["bytes"] == made.unsigned.stat().st_size
        assert told["identity"] == featherweight_loader.read(made.unsigned).identity
        assert told["key"] is None
        sizes = {file["path"]: file["bytes"] for file in told["files"]}
        assert sizes["model.bin"] == (made.lowered / "model.bin").stat().st_size
        assert told["unpacked_bytes"] == sum(sizes.values())
        assert sum(file["packed"] for file in told["files"]) + told["head_bytes"] == pytest.approx(
            told["bytes"], abs=len(sizes)
        )

    def test_is_the_same_file_each_time(self, made: Made, tmp_path: Path) -> None:
        fw.pack(made.lowered, tmp_path / "a.fw")
        assert (tmp_path / "a.fw").read_bytes() == made.unsigned.read_bytes()

    def test_several_runtimes_lie_under_their_names(self, made: Made) -> None:
        paths = set(featherweight_loader.read(made.both).files)
        assert {"onnxruntime/model.onnx", "openvino/model.xml", "openvino/model.bin", "LICENSE"} <= paths
        assert {"probe/onnxruntime.json", "probe/openvino.json", "openvino/artifact.json"} <= paths
        told = fw.verify(made.both, key=made.home / "key.pub")
        assert {name: seen["measured"] for name, seen in told["artifacts"].items()} == {
            "onnxruntime": True,
            "openvino": False,
        }
        (first,) = fw.load(made.both, runtime="onnxruntime")(INPUTS[:1])
        (second,) = fw.load(made.both, runtime="openvino")(INPUTS[:1])
        assert np.abs(first - second).max() < 0.1 * np.abs(first).max()

    def test_a_licence_may_be_named(self, made: Made, tmp_path: Path) -> None:
        (tmp_path / "terms.txt").write_text("Ask first.\n")
        fw.pack(made.fitted, tmp_path / "a.fw", license=tmp_path / "terms.txt")
        assert featherweight_loader.read(tmp_path / "a.fw").data("LICENSE") == b"Ask first.\n"

    def test_what_is_there_is_kept_without_force(self, made: Made, tmp_path: Path) -> None:
        out = tmp_path / "a.fw"
        out.write_bytes(made.signed.read_bytes())
        with pytest.raises(OutputError, match="is there already"):
            fw.pack(made.lowered, out)
        assert out.read_bytes() == made.signed.read_bytes()
        fw.pack(made.lowered, out, force=True)
        assert "model.xml" in featherweight_loader.read(out).files
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(OutputError, match="never replaced"):
            fw.pack(made.lowered, tmp_path / "thesis.txt", force=True)

    def test_one_artifact_for_each_runtime(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="two folders hold an artifact for onnxruntime"):
            fw.pack([made.fitted, made.home / "better"], tmp_path / "a.fw")

    @pytest.mark.parametrize("name", ["model.onnx", "recipe.yaml", "result.json"])
    def test_an_artifact_that_is_not_what_was_measured(self, made: Made, tmp_path: Path, name: str) -> None:
        shutil.copytree(made.fitted, tmp_path / "fitted")
        file = tmp_path / "fitted" / name
        changed = {
            "model.onnx": (made.home / "better" / "model.onnx").read_bytes(),
            "recipe.yaml": b"version: 1\nsteps: []\n",
            "result.json": re.sub(
                rb'"sha256": "[0-9a-f]{64}"', b'"sha256": "%s"' % (b"0" * 64), file.read_bytes()
            ),
        }[name]
        file.write_bytes(changed)
        with pytest.raises(BundleError, match="is not the"):
            fw.pack(tmp_path / "fitted", tmp_path / "a.fw")
        assert [path.name for path in tmp_path.iterdir()] == ["fitted"]  # nothing half-written is left

    def test_an_interrupted_one_leaves_nothing(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from featherweight.api import packing

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(packing, "_check_written", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fw.pack(made.fitted, tmp_path / "a.fw")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_that_changes_meanwhile_is_found(
        self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from featherweight.api import packing

        folder = tmp_path / "fitted"
        shutil.copytree(made.fitted, folder)
        write = packing.write_bundle

        def write_and_change(*given: Any, **options: Any) -> Any:
            packed = write(*given, **options)
            (folder / "load.py").write_text("changed")
            return packed

        monkeypatch.setattr(packing, "write_bundle", write_and_change)
        with pytest.raises(BundleError, match=r"'load\.py' is another file"):
            fw.pack(folder, tmp_path / "a.fw")
        assert not (tmp_path / "a.fw").exists()

    def test_older_folders_are_packed_without_a_probe(self, made: Made, tmp_path: Path) -> None:
        shutil.copytree(made.lowered, tmp_path / "old")
        about = json.loads((tmp_path / "old" / "artifact.json").read_text())
        del about["signatures"], about["sha256"]
        (tmp_path / "old" / "artifact.json").write_text(json.dumps(about))
        fw.pack(tmp_path / "old", tmp_path / "a.fw")
        assert fw.verify(tmp_path / "a.fw")["artifacts"]["openvino"]["parity"] == "no probe was kept"


class TestUpdate:
    def test_is_smaller_and_tells_by_how_much(self, made: Made, tmp_path: Path) -> None:
        alone, told = fw.pack(made.home / "better", tmp_path / "alone.fw"), made.told["update"]
        assert told["alone_bytes"] == alone["bytes"]
        assert told["bytes"] < 0.75 * alone["bytes"]

    def test_is_the_same_artifact(self, made: Made, tmp_path: Path) -> None:
        fw.unpack(made.update, tmp_path / "un", base=made.signed)
        assert (tmp_path / "un" / "model.onnx").read_bytes() == (
            made.home / "better" / "model.onnx"
        ).read_bytes()
        assert fw.verify(made.update, key=made.home / "key.pub", base=made.signed)["vouched"]
        (seen,) = fw.load(made.update, base=made.signed)(INPUTS[:1])
        (old,) = fw.load(made.signed)(INPUTS[:1])
        assert not np.array_equal(seen, old)

    def test_needs_its_base_and_no_other(self, made: Made, tmp_path: Path) -> None:
        file = made.update
        for call in (fw.verify, fw.load, lambda file: fw.unpack(file, tmp_path / "un")):
            with pytest.raises(BundleError) as caught:
                call(file)
            assert isinstance(caught.value.__cause__, featherweight_loader.MissingBase)
        with pytest.raises(BundleError, match="was made from"):
            fw.verify(file, base=made.unsigned)
        assert not (tmp_path / "un").exists()


class TestUnpack:
    def test_gives_every_file_back(self, made: Made, tmp_path: Path) -> None:
        told = fw.unpack(made.signed, tmp_path / "un")
        left = {path.name for path in made.fitted.iterdir()} - {"report.html"}
        assert set(told["files"]) == {path.name for path in (tmp_path / "un").iterdir()} == left
        for name in left:
            assert (tmp_path / "un" / name).read_bytes() == (made.fitted / name).read_bytes()

    def test_can_be_packed_and_reported_again(self, made: Made, tmp_path: Path) -> None:
        from featherweight import api

        fw.unpack(made.signed, tmp_path / "un")
        fw.pack(tmp_path / "un", tmp_path / "a.fw")
        assert (
            featherweight_loader.read(tmp_path / "a.fw").identity
            == featherweight_loader.read(made.signed).identity
        )
        assert api.report(tmp_path / "un")["met"] is True

    def test_writes_over_what_it_wrote_with_force_alone(self, made: Made, tmp_path: Path) -> None:
        for file, name in ((made.signed, "one"), (made.both, "two")):
            fw.unpack(file, tmp_path / name)
            with pytest.raises(OutputError):
                fw.unpack(file, tmp_path / name)
            fw.unpack(file, tmp_path / name, force=True)
            (tmp_path / name / "artifact.json").unlink(missing_ok=True)
            (tmp_path / name / "result.json").unlink(missing_ok=True)
            (tmp_path / name / "thesis.tex").write_text("years of work")
            with pytest.raises(OutputError, match="did not write"):
                fw.unpack(file, tmp_path / name, force=True)
            assert (tmp_path / name / "thesis.tex").read_text() == "years of work"


class TestLoad:
    def test_answers_as_the_artifact_does(self, made: Made) -> None:
        import onnxruntime

        session = onnxruntime.InferenceSession(made.fitted / "model.onnx", providers=["CPUExecutionProvider"])
        (wanted,) = session.run(None, {session.get_inputs()[0].name: INPUTS[:1]})
        (seen,) = fw.load(made.signed)(INPUTS[:1])
        assert np.array_equal(seen, wanted)

    def test_errors_are_ours(self, made: Made, tmp_path: Path) -> None:
        with pytest.raises(BundleError) as caught:
            fw.load(made.signed, runtime="openvino")
        assert isinstance(caught.value.__cause__, featherweight_loader.MissingPart)
        for call in (fw.load, fw.verify):
            with pytest.raises(BundleError, match="does not exist"):
                call(tmp_path / "nothing.fw")

    def test_opens_what_the_toolkit_alone_can(self, made: Made, tmp_path: Path) -> None:
        net = f"{made.home / 'private_net.py'}:net"
        fw.lower(net, inputs=["3x8x8"], out=tmp_path / "lowered", runtime="torch")
        fw.pack(tmp_path / "lowered", tmp_path / "a.fw")
        fw.verify(tmp_path / "a.fw")
        session = fw.load(tmp_path / "a.fw")
        (seen,) = session(INPUTS[:1])
        (wanted,) = fw.load(made.signed)(INPUTS[:1])
        assert np.abs(seen - wanted).max() < 0.1 * np.abs(wanted).max()

    def test_nothing_here_imports_torch(self, made: Made, tmp_path: Path) -> None:
        code = (
            "import sys\n"
            "import featherweight as fw\n"
            f"fw.pack({str(made.fitted)!r}, {str(tmp_path / 'a.fw')!r})\n"
            f"fw.load({str(made.signed)!r})\n"
            f"fw.unpack({str(made.signed)!r}, {str(tmp_path / 'un')!r})\n"
            f"fw.verify({str(made.signed)!r}, key={str(made.home / 'key.pub')!r})\n"
            "heavy = {'torch', 'onnx', 'optuna', 'altair'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class TestVerify:
    def test_of_what_was_signed(self, made: Made) -> None:
        told = fw.verify(made.signed, key=made.home / "key.pub")
        assert told["vouched"] is True
        assert "signed as 'model.fw' with key " in told["signature"]
        seen = told["artifacts"]["onnxruntime"]
        assert seen["measured"] is True
        assert seen["parity"] == "the same bits as when it was packed, on such a machine"

    def test_without_a_key_nobody_vouches(self, made: Made) -> None:
        told = fw.verify(made.signed)
        assert told["vouched"] is False
        assert "nobody vouches" in told["signature"]
        assert fw.verify(made.unsigned)["signature"] == "not signed: nobody vouches for it"

    def test_a_key_and_no_signature(self, made: Made) -> None:
        with pytest.raises(BundleError, match="is not signed"):
            fw.verify(made.unsigned, key=made.home / "key.pub")

    def test_another_key(self, made: Made) -> None:
        with pytest.raises(BundleError, match="signed with another key"):
            fw.verify(made.signed, key=made.home / "other.pub")

    def test_the_signature_of_another_bundle(self, made: Made, tmp_path: Path) -> None:
        signature = featherweight_loader.read(made.signed).signature
        (tmp_path / "a.fw").write_bytes(made.unsigned.read_bytes() + signature)
        for key in (None, made.home / "key.pub"):
            with pytest.raises(BundleError, match="that of another bundle"):
                fw.verify(tmp_path / "a.fw", key=key)

    def test_flipped_bytes_are_found_wherever_they_are(self, made: Made, tmp_path: Path) -> None:
        """The header byte by byte, every section's ends, and a sample of all; the slow one takes 2,000."""
        bundle = featherweight_loader.read(made.signed)
        size = made.signed.stat().st_size
        body = size - len(bundle.signature) - sum(section.packed for section in bundle.sections)
        places = {*range(64), body - 1, body, size - len(bundle.signature) - 1, size - 1}
        for section in bundle.sections:
            body += section.packed
            places |= {body - section.packed, body - section.packed // 2, body - 1}
        places |= {int(place) for place in np.random.default_rng(0).integers(0, size, 60)}
        places |= set(range(size - len(bundle.signature), size, 16))
        for place in sorted(places):
            with pytest.raises(BundleError):
                fw.verify(flipped(made.signed, place, tmp_path / "a.fw"), key=made.home / "key.pub")

    @pytest.mark.parametrize("size", [0, 7, 63, 64, 100, -1, -700, -2000])
    def test_what_is_torn_is_found(self, made: Made, tmp_path: Path, size: int) -> None:
        (tmp_path / "a.fw").write_bytes(made.signed.read_bytes()[:size])
        with pytest.raises(BundleError):
            fw.verify(tmp_path / "a.fw", key=made.home / "key.pub")

    @pytest.mark.parametrize(
        ("name", "old", "new", "says"),
        [
            ("result.json", b'"sha256": "', b'"sha256": "f', "figures of"),
            ("recipe.yaml", b"fold", b"cast", "is not the recipe"),
            ("recipe.yaml", b"steps:", b"steps: [", "is damaged"),
            ("result.json", b'"schema": 1', b'"schema": 9', "is damaged"),
            ("artifact.json", b'"sha256": "', b'"sha256": "f', "that artifact.json tells of"),
            ("artifact.json", b'"model.onnx"', b'"other.onnx"', "lacks 'other.onnx'"),
            ("artifact.json", b"{", b"[", "is damaged"),
            ("probe/onnxruntime.json", b'"seed": 1', b'"seed": 9', "does not answer its probe"),
            ("probe/onnxruntime.json", b'"splitmix64"', b'"other"', "cannot be read"),
        ],
    )  # fmt: skip
    def test_a_bundle_that_contradicts_itself(
        self, made: Made, tmp_path: Path, name: str, old: bytes, new: bytes, says: str
    ) -> None:
        """Whole and signed, but not what its documents tell of."""

        def change(files: dict[str, bytes]) -> None:
            assert old in files[name]
            files[name] = files[name].replace(old, new)

        liar = again(made.signed, tmp_path / "a.fw", change, made.home / "key.pem")
        with pytest.raises(BundleError, match=re.escape(says)):
            fw.verify(liar, key=made.home / "key.pub")

    def test_another_network_under_the_same_documents(self, made: Made, tmp_path: Path) -> None:
        other = (made.home / "better" / "model.onnx").read_bytes()

        def swap(files: dict[str, bytes]) -> None:
            files["model.onnx"] = other

        def swap_unmeasured(files: dict[str, bytes]) -> None:
            files["model.onnx"] = other
            del files["result.json"]
            about = json.loads(files["artifact.json"])
            del about["sha256"]
            files["artifact.json"] = json.dumps(about).encode()

        with pytest.raises(BundleError, match="is not the artifact"):
            fw.verify(again(made.signed, tmp_path / "a.fw", swap))
        with pytest.raises(BundleError, match="does not answer its probe as it did"):
            fw.verify(again(made.signed, tmp_path / "b.fw", swap_unmeasured))

    def test_an_artifact_that_its_runtime_cannot_open(self, made: Made, tmp_path: Path) -> None:
        def tear(files: dict[str, bytes]) -> None:
            files["model.onnx"] = files["model.onnx"][:1000]
            del files["result.json"]
            about = json.loads(files["artifact.json"])
            del about["sha256"]
            files["artifact.json"] = json.dumps(about).encode()

        with pytest.raises(BundleError, match="onnxruntime cannot run the artifact"):
            fw.verify(again(made.signed, tmp_path / "a.fw", tear))

    def test_options_of_a_stranger_are_not_taken(self, made: Made, tmp_path: Path) -> None:
        """ONNX Runtime would write a file of this name."""

        def write(files: dict[str, bytes]) -> None:
            about = json.loads(files["artifact.json"])
            about["target"]["options"] = {"optimized_model_filepath": str(tmp_path / "written")}
            files["artifact.json"] = json.dumps(about).encode()

        liar = again(made.signed, tmp_path / "a.fw", write)
        fw.verify(liar)
        with pytest.raises(BundleError, match="optimized_model_filepath"):
            fw.load(liar)(INPUTS[:1])
        assert not (tmp_path / "written").exists()

    def test_what_torch_would_unpickle_is_not_opened(self, made: Made, tmp_path: Path) -> None:
        import io
        import pickle
        import zipfile

        class Writes:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "written",)

        def pickled() -> bytes:
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                archive.writestr("a/models/model.json", "{}")
                archive.writestr("a/data/sample_inputs/model.pt", pickle.dumps(Writes()))
            return out.getvalue()

        def swap(files: dict[str, bytes]) -> None:
            about = json.loads(files["artifact.json"]) | {"runtime": "torch"}
            about["target"]["runtime"] = "torch"
            del about["sha256"], files["result.json"]
            files["artifact.json"] = json.dumps(about).encode()
            files["model.onnx"] = pickled()
            probe = files.pop("probe/onnxruntime.json")
            files["probe/torch.json"] = probe.replace(b'"onnxruntime"', b'"torch"')

        liar = again(made.signed, tmp_path / "a.fw", swap)
        for call in (fw.verify, fw.load):
            with pytest.raises(BundleError, match="the artifact is not opened"):
                call(liar)
        assert not (tmp_path / "written").exists()

    def test_a_crash_is_an_error(self, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from featherweight.engine import jobs

        runner = tmp_path / "runner.py"
        runner.write_text("import os\nos.abort()\n")
        monkeypatch.setattr(jobs.devices, "_RUNNER", runner)
        with pytest.raises(BundleError, match="cannot run the artifact"):
            fw.verify(made.signed, key=made.home / "key.pub")

    def test_another_machine_is_asked_for_less(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        from featherweight.api import probing

        monkeypatch.setattr(probing, "_kind", lambda runtime: {"cpu": "another"})
        told = fw.verify(made.signed, key=made.home / "key.pub")
        assert told["artifacts"]["onnxruntime"]["parity"].endswith("on another machine")

    def test_a_runtime_that_is_missing_is_told(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        told = fw.verify(made.signed, key=made.home / "key.pub")
        assert told["artifacts"]["onnxruntime"]["parity"] == "not asked: onnxruntime is not installed"


class TestPrivacy:
    """No user data ever enters a bundle: neither an example, nor a label's place, nor a path."""

    @pytest.fixture
    def files(self, made: Made) -> dict[str, bytes]:
        """Every file of a bundle of everything, decoded; and the bundle itself."""
        bundle = featherweight_loader.read(made.both)
        return {path: bundle.data(path) for path in bundle.files} | {"": made.both.read_bytes()}

    def test_no_two_neighbours_of_an_example_are_in_it(self, files: dict[str, bytes]) -> None:
        for dtype in (np.float32, np.float64, np.float16):
            flat = INPUTS.reshape(-1).astype(dtype)
            width = 2 * flat.itemsize
            raw = flat.tobytes()
            pairs = {raw[at : at + width] for at in range(0, len(raw) - width, flat.itemsize)}
            found = {path for path, data in files.items() if any_of(pairs, data, width)}
            assert dtype is np.float16 or not found  # pairs of half floats are four bytes: too few to tell

    def test_nor_is_one_in_words(self, files: dict[str, bytes]) -> None:
        texts = {f"{value:.6g}".encode().lstrip(b"-") for value in INPUTS.reshape(-1)}
        texts = {text for text in texts if len(text) >= 8}
        for path, data in files.items():
            words = set(re.findall(rb"\d+\.\d+", data))
            assert not texts & {word[:8] for word in words} | texts & words, path

    def test_nor_is_a_path_or_a_name(self, made: Made, files: dict[str, bytes]) -> None:
        private = [str(made.home), "secret-home", "private_net", str(Path.home())]
        private += [str(Path(fw.__file__).parent), str(Path.cwd()), "key.pem"]
        host = rb"(?<!\w)" + re.escape(socket.gethostname().encode()) + rb"(?!\w)"
        for path, data in files.items():
            for name in private:
                assert name.encode() not in data, (path, name)
            if path:
                assert not re.search(host, data), path
                # result.json names the file of the examples, as the report does; nothing else does
                assert (b"private_data" in data) == path.endswith("result.json")
                assert not re.search(rb"(?<![\w:/.])/(?:home|root|tmp|usr|work|Users)/\w", data), path

    def test_the_search_finds_what_is_there(self, files: dict[str, bytes]) -> None:
        raw = INPUTS[3].tobytes()
        assert any_of({raw[40:48]}, files["onnxruntime/model.onnx"] + raw, 8)

    def test_probes_are_the_same_whatever_the_examples_were(
        self, made: Made, files: dict[str, bytes], tmp_path: Path
    ) -> None:
        from featherweight.bundles.probes import Probe, made_up

        probe = Probe.parse(files["probe/onnxruntime.json"])
        for call in probe.calls:
            for one, array in zip(call.signature.inputs, made_up(call.signature, call.seed), strict=True):
                assert array.shape == one[2]
        assert set(json.loads(files["probe/onnxruntime.json"])) == {
            *("version", "runtime", "machine", "threads", "exact", "decibels", "generator", "calls")
        }


def any_of(wanted: set[bytes], data: bytes, width: int) -> bool:
    return any(data[at : at + width] in wanted for at in range(len(data) - width + 1))


class TestCommands:
    @pytest.fixture(autouse=True)
    def _here(self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("fitted", "lowered", "better", "key.pem", "key.pub", "other.pub"):
            (tmp_path / name).symlink_to(made.home / name)
        shutil.copy(made.signed, tmp_path / "model.fw")
        monkeypatch.chdir(tmp_path)

    def test_pack_shows_what_it_measured(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("pack fitted a.fw --sign key.pem") == 0
        said = capsys.readouterr().out
        assert said.split("\n")[0].split() == ["file", "bytes", "packed", "coded", "entropy", "share"]
        assert re.search(r"^model\.onnx +[\d,]+ +[\d,]+ +[\d,]+ +[\d,]+ +[\d.]+%", said, re.MULTILINE)
        assert re.search(r"^a\.fw: [\d,]+ bytes, [\d.]+% of [\d,]+$", said, re.MULTILINE)
        assert re.search(r"^Identity: [0-9a-f]{64}$", said, re.MULTILINE)
        assert re.search(r"^Signed with key [0-9a-f]{64}$", said, re.MULTILINE)

    def test_pack_of_an_update_shows_what_it_saves(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("pack better update.fw --base model.fw") == 0
        said = capsys.readouterr().out
        assert re.search(r"^An update for model\.fw: [\d.]+% of the [\d,]+ bytes", said, re.MULTILINE)
        assert "Not signed" in said
        assert run("unpack update.fw un --base model.fw --quiet") == 0
        assert Path("un/model.onnx").read_bytes() == Path("better/model.onnx").read_bytes()
        assert run("verify update.fw --base model.fw --quiet") == 0

    def test_verify_in_words_and_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("verify model.fw --key key.pub") == 0
        said = capsys.readouterr().out
        assert said.rstrip().endswith("Right")
        assert "Artifact for onnxruntime: what was measured" in said
        assert run("verify model.fw") == 0
        assert "nobody vouches for it" in capsys.readouterr().out
        assert run("verify model.fw --key key.pub --json") == 0
        assert json.loads(capsys.readouterr().out)["vouched"] is True
        assert run("verify model.fw --key other.pub --json") == 2
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "BundleError"

    def test_quiet_is_silent(self, capsys: pytest.CaptureFixture[str]) -> None:
        for command in ("pack fitted lowered a.fw", "unpack a.fw un", "verify a.fw"):
            assert run(f"{command} --quiet") == 0
        assert capsys.readouterr() == ("", "")

    def test_json_is_one_object(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("pack fitted a.fw --json") == 0
        told = json.loads(capsys.readouterr().out)
        assert told["bytes"] == Path("a.fw").stat().st_size
        assert run("unpack a.fw un --json") == 0
        assert json.loads(capsys.readouterr().out)["identity"] == told["identity"]


def run(command: str) -> int:
    return main(shlex.split(command))
