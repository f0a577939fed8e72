"""One run at a time in a folder, whoever dies; and nothing of it stays behind."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import prismquant as pq
from prismquant.engine.setup import Silent
from prismquant.errors import StorageError
from prismquant.recipe.schema import load_recipe
from prismquant.run import lock
from prismquant.run.directory import RunDirectory
from prismquant.run.lock import locked

if TYPE_CHECKING:
    from collections.abc import Callable

fcntl = pytest.importorskip("fcntl")


def take(path: Path) -> None:
    with locked(path):
        pass


def test_a_second_holder_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "out" / "prismquant" / "lock"
    with locked(path) as held:
        assert held
        said = json.loads(path.read_text())
        with pytest.raises(StorageError, match="another run is writing to") as caught:
            take(path)
        assert said["pid"] == os.getpid()
        told = f"process {os.getpid()} on {platform.node()}, since {said['since']}"
        assert told in caught.value.what
        assert caught.value.where == str(tmp_path / "out")
        assert json.loads(path.read_text()) == said
    take(path)


def test_who_holds_it_may_not_be_written_yet(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path):
        path.write_text("")
        with pytest.raises(StorageError) as caught:
            take(path)
    assert caught.value.what == "another run is writing to the output folder"


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_stays_behind(tmp_path: Path, error: type[BaseException] | None) -> None:
    """Neither the file nor folders that were made for it; but folders that hold something do."""
    if error is None:
        take(tmp_path / "a" / "b" / "lock")
    else:
        with pytest.raises(error), locked(tmp_path / "a" / "b" / "lock"):
            raise error
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b" / "lock"):
        (tmp_path / "a" / "result").write_text("")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "result"]


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    take(tmp_path / "empty" / "lock")
    assert (tmp_path / "empty").is_dir()


def test_it_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom prismquant.run.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    path = tmp_path / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(StorageError, match=f"process {process.pid} on"):
        take(path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert path.exists()
    with locked(path) as held:
        assert held
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_lock_file_that_its_holder_deletes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened while another run held it, locked when that had ended: its name is gone by then."""
    path = tmp_path / "lock"
    real, calls = fcntl.flock, 0

    def flock(handle: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            path.unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(path):
        assert calls == 2
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_folder_that_is_deleted_again_and_again_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_is_at", lambda *_: False)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(StorageError, match="deleted again and again"):
        take(tmp_path / "lock")
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert before == after


def test_a_folder_that_cannot_be_created_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /proc, where the system says that the folder above is not there."""

    def missing(path: Path) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(lock, "make_folder", missing)
    with pytest.raises(StorageError, match="cannot be created there") as caught:
        take(tmp_path / "out" / "prismquant" / "lock")
    assert (caught.value.where, caught.value.remedy) == (
        str(tmp_path / "out"),
        "choose another --out",
    )


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock") as held:
        assert not held
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (errno.EROFS, "cannot write lock: Read-only file system"),
        (errno.EACCES, "cannot write lock: Permission denied"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Callable[..., Path],
    code: int,
    what: str,
) -> None:
    really = os.open

    def refuse(path: Any, *args: Any, **options: Any) -> int:
        if Path(path).name != "lock":
            return really(path, *args, **options)
        raise OSError(code, os.strerror(code), str(path))

    model = tiny("qwen2_vl")
    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(StorageError, match=what) as caught:
        pq.quantize(model, RTN, tmp_path / "out")
    monkeypatch.undo()
    assert str(tmp_path / "out") in str(caught.value.where)
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_a_file_where_a_folder_should_be(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        for resume in (False, True):
            with pytest.raises(StorageError) as caught:
                pq.quantize(tiny("qwen2_vl"), RTN, out, resume=resume)
            assert str(tmp_path / "file") in str(caught.value.where)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["lock", "prismquant"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_link_is_neither_followed_nor_cut_short(
    tmp_path: Path, tiny: Callable[..., Path], place: str, resume: bool
) -> None:
    """In the place of the lock, or of its folder; to a file of the user's, or to nothing."""
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    theirs.mkdir()
    (theirs / "lock").write_text('{"pid": mine}')
    (out / "prismquant").mkdir(parents=True)
    link = out / "prismquant" / ("lock" if place == "lock" else "")
    for target in (theirs / place.removeprefix("prismquant"), tmp_path / "nothing"):
        if place == "prismquant":
            link.unlink() if link.is_symlink() else link.rmdir()
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(StorageError) as caught:
            pq.quantize(tiny("qwen2_vl"), RTN, out, resume=resume)
        assert place in caught.value.what
        assert "delete it" in str(caught.value.remedy)
        with pytest.raises(StorageError, match="in the output folder is not a run's") as caught:
            take(out / "prismquant" / "lock")
        assert caught.value.where == str(link)
        assert "delete it" in str(caught.value.remedy)
    assert (theirs / "lock").read_text() == '{"pid": mine}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "theirs"]


@pytest.mark.parametrize("kind", ["text", "long", "hard link", "folder", "pipe"])
def test_what_is_no_lock_is_left_as_it_is(tmp_path: Path, kind: str) -> None:
    path, text = tmp_path / "lock", "mine"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        text = '{"pid": 1}' + " " * (1 << 10) if kind == "long" else text
        (tmp_path / "other").write_text("" if kind == "hard link" else text)
        os.link(tmp_path / "other", path)
        if kind != "hard link":
            (tmp_path / "other").unlink()
    with pytest.raises(StorageError, match="lock in the output folder is not a run's"):
        take(path)
    if kind in ("text", "long"):
        assert path.read_text() == text
    assert path.exists()


@pytest.mark.parametrize("text", ["", '{"pi', '{"pid": 7, "host": "x", "si'])
def test_a_lock_that_was_begun_is_one(tmp_path: Path, text: str) -> None:
    """A process that is killed while it writes it."""
    (tmp_path / "lock").write_text(text)
    take(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()


# Two runs


RTN = load_recipe("w8a8").with_rules({"solver": "rtn"})


class Meanwhile(Silent):
    """Does something once, while the run is in its middle."""

    def __init__(self, what: Callable[[], None]) -> None:
        self.what = what
        self.finished = 0

    def finish(self, record: Any) -> None:
        """After the second step."""
        self.finished += 1
        if self.finished == 2:
            self.what()


def test_a_second_run_on_a_folder_is_refused_and_harms_nothing(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """With --resume and without, while the first one writes; that one ends as if alone."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    refused = []

    def second() -> None:
        for resume in (False, True):
            with pytest.raises(StorageError, match="another run is writing") as caught:
                pq.quantize(tiny("qwen2_vl"), RTN, out, resume=resume)
            assert str(caught.value.where) == str(out)
            refused.append(resume)

    pq.quantize(tiny("qwen2_vl"), RTN, out, reporter=Meanwhile(second))
    assert refused == [False, True]
    pq.quantize(tiny("qwen2_vl"), RTN, whole)
    names = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert Path("prismquant/lock") not in names
    for name in names:
        if name.name != "record.json":
            assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_stale_lock_file_alone_does_not_make_a_folder_used(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """A run that was killed before it wrote anything else."""
    RunDirectory(tmp_path).lock_path.parent.mkdir()
    RunDirectory(tmp_path).lock_path.write_text('{"pid": 1, "host": "a", "since": "b"}')
    assert pq.quantize(tiny("qwen2_vl"), RTN, tmp_path).record.finished


def test_a_file_system_without_locks_is_on_record(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_lock", lambda *_: False)
    result = pq.quantize(tiny("qwen2_vl"), RTN, tmp_path)
    assert result.record.environment["lock"] == "none"
