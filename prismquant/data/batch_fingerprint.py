"""Fingerprint of a batch: whether two runs show a model the same tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from prismquant.data.batches import Batch


def fingerprint_batch(batch: Batch) -> str:
    """SHA-256 over everything that the model sees: tokens, masks, pixels.

    Whatever makes tensors of samples (processor, tokenizer, template, the libraries below them)
    decides the result through these alone.
    """
    digest = hashlib.sha256()
    tensors = {**batch.inputs, "": batch.answer_mask, " ": batch.vision_mask}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
