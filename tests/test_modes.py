"""Whatever torch's modes are around a call, the call computes the same."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prismquant as pq
from prismquant.arguments import default_modes
from prismquant.errors import PrismQuantError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TUNED = {
    "rules": [
        {
            "match": {"modality": "llm", "role": ["attn", "mlp"]},
            "weights": "int2-g64-asym",
            "vision_weight": "gradient",
            "tuner": "autoround",
            "tuner_options": {"iterations": 2, "settle": 0},
        }
    ]
}
AROUND: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "meta device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def given(tiny: Callable[..., Path], calibration_file: Path) -> tuple[Path, Any, Path]:
    recipe = pq.load_recipe(TUNED).with_calibration(samples=3)
    return tiny("qwen2_vl"), recipe, calibration_file


@pytest.fixture(scope="module")
def plain(given: tuple[Path, Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, recipe, data = given
    return pq.quantize(model, recipe, tmp_path_factory.mktemp("plain"), data).folder


@pytest.mark.parametrize("around", AROUND)
def test_a_run_and_a_measurement_are_the_same_in_any_mode(
    around: str, given: tuple[Path, Any, Path], plain: Path, tmp_path: Path
) -> None:
    model, recipe, data = given
    expected = pq.measure(plain, data, limit=2).to_dict()
    with AROUND[around]():
        pq.quantize(model, recipe, tmp_path / "out", data)
        loaded, _ = pq.load(tmp_path / "out")
        measured = pq.measure(plain, data, limit=2).to_dict()
        assert pq.inspect(model, recipe).total_bytes
    assert shards(tmp_path / "out") == shards(plain)
    assert measured == expected
    assert not any(parameter.is_inference() for parameter in loaded.parameters())


def test_the_caller_keeps_what_was_switched_on(given: tuple[Path, Any, Path]) -> None:
    model, recipe, _ = given
    with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"):
        pq.inspect(model, recipe)
        with contextlib.suppress(PrismQuantError):
            pq.inspect(model / "nowhere", recipe)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).is_meta


def test_another_default_dtype_is_refused(given: tuple[Path, Any, Path], tmp_path: Path) -> None:
    """All threads share it, so it is not ours to change."""
    model, recipe, data = given
    with default_dtype(torch.bfloat16):
        for call in (
            lambda: pq.quantize(model, recipe, tmp_path / "out", data),
            lambda: pq.inspect(model, recipe),
            lambda: pq.load(model),
            lambda: pq.measure(model, data),
        ):
            with pytest.raises(PrismQuantError, match=r"default dtype is torch\.bfloat16") as found:
                call()
            assert "torch.set_default_dtype(torch.float32)" in str(found.value.remedy)
        assert torch.get_default_dtype() is torch.bfloat16
    assert not (tmp_path / "out").exists()


def test_other_threads_keep_their_modes() -> None:
    seen: list[Any] = []
    inside, looked = threading.Event(), threading.Event()

    def other() -> None:
        with torch.no_grad(), torch.device("meta"):
            inside.wait(60)
            seen.append((torch.is_grad_enabled(), torch.empty(1).is_meta))
            looked.set()

    thread = threading.Thread(target=other)
    thread.start()
    with torch.no_grad(), torch.device("meta"), default_modes():
        inside.set()
        assert looked.wait(60)
        assert torch.is_grad_enabled()
        assert not torch.empty(1).is_meta
    thread.join()
    assert seen == [(False, True)]
