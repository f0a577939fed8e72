"""Whatever is wrong with a file, the answer is an error of ours, soon, with nothing touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(fuzzing.TARGETS))
def test_hostile_files_are_refused(target: str, tmp_path: Path) -> None:
    # In a process of its own: what is heard of it cannot be unheard, and its memory is its own.
    command = [sys.executable, fuzzing.__file__, target, "--examples", "300"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    surroundings = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        command, env=surroundings, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-8000:]


def test_the_guard_hears_what_is_forbidden(tmp_path: Path) -> None:
    script = (
        "import sys, fuzzing, pathlib\n"
        "guard = fuzzing.Guard(pathlib.Path(sys.argv[1]) / 'inside')\n"
        "try:\n"
        "    with guard.watching():\n"
        "        open(pathlib.Path(sys.argv[1]) / 'outside', 'w').close()\n"
        "except fuzzing.Violation as violation:\n"
        "    print('heard', violation)\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "heard open" in ended.stdout, ended.stderr
