"""Fixtures that all tests share: one thread, and small checkpoints that are built once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_families
import tiny_text
import tiny_vlm
import torch
from hypothesis import HealthCheck, settings

from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

torch.set_num_threads(1)
# How long a machine takes, alone or beside others, says nothing of what a test is about.
settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("patient")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a device where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where tests for a GPU were asked for and none of them ran."""
    asked = "gpu" in session.config.option.markexpr.replace("not gpu", "")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not asked or reporter is None or hasattr(session.config, "workerinput"):
        return
    ran = [*reporter.getreports("passed"), *reporter.getreports("failed")]
    if not any("gpu" in report.keywords for report in ran):
        reporter.write_line("no test for a GPU ran: there is no CUDA device", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(family, **options)``: folder of a small checkpoint; equal arguments share one folder.

    Tests must not write to it; they copy it first.
    """
    built: dict[str, Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = repr((family, sorted(options.items(), key=lambda item: item[0])))
        if key not in built:
            makers = (tiny_text, tiny_families)
            known = ((*one.FAMILIES, *one.SPARSE) for one in makers)
            found = (one for one, names in zip(makers, known, strict=True) if family in names)
            maker = next(found, tiny_vlm)
            built[key] = maker.build(family, tmp_path_factory.mktemp(family), **options)
        return built[key]

    return get


# Between Qwen2-VL and Qwen3-VL: what it has, one of them has, but for its windows.
_SLOW = "qwen2_5_vl"
_EACH = [
    pytest.param(name, marks=[pytest.mark.slow] * (name == _SLOW)) for name in tiny_vlm.FAMILIES
]


@pytest.fixture(scope="session", params=_EACH)
def family(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_folder(family: str, tiny: Callable[..., Path]) -> Path:
    """A small checkpoint of every family in turn."""
    return tiny(family)


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of two texts, two pictures and two clips."""
    return tiny_vlm.samples(tmp_path_factory.mktemp("calibration"))


@pytest.fixture(scope="session")
def processors(tiny: Callable[..., Path]) -> Callable[[str], Any]:
    """``processors(family)``: the one of a small checkpoint. Tests must not change it."""
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            loaded[family] = load_processor(tiny(family))
        return loaded[family]

    return get


@pytest.fixture(scope="session")
def processor(family: str, processors: Callable[[str], Any]) -> Any:
    """The processor of every family in turn."""
    return processors(family)
