"""Files are written whole or not at all, headers are read exactly, and pickles never."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import prismquant
from prismquant.errors import StorageError
from prismquant.headers import read_header
from prismquant.opening import read_json
from prismquant.shards import INDEX_NAME, ShardReader, weight_bytes
from prismquant.storage import (
    atomic_path,
    copy_file,
    file_digest,
    is_temporary,
    remove_temporaries,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def write_file(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["config.json"]


def test_the_new_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert is_temporary(temporary)
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert names_in(path.parent) == ["file.txt"]


def test_what_is_written_is_as_readable_as_other_files(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "theirs").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "theirs")]
    assert modes[0] == modes[1]


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not flushed there")
def test_what_is_written_reaches_the_disk_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents before the name, the name before anything that is written later.

    After a power cut at any moment, what has its name is whole, and what was written before it is
    there too.
    """
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        file = Path(f"/proc/self/fd/{handle}").readlink()
        calls.append(("flush", "temporary" if is_temporary(file) else file.name))
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        calls.append(("name", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell what is flushed")
    write_text(tmp_path / "deep" / "er" / "a", "first")
    write_text(tmp_path / "deep" / "b", "second")
    first, second = (
        [("flush", "temporary"), ("name", name), ("flush", folder)]
        for name, folder in (("a", "er"), ("b", "deep"))
    )
    assert calls == [("flush", "deep"), ("flush", tmp_path.name), *first, *second]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    write_text(tmp_path / "deep" / "a", "text")
    assert (tmp_path / "deep" / "a").read_text() == "text"


def test_a_folder_that_fails_to_be_flushed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name may be lost in a power cut: nothing must rest on it."""
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    with pytest.raises(StorageError, match="cannot write a: Input/output error"):
        write_text(tmp_path / "a", "text")


@pytest.mark.parametrize("moment", range(6))
def test_an_interruption_between_any_two_calls_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Ctrl-C may come right after the file was made, before anyone holds its name."""
    left = moment

    def counted(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            value = call(*args, **kwargs)
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
            return value

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("open", "close", "fsync", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            write_text(tmp_path / "a", "text")
    assert names_in(tmp_path) in ([], ["a"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    """Half of the new bytes are under another name, which the next run deletes."""
    path = tmp_path / "config.json"
    write_text(path, "old")
    child = os.fork()
    if child == 0:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            file.write(b"half of the n")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = [file for file in tmp_path.iterdir() if file != path]
    assert left.read_bytes() == b"half of the n"
    remove_temporaries(tmp_path)
    assert names_in(tmp_path) == ["config.json"]


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    """Whether the kernel tells of it on flushing or on renaming."""
    write_text(tmp_path / "config.json", "old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(StorageError, match=r"disk is full: config\.json") as caught:
        write_text(tmp_path / "config.json", "new")
    assert caught.value.where == str(tmp_path)
    assert "free space" in str(caught.value.remedy)
    assert (tmp_path / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["config.json"]


def test_a_write_that_the_kernel_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    """A real limit of the kernel on the file's size, in a process of its own."""
    pytest.importorskip("resource")
    code = """
import resource, signal, sys
from pathlib import Path
from prismquant.errors import StorageError
from prismquant.storage import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_bytes(Path(sys.argv[1]), bytes(1 << 20))
except StorageError as error:
    print(error)
"""
    path = tmp_path / "model.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "model.safetensors was not written: File too large" in done.stdout
    assert "ulimit -f" in done.stdout
    assert names_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write config\.json") as caught:
        write_json(tmp_path / "file" / "config.json", {})
    assert str(tmp_path / "file") in str(caught.value)


def test_leftovers_of_a_killed_process_are_found_and_nothing_else(tmp_path: Path) -> None:
    """By the whole of the name, and only regular files: a user's are never deleted."""
    digits = "0123456789abcdef"
    ours = [f".a.{digits}.prismquant-tmp", f"inside/.record.json.{digits}.prismquant-tmp"]
    keep = [
        *(".hidden", "notes.tmp", ".notes.tmp", ".model.safetensors.x1.tmp", "a.safetensors"),
        *(f".a.{digits[1:]}.prismquant-tmp", f"a.{digits}.prismquant-tmp"),
        f".a.{digits}.prismquant-tmp~",
    ]
    for name in [*keep, *ours]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / f".link.{digits}.prismquant-tmp").symlink_to(tmp_path / ".hidden")
    (tmp_path / f".folder.{digits}.prismquant-tmp").mkdir()
    remove_temporaries(tmp_path)
    kept = [f".{name}.{digits}.prismquant-tmp" for name in ("link", "folder")]
    assert names_in(tmp_path) == sorted([*keep, *kept, "inside"])


def test_a_link_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "source").write_text("new")
    for write in (write_text, lambda path, _: copy_file(tmp_path / "source", path)):
        (tmp_path / "ours").unlink(missing_ok=True)
        (tmp_path / "ours").symlink_to("theirs")
        write(tmp_path / "ours", "new")
        assert not (tmp_path / "ours").is_symlink()
        assert [(tmp_path / name).read_text() for name in ("theirs", "ours")] == ["theirs", "new"]


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a" / "kept").mkdir(parents=True)
    with pytest.raises(StorageError, match="a folder lies in the place of a") as caught:
        write_text(tmp_path / "a", "text")
    assert caught.value.where == str(tmp_path / "a")
    assert "delete it" in str(caught.value.remedy)
    assert names_in(tmp_path) == ["a", "kept"]


@pytest.mark.parametrize("length", [200, 255])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path, length: int) -> None:
    """The temporary name is no longer for it."""
    name = "é" * (length // 2) + "x" * (length % 2)
    write_text(tmp_path / name, "text")
    assert names_in(tmp_path) == [name]


def test_a_name_that_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written: 256 bytes of name") as caught:
        write_text(tmp_path / ("é" * 128), "text")
    assert "shorter" in str(caught.value.remedy)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_told_with_another_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*_: Any, **__: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StorageError, match=f"cannot write a: {os.strerror(code)}") as caught:
        write_text(tmp_path / "a", "text")
    assert "right to write" in str(caught.value.remedy)


def test_what_cannot_be_read_is_not_blamed_on_what_is_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    answers = {"gone": "is missing", "pipe": "be read: .*named pipe", "": "be read: .*a folder"}
    for name, said in answers.items():
        with pytest.raises(StorageError, match=said) as caught:
            copy_file(tmp_path / name, tmp_path / "copy")
        assert caught.value.where == str(tmp_path / name)


def test_names_that_are_no_text_survive_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"out-\xff")
    write_json(tmp_path / "a", {"model": name})
    assert read_json(tmp_path / "a") == {"model": r"out-\udcff"}


@settings(max_examples=60)
@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)),
        max_size=6,
    )
)
def test_headers_say_what_safetensors_says(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    """Names, types and shapes, and the number of bytes; values come back bit for bit."""
    folder = tmp_path_factory.mktemp("header")
    values = {
        name: torch.randint(0, 2, shape).to(torch.float32).to(dtype)
        for name, (dtype, shape) in tensors.items()
    }
    path = folder / "model.safetensors"
    write_tensors(path, values)
    infos, reader = read_header(path), ShardReader(folder)
    with safe_open(path, framework="pt") as shard:
        assert set(infos) == set(shard.keys()) == set(reader.names)
        for name, info in infos.items():
            theirs = shard.get_tensor(name)
            assert (info.dtype, info.shape) == (theirs.dtype, tuple(theirs.shape))
            assert info.nbytes == theirs.numel() * theirs.element_size()
            assert info.file == path.name
            ours = reader.read(name)
            assert ours.dtype == values[name].dtype
            assert (
                bytes(ours.view(torch.uint8).flatten())
                == bytes(values[name].view(torch.uint8).flatten())
                if ours.dim()
                else torch.equal(ours, values[name])
            )
    assert weight_bytes(folder) == path.stat().st_size


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    write_tensors(tmp_path / "1", {"a": a, "b": b})
    write_tensors(tmp_path / "2", {"b": b, "a": a.T.contiguous().T})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_truncated_shard_is_refused_by_its_name(tmp_path: Path, kept: int) -> None:
    """Cut inside the length, the header, or the data."""
    save_file({"w": torch.ones(64)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:kept])
    with pytest.raises(StorageError, match=r"model\.safetensors is not a whole") as caught:
        ShardReader(tmp_path)
    assert "copy the file again" in str(caught.value.remedy)


_ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"not json", "not valid JSON"),
        (b"[1, 2]", "holds a list"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"w": ' + json.dumps(_ENTRY).encode() + b', "w": 1}', "key 'w' is there twice"),
        (b'{"\\ud800": 1}', "surrogates not allowed"),
        ({"__metadata__": {"format": 1}}, "not a table of strings"),
        ({"w": 3}, "not dtype, shape and data_offsets"),
        ({"w": {"shape": [1], "data_offsets": [0, 4]}}, "not dtype, shape and data_offsets"),
        ({"w": {**_ENTRY, "mode": "delta"}}, "not dtype, shape and data_offsets"),
        ({"w": {**_ENTRY, "data_offsets": []}}, r"data_offsets \[\]"),
        ({"w": {**_ENTRY, "data_offsets": [0, "x"]}}, "data_offsets"),
        ({"w": {**_ENTRY, "data_offsets": [0.0, 4.0]}}, "data_offsets"),
        ({"w": {**_ENTRY, "data_offsets": [4, 0]}}, "data_offsets"),
        ({"w": {**_ENTRY, "data_offsets": [-4, 0]}}, "data_offsets"),
        ({"w": {**_ENTRY, "data_offsets": [0, 2]}}, "needs 4 bytes, not 2"),
        ({"w": {**_ENTRY, "shape": "1"}}, "shape '1'"),
        ({"w": {**_ENTRY, "shape": [-1]}}, r"shape \[-1\]"),
        ({"w": {**_ENTRY, "shape": [True]}}, r"shape \[True\]"),
        ({"w": {"dtype": "U8", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, "too large"),
        ({"w": {**_ENTRY, "data_offsets": [4, 8]}}, "bytes before tensor 'w'"),
        ({"a": _ENTRY, "b": {**_ENTRY, "data_offsets": [2, 6]}}, "'a' and 'b' overlap"),
        ({"a": _ENTRY, "b": {**_ENTRY, "data_offsets": [6, 10]}}, "between tensors 'a' and 'b'"),
        ({}, "4 bytes behind its tensors"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, header: Any, why: str) -> None:
    write_file(tmp_path / "model.safetensors", header, bytes(4))
    with pytest.raises(StorageError, match=why) as caught:
        read_header(tmp_path / "model.safetensors")
    assert "is not a valid safetensors file" in caught.value.what


_NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 12, -1, 2**63, 1.0, True, None, "4"])
_HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F32", "U8", "I16", "BOOL", "F9", 1]),
            "shape": st.lists(_NUMBERS, max_size=2) | st.sampled_from([[1], [2], [1, 1], "1"]),
            "data_offsets": st.lists(_NUMBERS, min_size=2, max_size=2)
            | st.sampled_from([[0, 4], [4, 8], [8, 12], [0, 8], [4, 4], [0, 2]]),
        }
    ),
    max_size=3,
)


@settings(max_examples=200)
@given(header=_HEADERS, size=st.sampled_from([0, 2, 4, 8, 12]))
def test_what_safetensors_refuses_is_refused_and_what_it_takes_is_read_equal(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    path = tmp_path_factory.mktemp("headers") / "model.safetensors"
    write_file(path, header, bytes(range(1, size + 1)))
    try:
        with safe_open(path, framework="pt") as shard:
            theirs = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except Exception:
        with pytest.raises(StorageError):
            ShardReader(path.parent)
        return
    reader = ShardReader(path.parent)
    assert reader.names == theirs.keys()
    for name, tensor in theirs.items():
        ours = reader.read(name)
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
        assert ours.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(StorageError, match="not a whole"):
        read_header(path)
    # A file that is as long as it says, but takes no room on the disk.
    path.write_bytes(struct.pack("<Q", 50_000_000))
    os.truncate(path, 50_000_008)
    with pytest.raises(StorageError, match="header has 50000000 bytes; at most"):
        read_header(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_shard_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A named pipe would wait for ever."""
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(StorageError, match="a named pipe, not a regular file"):
        ShardReader(tmp_path)


def test_an_unknown_element_type_is_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    write_file(tmp_path / "w.safetensors", header, bytes(1))
    with pytest.raises(StorageError, match="type 'F4', which cannot be read"):
        read_header(tmp_path / "w.safetensors")


def test_missing_shards_of_an_index_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    shards = {f"{n}": f"model-0000{i}-of-00002.safetensors" for i, n in enumerate("ab", start=1)}
    write_json(tmp_path / INDEX_NAME, {"weight_map": shards})
    with pytest.raises(StorageError, match="model-00002-of-00002") as caught:
        ShardReader(tmp_path)
    assert "model-00001" not in caught.value.what
    assert INDEX_NAME in str(caught.value.where)
    assert "complete the download" in str(caught.value.remedy)


@pytest.mark.parametrize("content", [{}, [], {"weight_map": {}}, {"weight_map": 3}])
def test_an_index_that_names_nothing_is_refused(tmp_path: Path, content: Any) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    write_json(tmp_path / INDEX_NAME, content)
    with pytest.raises(StorageError, match="index names no tensor"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        *([1], 3, None, True, {"x": 1}, "", "model", ".safetensors/..", "a\0.safetensors"),
        *("../m.safetensors", "/etc/m.safetensors", "deep/m.safetensors", "C:m.safetensors"),
        "deep\\m.safetensors",
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, entry: Any) -> None:
    for folder in (tmp_path, tmp_path / "model", tmp_path / "model" / "deep"):
        folder.mkdir(exist_ok=True)
        save_file({"a": torch.ones(2)}, folder / "m.safetensors")
    write_json(tmp_path / "model" / INDEX_NAME, {"weight_map": {"a": entry}})
    with pytest.raises(StorageError, match=r"'a' in .*, which is no name of a shard"):
        ShardReader(tmp_path / "model")


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.ones(2), "c": torch.ones(2)}, tmp_path / "m-2.safetensors")
    for name, found in (("b", "m-2.safetensors"), ("d", "no shard")):
        weight_map = {"a": "m-1.safetensors", "c": "m-2.safetensors", name: "m-1.safetensors"}
        write_json(tmp_path / INDEX_NAME, {"weight_map": weight_map})
        match = f"places tensor '{name}' in m-1.safetensors; it is in {found}"
        with pytest.raises(StorageError, match=match):
            ShardReader(tmp_path)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, indexed: bool) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "m-1.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.ones(1)}, tmp_path / "m-2.safetensors")
    if indexed:
        weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
        write_json(tmp_path / INDEX_NAME, {"weight_map": weight_map})
    with pytest.raises(StorageError, match=r"'a' is in m-1.safetensors and in m-2.safetensors"):
        ShardReader(tmp_path)


def test_a_new_single_shard_beside_indexed_ones_is_refused(tmp_path: Path) -> None:
    """transformers reads the one, vLLM the others."""
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model.safetensors")
    write_json(tmp_path / INDEX_NAME, {"weight_map": {"a": "model-1.safetensors"}})
    with pytest.raises(StorageError, match=r"model.safetensors lies beside model-1.safetensors"):
        ShardReader(tmp_path)
    weight_map = {"a": "model-1.safetensors", "b": "model.safetensors"}
    write_json(tmp_path / INDEX_NAME, {"weight_map": weight_map})
    assert ShardReader(tmp_path).names == {"a", "b"}


def test_shards_outside_the_index_are_left_unread(tmp_path: Path) -> None:
    """A stale shard beside the real ones must not win."""
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.zeros(1)}, tmp_path / "stale.safetensors")
    write_json(tmp_path / INDEX_NAME, {"weight_map": {"a": "model-1.safetensors"}})
    reader = ShardReader(tmp_path)
    assert reader.names == {"a"}
    assert torch.equal(reader.read("a"), torch.ones(2))


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(StorageError, match=r"'b\.weight' is missing"):
        ShardReader(tmp_path).read("b.weight")
    with pytest.raises(StorageError, match="is missing"):
        ShardReader(tmp_path, files=["other.safetensors"])
    assert ShardReader(tmp_path, files=[]).names == frozenset()


@pytest.mark.parametrize("rows", [[], [0], [6, 2, 2, 0], list(range(7))])
def test_lines_can_be_read_without_the_rest(tmp_path: Path, rows: list[int]) -> None:
    matrix = torch.arange(21.0).reshape(7, 3).bfloat16()
    save_file({"a": torch.ones(5), "b": matrix}, tmp_path / "model.safetensors")
    index = torch.tensor(rows, dtype=torch.int64)
    lines = ShardReader(tmp_path).read_rows("b", index)
    assert lines.dtype == matrix.dtype
    assert torch.equal(lines, matrix[index])


@pytest.mark.parametrize("row", [7, -1, 2**40])
def test_lines_beyond_a_tensor_are_refused(tmp_path: Path, row: int) -> None:
    """What lies there is the next tensor's."""
    save_file({"a": torch.ones(7, 3), "b": torch.ones(7, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(StorageError, match=f"'a' has no line {row}"):
        ShardReader(tmp_path).read_rows("a", torch.tensor([0, row]))


def test_reading_ahead_is_a_hint_and_never_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("a", "b"):
        save_file(
            {file: torch.ones(1000), f"{file}2": torch.ones(3)}, tmp_path / f"{file}.safetensors"
        )
    reader, asked = ShardReader(tmp_path), []
    advise = lambda fd, start, size, advice: asked.append((start, size))  # noqa: E731
    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    reader.read_ahead(["a", "b2", "gone"])
    assert [size for _, size in asked] == [4000, 12]
    assert all(start > 0 for start, _ in asked)
    (tmp_path / "a.safetensors").unlink()
    reader.read_ahead(["a"])
    monkeypatch.delattr(os, "posix_fadvise")
    reader.read_ahead(["b"])
    assert len(asked) == 2


def test_what_is_read_survives_the_file(tmp_path: Path) -> None:
    """Tensors are in ordinary memory: replacing the shard does not change them."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    tensor = ShardReader(tmp_path).read("a")
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tensor, torch.ones(1000))


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    bomb = pickle.dumps(Trap(tmp_path / "mark"))
    for name in ("pytorch_model.bin", "model.pt", "consolidated.pth"):
        (folder / name).write_bytes(bomb)
    with pytest.raises(StorageError, match=r"no \*\.safetensors") as caught:
        ShardReader(folder)
    assert "pickle files are never read" in str(caught.value.remedy)
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(StorageError, match=r"not a (whole|valid) safetensors file"):
        ShardReader(folder)
    assert not (tmp_path / "mark").exists()


def test_no_module_of_the_package_can_read_or_write_a_pickle() -> None:
    """Neither by importing a pickle library nor through torch's, numpy's or pandas' loaders."""
    root = Path(prismquant.__file__).parent
    libraries = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
    calls = {"torch.load", "torch.save", "np.load", "numpy.load", "np.save", "numpy.save"}
    found = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "asname")]
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            found += [(path.name, n) for n in names if n in calls or n in libraries]
    assert found == []


def test_json_is_written_for_people_and_read_with_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "größe", "values": [1, 2]})
    assert read_json(path) == {"name": "größe", "values": [1, 2]}
    assert "größe" in path.read_text(encoding="utf-8")
    assert path.read_bytes().endswith(b"}\n")
    write_bytes(path, b'{"a": 1,\n "b" 2}')
    with pytest.raises(StorageError, match="line 2") as caught:
        read_json(path)
    assert caught.value.where == str(path)
    write_bytes(path, b'{"a": "\xff"}')
    with pytest.raises(StorageError, match="not valid JSON"):
        read_json(path)
    with pytest.raises(StorageError, match=r"b\.json is missing"):
        read_json(tmp_path / "b.json")


def test_copies_are_byte_for_byte(tmp_path: Path) -> None:
    data = bytes(range(256)) * 100
    (tmp_path / "a").write_bytes(data)
    copy_file(tmp_path / "a", tmp_path / "deep" / "b")
    assert (tmp_path / "deep" / "b").read_bytes() == data
