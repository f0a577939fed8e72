"""Random losses whose squared changes are, on average, twice the KL divergence.

Let the logits at a place move by a small ``d``. The divergence of the model from what it was is
``d^T F d / 2`` with ``F = diag(p) - p p^T``, the Fisher information of its own distribution ``p``.
A probe is a random vector ``g`` with ``E[g g^T] = F`` and no mean, so ``E[(g . d)^2] = d^T F d``.
Probes at several places are independent: the square of the sum of all ``g . d`` has the sum of all
divergences as its mean, twice. No label is needed, so that every place counts for what it is.

The probe is ``g = sqrt(p) z - p (sqrt(p) . z)`` with a random sign in each entry of ``z``. The
gradient of ``log p_y`` with a label ``y`` drawn from ``p``, times a random sign, has the same
moments and long tails: where the model is sure, nearly all labels are the same, and nearly all of
the mean comes from the rare others.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def probes(logits: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Gradients of random losses at logits.

    Args:
        logits: ``[places, vocabulary]``.
        generators: One for each draw, on the logits' device; each goes on from where it was.

    Returns:
        ``[draws, places, vocabulary]``, float32 or wider.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    p = torch.softmax(logits.detach().to(wide), dim=-1)
    return torch.stack([_probe(p, generator) for generator in generators])


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


def _probe(p: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, p.shape, generator=generator, device=p.device, dtype=torch.int8)
    scattered = p.sqrt() * (2 * drawn - 1)
    return scattered - p * scattered.sum(dim=-1, keepdim=True)
