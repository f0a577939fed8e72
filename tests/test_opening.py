"""Only regular files are opened, no more of them than expected, and JSON says each thing once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismquant.errors import StorageError
from prismquant.opening import open_regular, parse_json, read_bounded, read_json


def test_a_regular_file_and_a_link_to_one_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"
    with pytest.raises(OSError, match="a link, not a regular file"):
        open_regular(tmp_path / "link", follow_links=False)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path / "link", "a named pipe"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(OSError, match=kind):
            open_regular(path)
    with pytest.raises(StorageError, match="a named pipe"):
        read_json(tmp_path / "pipe")


def test_the_size_is_known_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no space on the disk
    with pytest.raises(OSError, match=str(1 << 40)):
        read_bounded(path, 1 << 20)
    with pytest.raises(StorageError, match="at most"):
        read_json(path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(_JSON)
def test_json_is_that_of_the_standard_library(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is there twice"),
        ("[" * 100_000, "too deeply"),
        ('{"a": ' * 50_000, "too deeply"),
        ("{", "Expecting"),
        (b'"\xff"', "utf-8"),
    ],
)
def test_json_that_readers_take_differently_or_not_at_all(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
