"""A small Llama whose every weight follows from a formula, so that each tool can build it itself.

Weights, token ids and inputs are whole numbers times a power of two, drawn from NumPy's PCG64 by
the name of the tensor: the same bits in any release of torch or NumPy, and nothing to store.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

VOCABULARY = 256
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 128, 256, 4, 1
BLOCKS = 2
WINDOWS, LENGTH = 12, 96

_HEAD = HIDDEN // HEADS
_PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * _HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * _HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
LAYERS = tuple(f"model.layers.{block}.{name}" for block in range(BLOCKS) for name in _PROJECTIONS)
"""Names of all linear layers but the head."""


def write(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint, with a tokenizer whose words are the token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM(LlamaConfig(**_config()))
    model.load_state_dict(tensors())
    model.to(dtype).save_pretrained(folder)
    words = {"<pad>": 0} | {str(number): number for number in range(1, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return folder


def _config() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": _HEAD,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def tensors() -> dict[str, Tensor]:
    """All tensors of the checkpoint by name, in float32."""
    found = {"model.norm.weight": _norm("model.norm"), "lm_head.weight": _matrix("lm_head", 256)}
    # Columns of unequal size, each mixed with another: a Hessian that is not diagonal.
    drawn = _whole("model.embed_tokens", VOCABULARY, HIDDEN) // 64
    columns = np.arange(HIDDEN)
    mixed = drawn * (1 + columns % 5) + drawn[:, (7 * columns + 3) % HIDDEN] * (columns % 3)
    found["model.embed_tokens.weight"] = _scaled(mixed, -12)
    for block in range(BLOCKS):
        layer = f"model.layers.{block}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = _norm(f"{layer}.{norm}")
        for name, (rows, columns_in) in _PROJECTIONS.items():
            drawn = _whole(f"{layer}.{name}", rows, columns_in)
            found[f"{layer}.{name}.weight"] = _scaled(drawn, -20)
    return found


def token_ids() -> list[list[int]]:
    """Windows of calibration, as token ids from 2 up."""
    raw = _raw("token_ids", WINDOWS * LENGTH).reshape(WINDOWS, LENGTH)
    return [[2 + int(one) % (VOCABULARY - 2) for one in row] for row in raw]


def text() -> str:
    """The same as running text, a window a document."""
    return "\n\f\n".join(" ".join(map(str, window)) for window in token_ids())


def inputs() -> Tensor:
    """Inputs ``[tokens, HIDDEN]`` of a layer whose rounding is looked at by itself."""
    return _scaled(_whole("inputs", 16, HIDDEN) * (1 + np.arange(16)[:, None] % 4), -17)


def first_moments() -> Tensor:
    """Second moments ``[HIDDEN, HIDDEN]`` of what the first block's attention reads, in float64."""
    found = tensors()
    stream = found["model.embed_tokens.weight"][torch.tensor(token_ids()).flatten()].double()
    normed = stream * (stream.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    normed *= found["model.layers.0.input_layernorm.weight"].double()
    return normed.T @ normed / len(normed)


def first_loss(rounded: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Error of the first layer's output, relative to it, for a rounded weight of a dtype."""
    weight, moments = tensors()[f"{LAYERS[0]}.weight"].to(dtype).double(), first_moments()
    error = rounded.detach().double() - weight
    loss = (error @ moments * error).sum() / (weight @ moments * weight).sum()
    return float(f"{float(loss):.5g}")


def _raw(name: str, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)


def _whole(name: str, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Whole numbers of a near normal distribution: four of 16 bits each, summed and centred."""
    raw = _raw(name, rows * columns)
    total = np.zeros(rows * columns, dtype=np.int64)
    for shift in (0, 16, 32, 48):
        total += ((raw >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    return total.reshape(rows, columns) - 2 * 65535


def _scaled(whole: np.ndarray[Any, np.dtype[np.int64]], exponent: int) -> Tensor:
    """Exact in float32: the numbers have 24 bits at most."""
    if abs(whole).max() >= 1 << 24:
        raise ValueError("a number is not exact in float32")
    return torch.from_numpy(np.ldexp(whole.astype(np.float64), exponent)).to(torch.float32)


def _matrix(name: str, rows: int) -> Tensor:
    return _scaled(_whole(name, rows, HIDDEN), -20)


def _norm(name: str) -> Tensor:
    return _scaled(48 + (_raw(name, HIDDEN) % np.uint64(33)).astype(np.int64), -6)
