"""What every test shares: a cache of its own, artifacts that are lowered once, and no skipping in CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from featherweight.runtime import Artifact

Lowered = Callable[[str, str, str], "Artifact"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another one, or the user, has left in the store."""
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _subnormals_stay() -> Generator[None, None, None]:
    """Some runtimes let the processor round tiny numbers to zero for good; later tests need them."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """``lowered(runtime, net, kind)``: the artifact of a golden net, ``float`` or ``int8``, made once.

    Lowering takes seconds, so it is shared; nobody may write into an artifact's folder.
    """
    from featherweight.plugins import find_runtime
    from golden import KINDS, target

    made: dict[tuple[str, str, str], Artifact] = {}

    def lower(runtime: str, net: str, kind: str) -> Artifact:
        key = (runtime, net, kind)
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(key))
            made[key] = find_runtime(runtime).lower(KINDS[kind](net, runtime), target(runtime), folder)
        return made[key]

    return lower


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """CI has every runtime installed, so there a skipped test is one that did not do its work."""
    report = yield
    expected = hasattr(report, "wasxfail") or item.get_closest_marker("network") is not None
    return report if expected else _failed_in_ci(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself while it is imported."""
    report = yield
    return _failed_in_ci(report)


def _failed_in_ci(report: Any) -> Any:
    if report.skipped and os.environ.get("FEATHERWEIGHT_CI"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"a skip is a failure under FEATHERWEIGHT_CI: {reason}"
    return report
