"""Places of a batch whose next token is predicted, by class.

The places are those of :mod:`prismquant.evaluate.fidelity`: every token that is followed by another
one of its row. *answer* places predict a token of the answer; the others are told apart by what
they read: a placeholder of a picture (*image*) or of a clip (*video*), or *text*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from prismquant.data.batches import Batch
from prismquant.models.bound import BoundModel
from prismquant.search.sensitivity import TOKEN_CLASSES, TokenClass

NOWHERE = -1
"""Class of padding and of a row's last token, which predict nothing."""


def token_places(batch: Batch, bound: BoundModel) -> Tensor:
    """Class of every place of a batch.

    Args:
        batch: The batch; its pixels are not looked at.
        bound: The model, which says what its placeholders are.

    Returns:
        Int64 [B, T] on the batch's device: an index into :data:`TOKEN_CLASSES`, or
        :data:`NOWHERE`.
    """
    attended = batch.attended
    follows = torch.zeros_like(attended)
    follows[:, :-1] = attended[:, :-1] & attended[:, 1:]
    answer = torch.zeros_like(attended)
    answer[:, :-1] = batch.answer_mask[:, 1:]
    ids = batch.inputs["input_ids"]
    keys = zip(bound.arch.vision_token_ids, bound.vision_token_ids, strict=True)
    clips = ids.new_tensor([i for key, i in keys if "video" in key])
    video = batch.vision_mask & torch.isin(ids, clips)
    index = {name: number for number, name in enumerate(TOKEN_CLASSES)}
    places = torch.full_like(ids, index["text"])
    places[batch.vision_mask] = index["image"]
    places[video] = index["video"]
    places[answer] = index["answer"]
    return torch.where(follows, places, NOWHERE)


def count_places(batches: Iterable[Batch], bound: BoundModel) -> dict[TokenClass, int]:
    """Count of the places of each class; classes that the batches lack are left out."""
    found: Counter[int] = Counter()
    for batch in batches:
        found.update(token_places(batch, bound).flatten().tolist())
    return {name: found[n] for n, name in enumerate(TOKEN_CLASSES) if found[n]}
