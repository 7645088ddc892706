"""What bundles promise of artifacts: the same bytes again, and fewer than other packers make."""

from __future__ import annotations

import io
import lzma

import pytest
import zstandard

import featherweight_loader
from conftest import Lowered
from featherweight.bundles.write import Member, write_bundle
from featherweight.methods.sparsify import Sparsify
from featherweight.plugins import find_runtime, runtime_names
from golden import context, data, folded, target
from nets import NETS

HEAD = 400  # bytes of a bundle that no packer of a single file has: digests, names, places
FILE = 100  # of each further file
SPARSE = "linear3d"


def _members(runtime: str, folder_files: list[tuple[str, bytes]]) -> list[Member]:
    return [Member(path, content, runtime=runtime) for path, content in folder_files]


@pytest.fixture(params=runtime_names())
def runtime(request: pytest.FixtureRequest) -> str:
    found = find_runtime(str(request.param))
    if not found.installed():
        pytest.skip(f"runtime '{found.name}' is not installed")
    return found.name


def _check(runtime: str, files: list[tuple[str, bytes]]) -> None:
    out = io.BytesIO()
    packed = write_bundle(out, _members(runtime, files))
    bundle = featherweight_loader.read(out.getvalue())
    for path, content in files:
        assert bundle.data(path) == content
    together = b"".join(content for _, content in files)
    smallest = min(
        len(lzma.compress(together, preset=9)), len(zstandard.ZstdCompressor(19).compress(together))
    )
    assert packed.bytes <= smallest + HEAD + FILE * len(files)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("net", ["residual", "attention"])
def test_artifacts_come_back(runtime: str, net: str, kind: str, lowered: Lowered) -> None:
    artifact = lowered(runtime, net, kind)
    _check(runtime, [(name, (artifact.folder / name).read_bytes()) for name in artifact.files])


def test_sparse_artifacts_come_back(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert SPARSE in NETS
    net, where = folded(SPARSE), target(runtime)
    sparse = Sparsify(sparsity=0.8).apply(net, context(net, data(SPARSE), where))
    folder = tmp_path_factory.mktemp("sparse")
    artifact = find_runtime(runtime).lower(sparse, where, folder)
    _check(runtime, [(name, (folder / name).read_bytes()) for name in artifact.files])
