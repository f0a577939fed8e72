"""Where the result of a command may be written as a single file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from prismquant.errors import StorageError
from prismquant.outputs import require_result_file
from prismquant.storage import write_json

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("overall", "outcomes")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that the command reads."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def refused(path: Path, model: Path, *words: str) -> None:
    """Refuse ``path``; what lies there stays as it is."""
    before = os.lstat(path) if os.path.lexists(path) else None
    with pytest.raises(StorageError) as caught:
        require_result_file(path, inputs=[model, model.parent / "data.jsonl"], keys=KEYS)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy
    assert (os.lstat(path) if os.path.lexists(path) else None) == before


def test_a_new_file_and_an_earlier_result_are_free(model: Path, tmp_path: Path) -> None:
    for _ in range(2):
        require_result_file(tmp_path / "result.json", inputs=[model], keys=KEYS)
        write_json(tmp_path / "result.json", {"overall": {}, "outcomes": [], "notes": []})


@pytest.mark.parametrize("name", ["config.json", "new.json", "prismquant/new.json"])
def test_nothing_within_an_input(model: Path, name: str) -> None:
    refused(model / name, model, "a file in what the command reads", str(model))


def test_an_input_itself(model: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "data.jsonl", dict.fromkeys(KEYS))
    refused(tmp_path / "data.jsonl", model, "the place of what the command reads")


def test_an_input_through_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(model)
    refused(tmp_path / "other" / "new.json", model, "a file in what the command reads")


@pytest.mark.parametrize(
    "text", ["", "my notes", "[]", '{"overall": 1}', "\udcff", '{"overall": 1, "overall": 2}']
)
def test_a_file_of_somebody_else(model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.txt").write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path / "notes.txt", model, "not an earlier result", "move the file away")


def test_what_is_no_regular_file(model: Path, tmp_path: Path) -> None:
    """Links are refused whatever they lead to, and a named pipe is not waited for."""
    write_json(tmp_path / "result.json", dict.fromkeys(KEYS))
    (tmp_path / "link").symlink_to("result.json")
    (tmp_path / "loose").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "link", model, "a link", "choose another --out")
    refused(tmp_path / "loose", model, "a link")
    refused(tmp_path / "pipe", model, "a named pipe")
    refused(tmp_path, model, "this is a folder")
    with pytest.raises(StorageError, match="a device"):
        require_result_file(tmp_path.__class__(os.devnull), inputs=[model], keys=KEYS)


def test_a_folder_that_is_not_there(model: Path, tmp_path: Path) -> None:
    refused(tmp_path / "no" / "result.json", model, "the folder for the result is not there")
    refused(tmp_path / "notes" / "x", model, "not there")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "result.json", model, "the folder for the result is not there")
