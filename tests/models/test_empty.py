"""Models without weights: as transformers builds them, and nothing else in the process changes."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import prismquant as pq
from prismquant.errors import ModelError
from prismquant.models.arch_files import known_archs
from prismquant.models.bind import bind
from prismquant.models.config import identify, import_transformers, native_config
from prismquant.models.load import _fill_buffers, empty_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _state() -> list[object]:
    """What building a model with the usual helpers changes for all threads."""
    return [
        nn.Module.register_parameter,
        nn.Module.register_buffer,
        nn.init.normal_,
        nn.init.kaiming_uniform_,
        torch.empty,
        torch.linspace,
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.utils._device.CURRENT_DEVICE,
        nn.Linear(2, 2).weight.device,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_shapes_and_buffers_are_those_of_a_real_model(
    tiny_folder: Path, family: str, dtype: torch.dtype, request: pytest.FixtureRequest
):
    """Whatever torch's default dtype is; buffers are equal bit for bit."""
    arch = known_archs()[family]
    config = native_config(arch, tiny_folder)
    real = getattr(import_transformers(), arch.hf_class)(copy.deepcopy(config))
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(dtype)
    ours = empty_model(config, arch)
    assert all(parameter.is_meta for parameter in ours.parameters())
    theirs = real.state_dict()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in theirs.items()
    }
    assert [*map(type, ours.modules())] == [*map(type, real.modules())]
    buffers = dict(real.named_buffers())
    assert buffers
    assert buffers.keys() == dict(ours.named_buffers()).keys()
    for name, buffer in ours.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name


def test_parameters_have_the_dtype_of_their_part_of_the_config(tiny_folder: Path, family: str):
    config = native_config(known_archs()[family], tiny_folder)
    config.dtype = config.text_config.dtype = torch.bfloat16
    config.vision_config.dtype = torch.float16
    model = empty_model(config, known_archs()[family])
    for name, parameter in model.named_parameters():
        vision = ".vi" in name
        assert parameter.dtype == (torch.float16 if vision else torch.bfloat16), name
    assert model.config.vision_config.dtype == torch.float16
    assert config.dtype == torch.bfloat16


@pytest.mark.slow
def test_threads_build_models_at_one_time_and_change_nothing(tiny_folder: Path):
    """Other code in the process makes ordinary modules meanwhile."""
    before, expected = _state(), bind(tiny_folder).shapes
    failures: list[Any] = []
    stop = threading.Event()

    def other() -> None:
        while not stop.is_set():
            if nn.Linear(2, 2).weight.is_meta or torch.zeros(1).dtype != torch.float32:
                failures.append("an ordinary module")

    def build() -> None:
        try:
            for _ in range(3):
                bound = bind(tiny_folder)
                model = empty_model(bound.config, bound.arch)
                assert {n: (*t.shape,) for n, t in model.state_dict().items()} == expected
                assert not any(buffer.is_meta for buffer in model.buffers())
        except BaseException as error:
            failures.append(error)

    bystander = threading.Thread(target=other)
    builders = [threading.Thread(target=build) for _ in range(4)]
    bystander.start()
    for thread in builders:
        thread.start()
    for thread in builders:
        thread.join()
    stop.set()
    bystander.join()
    assert failures == []
    assert _state() == before


def test_threads_quantize_and_load_at_one_time(tiny: Callable[..., Path], tmp_path: Path):
    """Each gives the bytes that it gives alone."""
    recipe, before = pq.load_recipe("w8a8").with_rules({"solver": "rtn"}), _state()
    failures: list[BaseException] = []

    def work(family: str, out: Path) -> None:
        try:
            pq.quantize(tiny(family), recipe, out)
            assert isinstance(pq.load(out)[0], nn.Module)
        except BaseException as error:
            failures.append(error)

    families = ("qwen2_vl", "video_llama_3")
    for family in families:
        work(family, tmp_path / "alone" / family)
    threads = [
        threading.Thread(target=work, args=(family, tmp_path / folder / family))
        for family in families
        for folder in ("together", "too")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert _state() == before
    for path in (tmp_path / "alone").rglob("*.safetensors"):
        for folder in ("together", "too"):
            together = tmp_path / folder / path.relative_to(tmp_path / "alone")
            assert together.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("value", ["kernels-community/x", "flash_attention_2", "eager"])
def test_the_implementation_of_attention_is_not_the_configs_to_choose(
    tiny: Callable[..., Path], part: str | None, value: str
):
    """A name with a slash would be fetched and run."""
    folder = tiny("qwen2_vl")
    arch = identify(folder)
    config = native_config(arch, folder)
    chosen = empty_model(config, arch).config
    for key in ("_attn_implementation", "_experts_implementation"):
        setattr(getattr(config, part) if part else config, key, value)
    model = empty_model(config, arch)
    assert chosen._attn_implementation == "sdpa"
    for module in model.modules():
        if hasattr(module, "config"):
            assert module.config._attn_implementation == chosen._attn_implementation
            assert module.config._experts_implementation == chosen._experts_implementation
    asked = getattr(config, part) if part else config
    assert asked._attn_implementation == value  # the caller's config is left as it was


def test_a_buffer_that_nobody_computes_is_found():
    class Owner(nn.Module):
        def _init_weights(self, module: nn.Module) -> None:
            """Forgets the buffer."""

    module = nn.Module()
    module.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(ModelError, match="does not say how its buffer 'table' is computed"):
        _fill_buffers(module, Owner())
