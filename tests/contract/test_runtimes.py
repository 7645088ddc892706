"""What every runtime promises, whoever wrote it; runs over each one that is found."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Lowered
from featherweight.data import Data
from featherweight.engine.jobs import Served
from featherweight.engine.packing import packed
from featherweight.errors import MissingRuntime, TargetError
from featherweight.formats import IntQuant, PerChannel, PerTensor
from featherweight.graph import trace
from featherweight.methods.quantize import Quantize
from featherweight.model import Model
from featherweight.plugins import find_runtime, runtime_names
from featherweight.runtime import Artifact, Runtime
from featherweight.tools.simulate import simulate
from golden import context, decibels, inputs, model, model_of, quantized, target
from nets import NETS

ROOT = Path(__file__).parents[2]
SIMULATED = {"torch"}  # stores float32 and computes what the formats would do: its own docstring says so


MEASURED = [name for name in runtime_names() if not find_runtime(name).unmeasured]
PIP = [name for name in runtime_names() if find_runtime(name).packages]  # the one for browsers is npm's
# Nets that a runtime cannot take, and the words that it has for it.
UNABLE: dict[tuple[str, str], str] = {}


def _installed(name: str) -> Runtime:
    found = find_runtime(name)
    if not found.installed():
        pytest.skip(f"runtime '{found.name}' is not installed")
    return found


@pytest.fixture(params=MEASURED)
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """One that opens what it writes."""
    return _installed(str(request.param))


@pytest.fixture(params=runtime_names())
def writer(request: pytest.FixtureRequest) -> Runtime:
    """One that writes files, whether or not they can be opened here."""
    return _installed(str(request.param))


class Every(nn.Module):
    """Each operator that methods ask about, between quantized neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.line = nn.Conv1d(8, 8, 3)
        self.fc3 = nn.Linear(14, 12)
        self.fc2 = nn.Linear(12, 6)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv(x))
        b = F.relu6(self.depthwise(F.max_pool2d(a, 2)))
        c = self.up(b) + a
        d = torch.cat([F.leaky_relu(c, 0.2), c * torch.sigmoid(c)], 1)
        e = self.line(F.avg_pool2d(d[:, :8], 2).flatten(2))
        f = self.fc3(e)
        g = torch.matmul(f, f.transpose(1, 2)).mean(1)
        h = F.adaptive_avg_pool2d(d, 1).flatten(1)[:, :4]
        return self.last(F.relu(self.fc2(torch.cat([g, h], 1))))


@cache
def every() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return model_of(Every(), torch.randn(24, 3, 8, 8))


@cache
def every_quantized(name: str) -> Model:
    """All operators, in the formats that the runtime says it supports."""
    examples = Data.of(x_train=every().entries["forward"].example_inputs[0].numpy())
    return Quantize().apply(every(), context(every(), examples, target(name)))


@pytest.fixture(scope="module")
def lowered_every(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    @cache
    def lower(name: str) -> Artifact:
        return find_runtime(name).lower(every_quantized(name), target(name), tmp_path_factory.mktemp(name))

    return lower


class TestParity:
    @pytest.mark.parametrize("net", NETS)
    def test_float_is_the_module(self, runtime: Runtime, net: str, lowered: Lowered) -> None:
        if (runtime.name, net) in UNABLE:
            with pytest.raises(TargetError, match=UNABLE[runtime.name, net]) as told:
                lowered(runtime.name, net, "float")
            assert told.value.fix
            return
        session = runtime.open(lowered(runtime.name, net, "float"), target(runtime.name))
        for batch in (1, 2, 5):
            x = inputs(net, batch)
            (seen,) = session(x)
            with torch.no_grad():
                wanted = model(net).module(torch.from_numpy(x)).numpy()
            assert seen.dtype == wanted.dtype
            np.testing.assert_allclose(seen, wanted, rtol=1e-4, atol=1e-5)

    def test_memory_order_does_not_matter(self, runtime: Runtime, lowered: Lowered) -> None:
        session = runtime.open(lowered(runtime.name, "residual", "float"), target(runtime.name))
        x = inputs("residual", 4)
        (one,) = session(x)
        (two,) = session(np.asfortranarray(x))
        np.testing.assert_array_equal(one, two)

    def test_inputs_are_not_written_to(self, runtime: Runtime, lowered: Lowered) -> None:
        session = runtime.open(lowered(runtime.name, "residual", "int8"), target(runtime.name))
        x = inputs("residual", 4).copy()
        x.flags.writeable = False
        (first,) = session(x)
        kept = first.copy()
        session(x * 2)
        np.testing.assert_array_equal(first, kept)  # nor is an answer that was already given

    def test_a_wrong_number_of_inputs_is_refused(self, runtime: Runtime, lowered: Lowered) -> None:
        session = runtime.open(lowered(runtime.name, "residual", "float"), target(runtime.name))
        x = inputs("residual", 1)
        with pytest.raises(Exception):  # noqa: B017 - each SDK has its own
            session(x, x)


class TestSupports:
    """What it says yes to is lowered and stored so; what it says no to stays float."""

    WEIGHT = IntQuant(-torch.ones(1), torch.ones(1), 8, True, PerChannel(0))
    ACTIVATION = IntQuant(torch.tensor(-1.0), torch.tensor(1.0), 8, False, PerTensor())

    def test_float_is_always_supported(self, writer: Runtime) -> None:
        for node in trace(every()):
            assert writer.supports(node.op, None, None, target(writer.name))

    def test_weights_are_stored_in_their_formats(
        self, writer: Runtime, lowered_every: Callable[[str], Artifact]
    ) -> None:
        where = target(writer.name)
        formats = every_quantized(writer.name).formats
        stored = writer.stored(lowered_every(writer.name))
        asked = 0
        for node in trace(every()):
            weight = node.parameters.get("weight")
            if weight is None:
                continue
            asked += 1
            pays = writer.integers_pay(node, trace(every()), where)
            wanted = writer.supports(node.op, self.WEIGHT, self.ACTIVATION if pays else None, where)
            assert (weight in formats) == wanted
            integers = weight in formats and writer.name not in SIMULATED
            assert re.match(r"u?int8$" if integers else "float", stored[weight].dtype), (
                weight,
                stored[weight],
            )
            size = every().parameters[weight].numel()
            assert stored[weight].bytes == (size if integers else 4 * size)
        assert asked == 7

    def test_the_artifact_does_what_the_formats_say(
        self, runtime: Runtime, lowered_every: Callable[[str], Artifact]
    ) -> None:
        x = every().entries["forward"].example_inputs[0]
        (seen,) = runtime.open(lowered_every(runtime.name), target(runtime.name))(x.numpy())
        with torch.no_grad():
            (wanted,) = simulate(every_quantized(runtime.name))(x)
            exact = every().module(x)
        assert decibels(wanted, seen) >= 30
        assert decibels(exact, seen) < 60  # it is no float model that was handed back

    def test_unused_bits_change_the_levels_and_nothing_else(
        self, runtime: Runtime, lowered_every: Callable[[str], Artifact], tmp_path: Path
    ) -> None:
        where = target(runtime.name)
        x = every().entries["forward"].example_inputs[0]
        narrow = Quantize(headroom=4).apply(every(), context(every(), Data.of(x_train=x.numpy()), where))
        whole = every_quantized(runtime.name).formats
        weights = [fmt for name in narrow.parameters for fmt in narrow.formats.get(name, ())]
        grids = [fmt for fmt in weights if isinstance(fmt, IntQuant)]
        assert set(narrow.formats) == set(whole)
        assert grids
        assert all(fmt.quant_max - fmt.quant_min < 16 and fmt.width == 8 for fmt in grids)
        artifact, before = runtime.lower(narrow, where, tmp_path), lowered_every(runtime.name)
        (seen,) = runtime.open(artifact, where)(x.numpy())
        with torch.no_grad():
            (wanted,) = simulate(narrow)(x)
            exact = every().module(x)
        assert decibels(wanted, seen) >= 25
        assert decibels(exact, seen) < 40
        stored, held = runtime.stored(artifact), runtime.stored(before)
        assert {name: (one.dtype, one.bytes) for name, one in stored.items()} == {
            name: (one.dtype, one.bytes) for name, one in held.items()
        }
        if runtime.name not in SIMULATED:
            assert packed(artifact) < packed(before)

    def test_unused_bits_of_weights_alone(self, runtime: Runtime, tmp_path: Path) -> None:
        where = target(runtime.name)
        x = every().entries["forward"].example_inputs[0]
        examples = Data.of(x_train=x.numpy())
        artifacts = []
        for unused in (0, 4):
            asked = Quantize(activations="none", headroom=unused)
            done = asked.apply(every(), context(every(), examples, where))
            folder = tmp_path / str(unused)
            folder.mkdir()
            artifacts.append(runtime.lower(done, where, folder))
            (seen,) = runtime.open(artifacts[-1], where)(x.numpy())
            with torch.no_grad():
                (wanted,) = simulate(done)(x)
            assert decibels(wanted, seen) >= 30
        if runtime.name not in SIMULATED:
            assert packed(artifacts[1]) < packed(artifacts[0])

    @pytest.mark.parametrize("role", ["weight", "activation"])
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("per_channel", [True, False])
    @pytest.mark.parametrize("width", [4, 8, 16])
    def test_realise_gives_a_grid_that_stays_or_says_why_not(
        self, writer: Runtime, role: str, symmetric: bool, per_channel: bool, width: int
    ) -> None:
        shape = (3,) if per_channel else ()
        granularity = PerChannel(0) if per_channel else PerTensor()
        fmt = IntQuant(-torch.ones(shape), 2 * torch.ones(shape), width, symmetric, granularity)
        where = target(writer.name)
        try:
            grid = writer.realise(fmt, where, role)  # type: ignore[arg-type]
        except TargetError as error:
            assert error.fix is not None
            assert writer.name in error.what
            return
        again = writer.realise(grid, where, role)  # type: ignore[arg-type]
        assert isinstance(grid, IntQuant)
        assert isinstance(again, IntQuant)
        x = torch.linspace(-1, 2, 30).reshape(3, 10)
        assert torch.equal(grid.project(x), again.project(x))
        assert (grid.low.tolist(), grid.high.tolist()) == (fmt.low.tolist(), fmt.high.tolist())


class TestArtifact:
    def test_lists_its_files(self, writer: Runtime, lowered: Lowered) -> None:
        artifact = lowered(writer.name, "residual", "int8")
        assert artifact.runtime == writer.name
        there = {
            str(path.relative_to(artifact.folder)) for path in artifact.folder.rglob("*") if path.is_file()
        }
        assert set(artifact.files) == there
        assert set(artifact.entries) == {"forward"}
        assert set(artifact.entries.values()) <= set(artifact.files)
        assert artifact.bytes == sum((artifact.folder / file).stat().st_size for file in artifact.files)

    def test_survives_json_in_another_folder(
        self, runtime: Runtime, lowered: Lowered, tmp_path: Path
    ) -> None:
        artifact = lowered(runtime.name, "linear3d", "int8")
        for file in artifact.files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes((artifact.folder / file).read_bytes())
        moved = Artifact.from_json(json.loads(json.dumps(artifact.to_json())), tmp_path)
        assert moved.sha256 == artifact.sha256
        x = inputs("linear3d", 2)
        (one,), (two,) = (runtime.open(a, target(runtime.name))(x) for a in (artifact, moved))
        np.testing.assert_array_equal(one, two)

    def test_holds_every_parameter_under_its_name(self, writer: Runtime, lowered: Lowered) -> None:
        stored = writer.stored(lowered(writer.name, "residual", "int8"))
        assert {
            key for key in quantized("residual", writer.name).parameters if key.endswith("weight")
        } <= set(stored)
        assert all(tensor.bytes > 0 and tensor.name == name for name, tensor in stored.items())

    def test_lowering_leaves_the_model_alone(self, writer: Runtime, tmp_path: Path) -> None:
        net = quantized("linear3d", writer.name)
        own = net.evolve(module=net.copy_module())
        before = {name: tensor.clone() for name, tensor in own.module.state_dict().items()}
        formats = dict(own.formats)
        writer.lower(own, target(writer.name), tmp_path)
        after = own.module.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert own.formats == formats
        x = torch.from_numpy(inputs("linear3d", 2))
        with torch.no_grad():
            assert torch.equal(own.module(x), net.module(x))


class TestProcess:
    def test_a_fresh_process_gives_the_same(self, runtime: Runtime, lowered: Lowered) -> None:
        where = target(runtime.name)
        for kind in ("float", "int8"):
            artifact = lowered(runtime.name, "residual", kind)
            x = inputs("residual", 3)
            (here,) = runtime.open(artifact, where)(x)
            with Served(artifact, where) as served:
                (there,) = served.run(x)
                (again,) = served.run(x)
            np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(again, there)

    def test_needs_no_network(self, runtime: Runtime, tmp_path: Path) -> None:
        """Lowers and measures in a network namespace of its own, where nothing can be reached."""
        alone = ["unshare", "--map-root-user", "--net"]
        cut = subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0
        code = OFFLINE.format(tests=str(ROOT / "tests"), runtime=runtime.name, folder=str(tmp_path))
        command = [*(alone if cut else []), sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == "the same"


OFFLINE = """
import sys
tried = []
def watch(event, arguments):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.sendto', 'urllib.Request'):
        tried.append((event, arguments))
    if event == 'subprocess.Popen' and 'pip' in str(arguments):
        tried.append((event, arguments))
sys.addaudithook(watch)
sys.path.insert(0, {tests!r})
from pathlib import Path
import numpy as np
from featherweight.engine.jobs import Served
from featherweight.engine.packing import packed
from featherweight.plugins import find_runtime
from golden import inputs, model, target
engine = find_runtime({runtime!r})
artifact = engine.lower(model('linear3d'), target({runtime!r}), Path({folder!r}))
x = inputs('linear3d', 2)
(here,) = engine.open(artifact, target({runtime!r}))(x)
with Served(artifact, target({runtime!r})) as served:
    (there,) = served.run(x)
np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)
assert not tried, tried
print('the same')
"""


class TestPackage:
    @pytest.mark.parametrize("name", PIP)
    def test_names_the_versions_that_are_installed(self, name: str) -> None:
        found = _installed(name)
        wanted = [f"{package} {importlib.metadata.version(package)}" for package in found.packages]
        assert found.version() == ", ".join(wanted)

    @pytest.mark.parametrize("name", PIP)
    def test_a_missing_package_is_told_with_its_pip_line(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = find_runtime(name)
        monkeypatch.setattr(type(found), "module", "a_package_that_is_not_there")
        assert not found.installed()
        with pytest.raises(MissingRuntime, match=f"runtime '{name}' is not installed") as told:
            found.require()
        assert told.value.fix == f'pip install "featherweight[{found.extra}]"'
        assert "a_package_that_is_not_there" in told.value.what
        assert told.value.exit_code == 2

    @pytest.mark.parametrize("name", PIP)
    def test_its_pip_extra_exists_and_brings_its_packages(self, name: str) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        found = find_runtime(name)
        lines = [*project["optional-dependencies"].get(found.extra, []), *project["dependencies"]]
        brought = Counter(re.split(r"[^\w-]", line)[0].lower() for line in lines)
        assert all(brought[package.lower()] for package in found.packages)
        assert found.extra in project["optional-dependencies"] or brought[found.module]

    @pytest.mark.parametrize("name", runtime_names())
    def test_is_called_like_its_file(self, name: str) -> None:
        assert find_runtime(name).name == name
