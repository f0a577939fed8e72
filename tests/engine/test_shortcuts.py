"""Short cuts of a replay: taken where a model allows them, told where they would be wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_families
import tiny_vlm
import torch

from prismquant.data import read_samples
from prismquant.data.batches import Batches, make_batches
from prismquant.engine import shortcuts
from prismquant.errors import DataError, ModelError
from prismquant.families.check_family import check_family
from prismquant.families.specimen_run import head_outputs
from prismquant.families.tried_replay import walked_logits
from prismquant.models.arch_files import PACKAGED
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("llava", "llava_onevision", "mistral3", "idefics3")


def batches_of(folder: Path, data: Path, size: int) -> Batches:
    return make_batches(
        read_samples(data),
        load_processor(folder),
        batch_size=size,
        vision_token_ids=bind(folder).vision_token_ids,
    )


@pytest.mark.parametrize("family", tiny_families.params(*FAMILIES))
@pytest.mark.parametrize("size", [1, 6])
def test_units_see_what_the_model_would_show_them(
    family: str, size: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Texts and samples of one and of two pictures, alone and in a padded batch."""
    folder = tiny(family)
    bound, model = bind(folder), load_float(folder)
    data = tiny_vlm.samples(tmp_path, ("text", "image", "image+image"))
    for batch in batches_of(folder, data, size):
        expected = head_outputs(model, bound.arch.head, batch)
        torch.testing.assert_close(walked_logits(bound, batch), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_gives_the_same_alone_and_beside_larger_ones(
    family: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Crops and pictures of other sizes are padded, which the model must not see."""
    folder = tiny(family)
    bound, model = bind(folder), load_float(folder)
    data = tiny_vlm.samples(tmp_path, ("image", "text", "image+image"))
    alone = [head_outputs(model, bound.arch.head, one) for one in batches_of(folder, data, 1)]
    [together] = batches_of(folder, data, 6)
    found = head_outputs(model, bound.arch.head, together)
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)


def wrong_claims(folder: Path, file: Path | None = None) -> list[str]:
    return [claim.what for claim in check_family(folder, file).claims if claim.holds is False]


def test_features_of_a_block_before_the_last_are_kept(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's check tells of features that were lost."""
    folder = tiny("llava")
    assert wrong_claims(folder) == []
    forgetful: dict[str, Any] = {}
    monkeypatch.setattr(shortcuts, "taps_of", lambda *_: forgetful)
    assert wrong_claims(folder) == [
        "units are run as by the model itself: image",
        "units are run as by the model itself: text and image",
    ]


def test_pixels_are_dropped_only_where_their_shape_is_enough(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank pictures are padding for Idefics3: of zeros alone it makes nothing."""
    folder = tiny("idefics3")
    bound = bind(folder)
    [batch] = batches_of(folder, tiny_vlm.samples(tmp_path, ("image", "image+image"), count=2), 2)
    expected = head_outputs(load_float(folder), bound.arch.head, batch)
    monkeypatch.setattr(shortcuts, "lighter", lambda _: iter(()))
    torch.testing.assert_close(walked_logits(bound, batch), expected, rtol=1e-4, atol=1e-4)
    zeros = [lambda: {"pixel_values": torch.zeros_like(batch.inputs["pixel_values"])}]
    monkeypatch.setattr(shortcuts, "lighter", lambda _: iter(zeros))
    torch.testing.assert_close(walked_logits(bound, batch), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(shortcuts.Shortcuts, "glance", lambda *_: None)
    with pytest.raises(ModelError, match="fails between its steps"):
        walked_logits(bound, batch)


def test_an_edge_into_columns_of_another_order_is_told(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """The layer that merges patches in Mistral 3 reads them channel by channel."""
    text = (PACKAGED / "mistral3.toml").read_text(encoding="utf-8")
    layer = "patch_merger.merging_layer"
    head, _, rest = text.partition("[left_alone]\n")
    rest = rest.partition("\n\n")[2]
    projector = f"""like = "mlp_projector"
sites = [{{ role = "projector.merge", path = "{layer}", stage = 0, input = "patches" }},
    {{ path = "linear_1", stage = 1 }}, {{ path = "linear_2", stage = 2 }}]
edges = [{{ kind = "norm", norm = "norm", consumers = ["{layer}"] }}]
"""
    file = tmp_path / "mine.toml"
    changed = head.replace('like = "mlp_projector"', projector)
    file.write_text(f"{changed}\n{rest}", "utf-8")
    path = "model.multi_modal_projector"
    assert wrong_claims(tiny("mistral3"), file) == [
        f"scale moves from {path}.norm to {path}.{layer}"
    ]


def test_clips_are_refused_for_a_model_of_pictures(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="1 samples show clips, and the model sees pictures alone"):
        batches_of(tiny("llava"), tiny_vlm.samples(tmp_path, ("text", "video"), count=2), 2)
