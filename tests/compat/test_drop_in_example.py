"""The example of the page on entry points runs, and prints what the page says it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "mquant_drop_in.py"

pytestmark = pytest.mark.skipif(not EXAMPLE.is_file(), reason="runs in the source tree only")


@pytest.mark.slow
def test_it_prints_what_the_page_shows(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "CompatWarning: args was read as a recipe of mquant" in done.stderr
    quantizers, answers = done.stdout.splitlines()
    page = (ROOT / "docs" / "compat.md").read_text(encoding="utf-8")
    assert quantizers in page
    # The last digits are those of one machine's arithmetic.
    assert answers.startswith("exact match 0.")
    assert (tmp_path / "out" / "checkpoint" / "config.json").is_file()
