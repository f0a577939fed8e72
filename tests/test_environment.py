"""What the tests run in: tested versions, and no test that a slow machine fails."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "constraints.txt"
# Installed before all else, in the build that `make` is told of.
FIRST = {"torch", "torchvision", "triton"}

pytestmark = pytest.mark.skipif(not LOCK.is_file(), reason="runs in the source tree only")


def requirements() -> list[Requirement]:
    """Of the project and all its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def locked() -> dict[str, str]:
    """Canonical name -> the version in constraints.txt."""
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    pinned = [re.fullmatch(r"([\w.-]+)==([\w.!]+)", line) for line in lines]
    # No hosts, hashes, files, builds or markers: the file serves every platform.
    assert all(pinned), lines
    return {canonicalize_name(one[1]): one[2] for one in pinned if one}


def test_every_dependency_has_a_tested_version_within_its_bounds() -> None:
    pins = locked()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert (name in pins) != (name in FIRST), name
        if name in pins:
            assert requirement.specifier.contains(pins[name]), requirement


def test_what_is_installed_is_what_is_locked() -> None:
    if (folder := Path(sys.prefix).name) != ".venv":
        pytest.skip(f"{folder} has versions of its own")
    apart = {}
    for name, pin in locked().items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # needed on another platform only
        if installed != pin:
            apart[name] = f"{installed}, locked {pin}"
    assert not apart


def test_the_oldest_versions_are_the_lower_bounds_of_all_dependencies() -> None:
    """Types of stubs aside, whatever we need has a lower bound, and it is that which is tried."""
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "oldest.py"], capture_output=True, text=True, check=True
    )
    oldest = dict(line.split("==") for line in made.stdout.splitlines())
    for requirement in requirements():
        if requirement.name in FIRST or requirement.name.startswith("types-"):
            continue
        assert f">={oldest[requirement.name]}" in str(requirement.specifier)


def test_no_test_has_a_deadline() -> None:
    """One profile for all; and who waits for another process waits long enough."""
    assert settings().deadline is None
    assert HealthCheck.too_slow in settings().suppress_health_check
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bdeadline=(?!None)", text), path.name
        waits = [float(seconds) for seconds in re.findall(r"\btimeout=([\d.]+)", text)]
        assert all(seconds >= 120 for seconds in waits), (path.name, waits)
