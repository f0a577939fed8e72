"""What a model's own code says against a configuration is found without any weight."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from prismquant.errors import ModelError
from prismquant.models import dry_forward
from prismquant.models.bind import bind
from prismquant.models.dry_forward import forward_findings
from prismquant.models.load import empty_model
from prismquant.storage import write_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


SMALL = {"num_hidden_layers": 2, "vocab_size": 200}


@pytest.fixture
def edited(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``edited(family, part, **values)``: a checkpoint whose config says something else."""

    def make(family: str, part: str, **values: Any) -> Path:
        folder = shutil.copytree(tiny(family), tmp_path / "copy")
        config = json.loads((folder / "config.json").read_text())
        config[part].update(values)
        write_json(folder / "config.json", config)
        return folder

    return make


def test_every_family_runs_all_its_steps(tiny_folder: Path) -> None:
    bound = bind(tiny_folder)
    model = empty_model(bound.config, bound.arch)
    assert forward_findings(model, bound.arch, bound.config, bound.steps) == []


def test_the_default_device_of_a_caller_changes_nothing(tiny: Callable[..., Path]) -> None:
    bound = bind(tiny("qwen2_5_vl"))
    model = empty_model(bound.config, bound.arch)
    with torch.device("meta"):
        assert forward_findings(model, bound.arch, bound.config, bound.steps) == []


@pytest.mark.parametrize("change", [{"num_hidden_layers": 400}, {"vocab_size": 10**7}])
def test_models_larger_than_any_are_not_run(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, int],
) -> None:
    """A configuration alone may come from a stranger, and says what it likes."""
    config = json.loads((tiny("qwen2_vl") / "config.json").read_text())
    config["text_config"] |= {"layer_types": None, **change}
    write_json(tmp_path / "config.json", config)
    monkeypatch.setattr(dry_forward, "_refusal", lambda *_: "it was run")
    assert bind(tmp_path, headers_required=False).steps
    write_json(tmp_path / "config.json", {**config, "text_config": config["text_config"] | SMALL})
    with pytest.raises(ModelError, match="it was run"):
        bind(tmp_path, headers_required=False)


def test_no_weight_takes_memory(tiny_folder: Path) -> None:
    bound = bind(tiny_folder)
    model = empty_model(bound.config, bound.arch)
    forward_findings(model, bound.arch, bound.config, bound.steps)
    held = [parameter for parameter in model.parameters() if not parameter.is_meta]
    assert sum(parameter.untyped_storage().nbytes() for parameter in held) <= 4


def test_a_fault_of_the_vision_tower(edited: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="own code refuses it for pictures: integer modulo"):
        bind(edited("qwen2_5_vl", "vision_config", window_size=1))


def test_modules_that_never_run(edited: Callable[..., Path]) -> None:
    indexes = [90, 91]
    with pytest.raises(ModelError, match=r"deepstack_merger_list.*never runs it"):
        bind(edited("qwen3_vl", "vision_config", deepstack_visual_indexes=indexes))


def test_a_fault_of_the_language_model(tiny: Callable[..., Path]) -> None:
    """Any exception of its code is a finding, but one that only says that shapes are not enough."""
    bound = bind(tiny("qwen2_vl"))

    def findings(forward: Callable[..., Any]) -> list[str]:
        model = empty_model(bound.config, bound.arch)
        layer: nn.Module = model.get_submodule("model.language_model.layers.0.mlp.up_proj")
        layer.forward = forward
        return forward_findings(model, bound.arch, bound.config, bound.steps)

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise LookupError("no such thing")

    assert findings(fails) == ["config.json: the model's own code refuses it: no such thing"]
    assert "size of tensor" in findings(lambda x: x)[0]
    assert findings(lambda x: x[x > 0]) == []
