"""Configurations of released sizes, made small."""

from __future__ import annotations

import pytest

from prismquant.families.shrink_config import shrunk_config, special_ids
from prismquant.models.config import import_transformers

transformers = import_transformers()
TOKENS = [0, 1, 5, 151655, 151656]


def test_widths_and_depths_shrink_together() -> None:
    config = transformers.Qwen3VLConfig(
        text_config={"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
        vision_config={"out_hidden_size": 4096},
    )
    small = shrunk_config(config, TOKENS)
    text, vision = small.text_config, small.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (4, 2, 128)
    assert text.hidden_size == 512
    assert text.intermediate_size == 2 * text.hidden_size
    assert text.vocab_size == len(TOKENS)
    assert TOKENS[small.image_token_id] == config.image_token_id
    assert text.num_hidden_layers == 2
    # What the vision tower puts out is as wide as the language model.
    assert vision.out_hidden_size == text.hidden_size
    assert vision.hidden_size == 2 * 1152 // 16
    # Two blocks whose output goes to a deepstack merger, two whose output does not.
    assert vision.depth == 4
    assert vision.deepstack_visual_indexes == [2, 3]
    assert config.text_config.num_hidden_layers == 32  # as it was


def test_two_blocks_of_each_kind_stay_in_their_order() -> None:
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    config = transformers.Gemma3TextConfig(num_hidden_layers=12, layer_types=pattern * 2)
    small = shrunk_config(config, TOKENS)
    assert small.num_hidden_layers == 4
    assert small.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2
    assert small.sliding_window <= 8


def test_few_heads_stay_as_they_are() -> None:
    config = transformers.LlamaConfig(
        hidden_size=96, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=1
    )
    small = shrunk_config(config, TOKENS)
    assert (small.num_attention_heads, small.num_key_value_heads) == (2, 1)
    assert small.hidden_size == 64
    assert small.num_hidden_layers == 1


@pytest.mark.parametrize("name", ["Qwen3VLMoeConfig", "MixtralConfig"])
def test_experts_become_few(name: str) -> None:
    small = shrunk_config(getattr(transformers, name)(), TOKENS).get_text_config()
    assert small.num_local_experts == 4
    assert small.num_experts_per_tok == 2


def test_blocks_without_experts_stay_before_those_with_experts() -> None:
    """Groups of experts stay so large that a token can choose in one of them."""
    small = shrunk_config(transformers.DeepseekV3Config(), TOKENS)
    assert (small.num_hidden_layers, small.first_k_dense_replace) == (4, 2)
    assert (small.n_routed_experts, small.n_group, small.topk_group) == (4, 2, 1)


@pytest.mark.parametrize(("step", "blocks"), [(1, [0, 1, 2, 3]), (2, [1, 3, 4, 5])])
def test_blocks_that_a_list_numbers_are_told_from_those_that_it_lacks(
    step: int, blocks: list[int]
) -> None:
    """Two of each kind, also where all blocks have experts; joined neighbours stay as many."""
    config = transformers.Llama4Config(
        text_config={"interleave_moe_layer_step": step}, vision_config={"hidden_size": 1408}
    )
    small = shrunk_config(config, TOKENS)
    assert small.text_config.moe_layers == blocks
    assert small.text_config.intermediate_size_mlp == 2 * small.text_config.hidden_size
    assert small.vision_config.intermediate_size == 4 * small.vision_config.hidden_size


def test_tokens_that_a_configuration_names_are_found_in_all_its_parts() -> None:
    config = transformers.Qwen2VLConfig(text_config={"eos_token_id": [7, 9]}, image_token_id=12)
    assert {0, 7, 9, 12} <= special_ids(config)
