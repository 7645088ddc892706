"""The loader's sessions against the toolkit's: the same bits, from the same artifact out of a bundle."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import featherweight_loader as loader
from conftest import Lowered
from featherweight.engine.delivered import described
from featherweight.plugins import find_runtime
from featherweight.runtime import Artifact
from featherweight_loader import BundleError, DamagedBundle, MissingPart
from golden import inputs, target
from handmade import DOCUMENT, PREFIXED, ZSTD, Bundle

RUNTIMES = ("onnxruntime", "openvino", "litert", "executorch", "mnn", "ncnn")


def add(bundle: Bundle, artifact: Artifact, *, folder: str = "", **options: Any) -> None:
    """Put an artifact and its description into a bundle."""
    for name in artifact.files:
        bundle.plain(folder + name, (artifact.folder / name).read_bytes())
    told = described(artifact, find_runtime(artifact.runtime), target(artifact.runtime, options=options))
    bundle.plain(folder + "artifact.json", json.dumps(told).encode(), DOCUMENT)


def bundled(artifact: Artifact, **options: Any) -> bytes:
    """A bundle of one artifact."""
    bundle = Bundle()
    add(bundle, artifact, **options)
    return bundle.bytes(ZSTD)


def told(about: Mapping[str, Any] | bytes, files: Mapping[str, bytes] | None = None) -> bytes:
    """A bundle with this description."""
    bundle = Bundle()
    for path, data in (files or {}).items():
        bundle.plain(path, data)
    data = about if isinstance(about, bytes) else json.dumps(about).encode()
    bundle.plain("artifact.json", data, DOCUMENT)
    return bundle.bytes()


ABOUT = {
    "runtime": "onnxruntime",
    "files": ["model.onnx"],
    "entries": {"forward": "model.onnx"},
    "details": {},
    "target": {"options": {}},
}


@pytest.mark.parametrize("runtime", RUNTIMES)
class TestEveryRuntime:
    @pytest.mark.parametrize("kind", ["float", "int8"])
    @pytest.mark.parametrize("net", ["residual", "depthwise"])
    def test_the_same_bits(self, runtime: str, net: str, kind: str, lowered: Lowered) -> None:
        artifact = lowered(runtime, net, kind)
        ours = find_runtime(runtime).open(artifact, target(runtime))
        session = loader.load(bundled(artifact))
        assert session.runtime == runtime
        assert session.entries == ("forward",)
        for count in (3, 1, 5):
            x = inputs(net, count, seed=7)
            for found, wanted in zip(session(x), ours(x), strict=True):
                assert found.dtype == wanted.dtype
                assert found.tobytes() == wanted.tobytes()

    def test_what_is_in_no_bundle_stays_outside(self, runtime: str, lowered: Lowered) -> None:
        about = {
            **described(lowered(runtime, "residual", "float"), find_runtime(runtime), target(runtime)),
            "files": ["model"],
            "entries": {"forward": "../model"},
        }
        with pytest.raises(BundleError, match="lacks"):
            loader.load(told(about, {"model": b"x"}))

    def test_a_file_that_is_none(self, runtime: str) -> None:
        about = {
            "runtime": runtime,
            "files": ["model.param", "model.bin"],
            "entries": {"forward": "model.param"},
            "details": {
                "entries": {"forward": {"batched": [0], "batches": True, "outputs": [["y", "float32"]]}},
                "batched": {"forward": {"inputs": [True], "outputs": [True]}},
                "signatures": {"forward": {"inputs": ["x"], "outputs": [["y", "float32"]]}},
                "half": {"w": False},
            },
        }
        files = {"model.param": b"no model at all", "model.bin": b""}
        with pytest.raises(BundleError):
            loader.load(told(about, files))

    def test_an_option_that_names_a_file(self, runtime: str, tmp_path: Path, lowered: Lowered) -> None:
        """What a description asks for is never a place to write to."""
        place = tmp_path / "written"
        for option in ("optimized_model_filepath", "CACHE_DIR", "profile_file_prefix"):
            artifact = lowered(runtime, "residual", "float")
            with pytest.raises(BundleError, match="does not set"):
                loader.load(bundled(artifact, **{option: os.fspath(place)}))
        assert not place.exists()


class TestOptions:
    @pytest.mark.parametrize(
        ("runtime", "options"),
        [
            ("onnxruntime", {"graph_optimization_level": "ORT_ENABLE_BASIC", "enable_mem_pattern": False}),
            ("openvino", {"INFERENCE_NUM_THREADS": 1}),
            ("litert", {"threads": 1, "resolver": "BUILTIN_REF"}),
            ("executorch", {"threads": 1}),
            ("mnn", {"winograd": 0, "precision": "normal"}),
            ("ncnn", {"use_winograd_convolution": False}),
        ],
    )
    def test_the_targets(self, runtime: str, options: Mapping[str, Any], lowered: Lowered) -> None:
        artifact = lowered(runtime, "residual", "int8")
        ours = find_runtime(runtime).open(artifact, target(runtime, options=options))
        x = inputs("residual", 2)
        (found,), (wanted,) = loader.load(bundled(artifact, **options))(x), ours(x)
        assert found.tobytes() == wanted.tobytes()

    def test_no_more_threads_than_the_caller_gives(self, lowered: Lowered) -> None:
        artifact = lowered("onnxruntime", "residual", "float")
        session = loader.load(bundled(artifact, intra_op_num_threads=10**9), threads=1)
        assert session(inputs("residual", 1))[0].shape[0] == 1


class TestSeveral:
    def test_artifacts_of_two_runtimes(self, lowered: Lowered) -> None:
        bundle = Bundle()
        for runtime in ("litert", "onnxruntime"):
            add(bundle, lowered(runtime, "residual", "float"), folder=f"{runtime}/")
        data = bundle.bytes()
        assert loader.load(data).runtime == "litert"
        for runtime in ("litert", "onnxruntime"):
            assert loader.load(data, runtime=runtime).runtime == runtime
        with pytest.raises(MissingPart, match="openvino") as error:
            loader.load(data, runtime="openvino")
        assert "litert, onnxruntime" in str(error.value)

    def test_a_runtime_that_is_not_installed(self, lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
        bundle = Bundle()
        for runtime in ("litert", "onnxruntime"):
            add(bundle, lowered(runtime, "residual", "float"), folder=f"{runtime}/")
        monkeypatch.setattr("featherweight_loader.sessions._installed", lambda name: name == "onnxruntime")
        assert loader.load(bundle.bytes()).runtime == "onnxruntime"
        with pytest.raises(MissingPart, match="not installed") as error:
            loader.load(bundle.bytes(), runtime="litert")
        assert error.value.fix == "pip install ai-edge-litert"

    def test_entries(self, lowered: Lowered) -> None:
        artifact = lowered("onnxruntime", "residual", "float")
        both = replace(artifact, entries={"encode": "model.onnx", "decode": "model.onnx"})
        session = loader.load(bundled(both))
        x = inputs("residual", 2)
        assert session.entries == ("encode", "decode")
        assert session(x, entry="encode")[0].tobytes() == session(x, entry="decode")[0].tobytes()
        with pytest.raises(MissingPart, match="no entry 'forward'") as error:
            session(x)
        assert error.value.fix == "take one of encode, decode"

    def test_weights_beside_the_graph(self, tmp_path: Path, lowered: Lowered) -> None:
        import onnx_ir as ir

        artifact = lowered("onnxruntime", "residual", "float")
        model = ir.load(artifact.folder / "model.onnx")
        ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
        apart = replace(artifact, folder=tmp_path, files=("model.onnx", "model.onnx.data"))
        x = inputs("residual", 2)
        (found,) = loader.load(bundled(apart))(x)
        assert found.tobytes() == find_runtime("onnxruntime").open(artifact, target())(x)[0].tobytes()


def test_an_update(lowered: Lowered) -> None:
    """The artifact is the old one's bytes, behind which it was packed; an opened bundle does as well."""
    artifact = lowered("onnxruntime", "residual", "int8")
    old, model = bundled(artifact), (artifact.folder / "model.onnx").read_bytes()
    bundle = Bundle(base=bytes.fromhex(loader.read(old).identity))
    bundle.file("model.onnx", model, rest=bundle.section(model, PREFIXED, model))
    bundle.plain("artifact.json", loader.read(old).data("artifact.json"), DOCUMENT)
    x = inputs("residual", 2)
    wanted = loader.load(old)(x)[0].tobytes()
    assert loader.load(bundle.bytes(), base=old)(x)[0].tobytes() == wanted
    assert loader.load(loader.read(bundle.bytes(), base=old))(x)[0].tobytes() == wanted
    with pytest.raises(loader.MissingBase):
        loader.load(bundle.bytes())


@pytest.mark.parametrize("runtime", ["onnxruntime-web", "coreml", "tensorrt", "torch", "other"])
def test_what_it_does_not_open(runtime: str) -> None:
    with pytest.raises(MissingPart, match=f"opens no artifacts of '{runtime}'") as error:
        loader.load(told({**ABOUT, "runtime": runtime}, {"model.onnx": b"x"}))
    assert error.value.fix


def test_temporary_files_go_with_the_session(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
    session = loader.load(bundled(lowered("ncnn", "residual", "float")))
    (folder,) = tmp_path.glob("featherweight-*")
    assert folder.stat().st_mode & 0o077 == 0
    session(inputs("residual", 1))
    del session
    gc.collect()
    assert not list(tmp_path.glob("featherweight-*"))


@pytest.mark.parametrize(
    "about",
    [
        b"no json",
        b"[" * 100_000,
        b"\xff\xfe",
        b"[]",
        b"null",
        {},
        {**ABOUT, "files": []},
        {**ABOUT, "entries": {}},
        {**ABOUT, "entries": {"forward": 3}},
        {**ABOUT, "entries": {"forward": "artifact.json"}},
        {**ABOUT, "runtime": 3},
        {**ABOUT, "details": 3},
        {**ABOUT, "target": "here"},
        {**ABOUT, "runtime": "litert"},
        {**ABOUT, "runtime": "mnn"},
    ],
    ids=str,
)
def test_damaged_descriptions(about: Mapping[str, Any] | bytes) -> None:
    with pytest.raises(BundleError):
        loader.load(told(about, {"model.onnx": b"x"}))


def test_a_bundle_of_documents() -> None:
    bundle = Bundle()
    bundle.plain("model_card.md", b"# A model", DOCUMENT)
    with pytest.raises(MissingPart, match="no artifact"):
        loader.load(bundle.bytes())


def test_inputs_that_do_not_fit(lowered: Lowered) -> None:
    for runtime in RUNTIMES:
        session = loader.load(bundled(lowered(runtime, "residual", "float")))
        x = inputs("residual", 1)
        with pytest.raises((ValueError, BundleError)):
            session(x, x)


def test_damage_is_found_before_a_runtime_sees_it(lowered: Lowered) -> None:
    data = bytearray(bundled(lowered("onnxruntime", "residual", "float")))
    data[-2000] ^= 1
    with pytest.raises(DamagedBundle, match="digest"):
        loader.load(bytes(data))
