"""Short cuts of a replay: taken where a model allows them, told where they would be wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch

from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.engine import shortcuts
from prismquant.families.check_family import check_family
from prismquant.families.specimen_run import head_outputs
from prismquant.families.tried_replay import walked_logits
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("family", ["llava"])
@pytest.mark.parametrize("size", [1, 6])
def test_units_see_what_the_model_would_show_them(
    family: str, size: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Texts and samples of one and of two pictures, alone and in a padded batch."""
    folder = tiny(family)
    bound, model = bind(folder), load_float(folder)
    data = tiny_vlm.samples(tmp_path, ("text", "image", "image+image"))
    batches = make_batches(
        read_samples(data),
        load_processor(folder),
        batch_size=size,
        vision_token_ids=bound.vision_token_ids,
    )
    for batch in batches:
        expected = head_outputs(model, bound.arch.head, batch)
        torch.testing.assert_close(walked_logits(bound, batch), expected, rtol=1e-4, atol=1e-4)


def wrong_claims(folder: Path) -> list[str]:
    return [claim.what for claim in check_family(folder).claims if claim.holds is False]


def test_features_of_a_block_before_the_last_are_kept(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llava")
    assert wrong_claims(folder) == []
    forgetful: dict[str, Any] = {}
    monkeypatch.setattr(shortcuts, "taps_of", lambda *_: forgetful)
    assert wrong_claims(folder) == [
        "units are run as by the model itself: image",
        "units are run as by the model itself: text and image",
    ]
