"""What goes into an exported folder, what does not, and what an export that fails leaves."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

import prismquant as pq
from prismquant.api import export
from prismquant.errors import StorageError
from prismquant.export import exporter
from prismquant.export.companions import files_to_copy, links_outside
from prismquant.export.staging import staged
from prismquant.opening import read_json
from prismquant.run.lock import locked
from prismquant.storage import storage_error, write_text

GOLDEN = Path(__file__).parents[1] / "golden"
CUT = ".prismquant-export"


# -------------------------------------------------------------------------------------- companions


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A checkpoint with links to a file of its own, and to files that are none of its."""
    folder = Path(shutil.copytree(GOLDEN / "w4a16", tmp_path / "model"))
    (tmp_path / "secret.json").write_text("{}")
    (folder / "vocab.json").write_text("{}")
    (folder / "inside.json").symlink_to("vocab.json")
    (folder / "outside.json").symlink_to(tmp_path / "secret.json")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.jinja").write_text("x")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    return folder


def test_links_that_lead_outside_are_not_copied_and_are_named(linked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = export(linked, "dense", out)
    assert (out / "inside.json").is_file()
    assert not (out / "outside.json").exists()
    assert not (out / "additional_chat_templates").exists()
    (remark,) = (one for one in exported.remarks if "not copied" in one)
    assert "outside.json" in remark
    assert "additional_chat_templates/a.jinja" in remark
    assert remark in read_json(out / "prismquant" / "export.json")["remarks"]


def test_a_run_names_them_on_screen_and_in_its_record(linked: Path, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    export(linked, "dense", source)
    (source / "outside.json").symlink_to(tmp_path / "secret.json")
    rule = {"match": {"role": "mlp.down"}, "weights": "int8-channel", "solver": "rtn"}
    result = pq.quantize(source, {"rules": [rule]}, tmp_path / "out")
    assert any("outside.json" in note for note in result.notes)
    assert result.record.environment["links_outside"] == "outside.json"
    assert not (tmp_path / "out" / "outside.json").exists()


def test_a_snapshot_of_the_hub_is_made_of_links_to_its_blobs(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "1a2b"
    blobs.mkdir()
    folder.mkdir(parents=True)
    (blobs / "f00d").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(os.path.join("..", "..", "blobs", "f00d"))
    (folder / "outside.json").symlink_to(tmp_path / "secret.json")
    assert [path.name for path in files_to_copy(folder)] == ["tokenizer.json"]
    assert links_outside(folder) == ["outside.json"]


# ----------------------------------------------------------------------------------------- staging


def listed(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def test_files_get_their_places_when_all_are_there(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged(out) as place:
        write_text(place / "config.json", "{}")
        write_text(place / "prismquant" / "export.json", "{}")
        assert not (out / "config.json").exists()
    assert listed(out) == ["config.json", "prismquant/export.json"]


@pytest.mark.parametrize("there", [False, True])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def interrupted() -> None:
        with staged(out) as place:
            write_text(place / "model.safetensors", "")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert out.exists() is there
    assert not there or not list(out.iterdir())


def test_what_a_killed_export_left_blocks_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_text(out / CUT / "model.safetensors", "half")
    write_text(out / CUT / "prismquant" / "export.json", "{}")
    with staged(out) as place:
        write_text(place / "config.json", "{}")
    assert listed(out) == ["config.json"]


def test_nothing_of_others_is_deleted(tmp_path: Path) -> None:
    """A user's file beside what an export left; a link that has its name."""
    out = tmp_path / "out"
    write_text(out / CUT / "model.safetensors", "half")
    write_text(out / "notes.txt", "mine")
    with pytest.raises(StorageError, match=r"holds notes\.txt") as caught, staged(out):
        pass
    assert "cut off" in str(caught.value.remedy)
    home, linked = tmp_path / "home", tmp_path / "linked"
    write_text(home / "diary.txt", "mine")
    linked.mkdir()
    (linked / CUT).symlink_to(home)
    with pytest.raises(StorageError, match="a link"), staged(linked):
        pass
    assert listed(home) == ["diary.txt"]
    assert listed(out) == [f"{CUT}/model.safetensors", "notes.txt"]


def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out / "prismquant" / "lock"):
        with pytest.raises(StorageError, match="another run is writing"), staged(out):
            pass
        assert not (out / CUT).exists()


def test_a_full_disk_is_told_in_words_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def full(path: Path, tensors: object) -> None:
        write_text(path.parent / "before.json", " " * (1 << 20))
        raise storage_error(OSError(errno.ENOSPC, "No space left on device"), path)

    monkeypatch.setattr(exporter, "write_tensors", full)
    with pytest.raises(StorageError, match="the disk is full") as caught:
        export(GOLDEN / "w4a16", "dense", out)
    assert "1.0 MiB of the result were written before" in caught.value.what
    assert caught.value.where == str(out)
    assert not out.exists()
    monkeypatch.undo()
    export(GOLDEN / "w4a16", "dense", out)
