"""Activations that wait in files come back as they were."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

from prismquant.engine.activation_store import InMemory, OnDisk
from prismquant.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

LARGE = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_a_tensor_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also a view of another tensor in another order of memory, as often as it is asked for."""
    states = OnDisk(tmp_path / "states")
    value = (LARGE * 100).to(dtype).T
    held = states.keep(value)
    for _ in range(2):
        back = held()
        assert (back.dtype, back.shape) == (dtype, value.shape)
        assert torch.equal(back, value)


def test_what_is_nested_keeps_its_form(tmp_path: Path) -> None:
    states = OnDisk(tmp_path / "states")
    small, hollow = torch.ones(2), torch.zeros(1).expand(1000, 1000)
    value = {"a": [LARGE, None], "b": (small, "text"), "c": hollow}
    held = states.keep(value)
    back = held()
    assert list(back) == ["a", "b", "c"]
    assert torch.equal(back["a"][0], LARGE)
    assert back["a"][1] is None
    assert back["b"][0] is small
    assert back["b"][1] == "text"
    assert back["c"] is hollow
    assert len(list((tmp_path / "states").iterdir())) == 1


def test_files_go_with_what_they_hold(tmp_path: Path) -> None:
    states = OnDisk(tmp_path / "states")
    held = [states.keep(LARGE) for _ in range(3)]
    assert len(list((tmp_path / "states").iterdir())) == 3
    del held[1:]
    gc.collect()
    assert len(list((tmp_path / "states").iterdir())) == 1
    states.close()
    assert not (tmp_path / "states").exists()


def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("a file")
    with pytest.raises(StorageError, match=r"waits on disk") as caught:
        OnDisk(tmp_path / "states").keep(LARGE)
    assert "--memory-budget" in str(caught.value)


def test_memory_gives_back_the_very_value() -> None:
    assert InMemory().keep(LARGE)() is LARGE
