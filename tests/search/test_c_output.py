"""What C code prints is kept off standard output, and what Python prints stays in its order."""

from __future__ import annotations

import ctypes
import sys

import pytest

from prismquant.search.c_output import c_output_dropped


@pytest.mark.skipif(sys.platform == "win32", reason="C's library has no name there")
def test_lines_of_c_are_dropped_within(capfd: pytest.CaptureFixture[str]) -> None:
    c = ctypes.CDLL(None)
    sys.stdout.write("before\n")
    with c_output_dropped():
        c.puts(b"dropped")
    c.puts(b"kept")
    c.fflush(None)
    sys.stdout.write("after\n")
    assert capfd.readouterr().out == "before\nkept\nafter\n"


def test_an_error_within_brings_the_output_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="why"), c_output_dropped():
        raise ValueError("why")
    sys.stdout.write("after\n")
    assert capfd.readouterr().out == "after\n"
