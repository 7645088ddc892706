"""No runtime reaches out of the machine or installs anything: the system calls of its processes tell."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.plugins import find_runtime, runtime_names

TESTS = Path(__file__).parents[1]
LOWER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from featherweight.engine.jobs import Served
from featherweight.plugins import find_runtime
from golden import inputs, model, quantized, target
engine, where = find_runtime({name!r}), target({name!r})
for kind, net in (("float", model("residual")), ("int8", quantized("residual", {name!r}))):
    folder = Path({folder!r}) / kind
    folder.mkdir()
    artifact = engine.lower(net, where, folder)
    if not engine.unmeasured:
        with Served(artifact, where) as served:
            served.run(inputs("residual", 2))
print("done")
"""
# An address outside: IPv4 that is not 127.x, IPv6 that is not ::1; servers of names are such addresses too.
OUTSIDE = re.compile(r'(?:connect|sendto)\(.*(?:inet_addr\("(?!127\.)|inet_pton\(AF_INET6, "(?!::1"))')
INSTALLER = re.compile(r'execve\("[^"]*".*"(?:pip|pip3|npm|conda|apt|apt-get|curl|wget)"')


def watched(command: list[str], log: Path) -> tuple[str, list[str]]:
    """What a command prints, and the calls of it and all its children that reach out or install."""
    calls = "trace=connect,sendto,execve"
    trace = ["strace", "-f", "-qq", "-s", "300", "-e", calls, "-o", str(log), *command]
    done = subprocess.run(trace, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [
        line
        for line in log.read_text(errors="replace").splitlines()
        if OUTSIDE.search(line) or INSTALLER.search(line)
    ]
    return done.stdout, found


@pytest.fixture(autouse=True)
def _strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")


@pytest.mark.parametrize("name", runtime_names())
def test_nothing_is_reached_and_nothing_installed(name: str, tmp_path: Path) -> None:
    if not find_runtime(name).installed():
        pytest.skip(f"runtime '{name}' is not installed")
    code = LOWER.format(tests=str(TESTS), name=name, folder=str(tmp_path))
    said, found = watched([sys.executable, "-W", "ignore", "-c", code], tmp_path / "calls.txt")
    assert said.strip().endswith("done")
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import socket; s = socket.socket(); s.settimeout(0.2); s.connect_ex(('192.0.2.1', 9))",
        "import subprocess, sys; subprocess.run(['env', 'pip', '--version'])",
    ],
    ids=["connects", "runs pip"],
)
def test_the_watch_sees_it(code: str, tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    _, found = watched([sys.executable, "-c", child], tmp_path / "calls.txt")
    assert found
