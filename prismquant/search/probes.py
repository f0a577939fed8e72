"""Random losses whose squared changes are, on average, twice the KL divergence.

Let the logits at a place move by a small ``d``. The divergence of the model from what it was is
``d^T F d / 2`` with ``F = diag(p) - p p^T``, the Fisher information of its own distribution ``p``.
A probe is a random vector ``g`` with ``E[g g^T] = F`` and no mean, so ``E[(g . d)^2] = d^T F d``.
Probes at several places are independent: the square of the sum of all ``g . d`` has the sum of all
divergences as its mean, twice. No label is needed, so that every place counts for what it is.

``signs``: ``g = sqrt(p) z - p (sqrt(p) . z)`` with a random sign in each entry of ``z``.
``labels``: ``g = s (e_y - p)``, the gradient of ``s log p_y`` with ``y`` drawn from ``p`` and a
random sign ``s``. Where the model is sure of its answer, nearly all labels that it draws are that
one, and nearly all of the mean comes from the rare others; signs have no such tail.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

ProbeKind = Literal["signs", "labels"]


def probes(logits: Tensor, generators: list[torch.Generator], kind: ProbeKind = "signs") -> Tensor:
    """Gradients of random losses at logits.

    Args:
        logits: ``[places, vocabulary]``.
        generators: One for each draw, on the logits' device; each goes on from where it was.
        kind: See above.

    Returns:
        ``[draws, places, vocabulary]``, float32 or wider.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = torch.softmax(logits.detach().to(wide), dim=-1)
    draw = _signs if kind == "signs" else _labels
    return torch.stack([draw(p, generator) for generator in generators])


def generator_of(seed: int, *of: object, device: torch.device) -> torch.Generator:
    """A generator that depends on the seed and on what it is for, and on nothing else.

    Args:
        seed: The seed of the whole.
        of: Names and numbers that tell this one from others.
        device: Where it draws; others draw other numbers.
    """
    text = "\0".join(str(part) for part in (seed, *of))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(number)


def _signs(p: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
    scattered = p.sqrt() * (2 * drawn - 1)
    return scattered - p * scattered.sum(dim=-1, keepdim=True)


def _labels(p: Tensor, generator: torch.Generator) -> Tensor:
    places, device = len(p), p.device
    labels = torch.multinomial(p, 1, generator=generator)
    signs = torch.randint(0, 2, (places, 1), generator=generator, device=device, dtype=torch.int8)
    own = torch.zeros_like(p).scatter_(1, labels, 1.0) - p
    return own * (2 * signs - 1)
