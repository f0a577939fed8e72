"""Masks of batches are right to the token, and a sample's tensors depend on nothing else."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny_vlm
import torch
from PIL import Image
from tiny_data import image, mixed_samples, save_picture, save_video, text, turns, write_lines

import prismquant as pq
from prismquant.data import Sample, fingerprint, media_of, read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.data.lengths import by_length
from prismquant.data.media import Limits
from prismquant.data.spans import render
from prismquant.errors import DataError
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

IMAGE_ID, VIDEO_ID = 5, 6


def batches(samples: Sequence[Sample], processor: Any, batch_size: int = 8, **options: Any) -> Any:
    return make_batches(
        samples,
        processor,
        batch_size=batch_size,
        vision_token_ids=(IMAGE_ID, VIDEO_ID),
        **options,
    )


def only(samples: Sequence[Sample], processor: Any, **options: Any) -> Batch:
    (batch,) = batches(samples, processor, **options)
    return batch


def words(batch: Batch, row: int, mask: torch.Tensor, processor: Any) -> list[str]:
    ids = batch.inputs["input_ids"][row][mask[row]].tolist()
    return list(processor.tokenizer.convert_ids_to_tokens(ids))


def test_masks_mark_the_answers_and_the_placeholders(tmp_path: Path, processor: Any) -> None:
    samples = mixed_samples(tmp_path)
    batch = only(samples, processor)
    ids = batch.inputs["input_ids"]
    assert batch.ids == tuple(sample.id for sample in samples)
    assert batch.kinds == ("text", "video", "image", "text", "video", "image", "image")
    expected = [["no"], ["yes", "and", "no"], ["red"], ["the", "red", "one"], ["it"], ["2"]]
    for row, answer in enumerate(expected):
        assert words(batch, row, batch.answer_mask, processor) == [*answer, "<|im_end|>"]
    assert not batch.answer_mask[6].any()
    assert torch.equal(batch.vision_mask, (ids == IMAGE_ID) | (ids == VIDEO_ID))
    assert not (batch.vision_mask & batch.answer_mask).any()
    assert not (batch.answer_mask & ~batch.attended).any()
    # Padding stands on the right although this tokenizer's own side is the left.
    lengths = batch.attended.sum(dim=1)
    assert torch.equal(batch.attended, torch.arange(ids.shape[1])[None, :] < lengths[:, None])
    assert processor.tokenizer.padding_side == "left"


def test_placeholders_are_as_many_as_the_features_of_the_vision_tower(
    tmp_path: Path, processor: Any
) -> None:
    batch = only(mixed_samples(tmp_path), processor)
    inputs = batch.inputs
    for token, grid, merge in (
        (IMAGE_ID, "image_grid_thw", "image_merge_sizes"),
        (VIDEO_ID, "video_grid_thw", "video_merge_sizes"),
    ):
        side = inputs.get(merge, torch.tensor(2))
        features = int((inputs[grid].prod(dim=1) // side**2).sum())
        if token == VIDEO_ID and "video_compression_mask" in inputs:
            features = int(inputs["video_compression_mask"].sum())
        assert int((inputs["input_ids"] == token).sum()) == features
    assert len(inputs["image_grid_thw"]) == 6
    assert len(inputs["video_grid_thw"]) == 2


def test_the_prompt_is_what_the_processor_makes_of_it_alone(tmp_path: Path, processor: Any) -> None:
    """The answer's place is derived from texts after the last picture: check with whole prompts."""
    samples = mixed_samples(tmp_path)[:6]
    batch = only(samples, processor)
    for row, sample in enumerate(samples):
        alone = Sample(sample.id, sample.kind, sample.messages[:-1], sample.folder, {})
        prompt = only([alone], processor).inputs["input_ids"][0].tolist()
        prompt += processor.tokenizer("<|im_start|>assistant\n")["input_ids"]
        first = int(batch.answer_mask[row].int().argmax())
        assert batch.inputs["input_ids"][row, :first].tolist() == prompt


def test_a_batch_says_the_same_as_its_samples_alone(
    tmp_path: Path, processor: Any, tiny_folder: Path
) -> None:
    """Pictures and clips of a mixed batch go to the rows that show them."""
    samples = mixed_samples(tmp_path)
    model = load_float(tiny_folder, dtype=torch.float32)
    batch = only(samples, processor)
    with torch.inference_mode():
        together = model(**batch.inputs).logits
        for row, sample in enumerate(samples):
            single = only([sample], processor)
            length = single.inputs["input_ids"].shape[1]
            assert torch.equal(
                single.inputs["input_ids"][0], batch.inputs["input_ids"][row, :length]
            )
            assert torch.equal(single.answer_mask[0], batch.answer_mask[row, :length])
            logits = model(**single.inputs).logits[0]
            torch.testing.assert_close(together[row, :length], logits, atol=2e-4, rtol=2e-4)


def test_the_same_samples_give_the_same_tensors(tmp_path: Path, processor: Any) -> None:
    samples = mixed_samples(tmp_path)
    first, second = only(samples, processor), only(samples, processor)
    assert first.inputs.keys() == second.inputs.keys()
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)


def test_batches_move_to_a_device_as_a_whole(tmp_path: Path, processors: Any) -> None:
    moved = only(mixed_samples(tmp_path), processors("qwen2_vl")).to("meta")
    tensors = [*moved.inputs.values(), moved.answer_mask, moved.vision_mask]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_sorting_by_length_wastes_less_and_loses_nothing(tmp_path: Path, processors: Any) -> None:
    samples = mixed_samples(tmp_path)
    plain = list(batches(samples, processors("qwen2_vl"), batch_size=3))
    tidy = list(batches(by_length(samples), processors("qwen2_vl"), batch_size=3))
    assert sorted(i for batch in tidy for i in batch.ids) == sorted(sample.id for sample in samples)
    assert [len(batch) for batch in plain] == [3, 3, 1]

    def waste(parts: list[Batch]) -> int:
        return sum(int((~batch.attended).sum()) for batch in parts)

    assert waste(tidy) < waste(plain)


def test_batches_of_too_many_tokens_are_cut_into_even_parts_by_themselves(
    tmp_path: Path, processors: Any
) -> None:
    """How a batch is cut does not depend on the others, so ranks that share them cut alike."""
    samples, processor = by_length(mixed_samples(tmp_path)), processors("qwen2_vl")
    whole = list(batches(samples, processor, batch_size=4, most_tokens=10**6))
    assert [len(batch) for batch in whole] == [4, 3]
    cut = list(batches(samples, processor, batch_size=4, most_tokens=12))
    assert [i for batch in cut for i in batch.ids] == [i for batch in whole for i in batch.ids]
    assert max(len(batch) for batch in cut) < 4
    alone = list(batches(samples[4:], processor, batch_size=4, most_tokens=12))
    assert [batch.ids for batch in alone] == [batch.ids for batch in cut[-len(alone) :]]
    single = list(batches(samples, processor, batch_size=4, most_tokens=1))
    assert [len(batch) for batch in single] == [1] * len(samples)


def test_rows_are_cut_but_never_within_a_picture(tmp_path: Path, processors: Any) -> None:
    samples = mixed_samples(tmp_path)
    processor = processors("qwen2_vl")
    by_id = {sample.id: sample for sample in samples}
    pair = [by_id["short"], by_id["long"]]
    batch = only(pair, processor, limits=Limits(max_length=40))
    assert batch.inputs["input_ids"].shape == (2, 40)
    assert batch.inputs["attention_mask"].shape == (2, 40)
    # The answer of the long one was cut off, so none of it is left.
    assert batch.answer_mask.sum(dim=1).tolist() == [2, 0]
    with pytest.raises(DataError, match="does not fit into 8 tokens") as caught:
        only([by_id["picture"]], processor, limits=Limits(max_length=8))
    assert "sample picture" in str(caught.value)


def test_video_files_reach_the_model(tmp_path: Path, processor: Any, tiny_folder: Path) -> None:
    save_video(tmp_path / "a.mp4")
    lines = [turns([{"type": "video", "video": "a.mp4", "fps": 3.0}, text("what moves ?")])]
    (sample,) = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    batch = only([sample], processor)
    steps = int(batch.inputs["video_grid_thw"][0, 0])
    assert steps == 6 // processor.video_processor.temporal_patch_size
    model = load_float(tiny_folder, dtype=torch.float32)
    with torch.inference_mode():
        assert model(**batch.inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "time"), [("qwen3_vl", "<1.0seconds>"), ("video_llama_3", "2.0s")]
)
def test_the_rate_of_a_clip_stands_in_the_prompt(
    tmp_path: Path, processors: Any, family: str, time: str
) -> None:
    """Four frames, one every two seconds: pairs are at 1 and 5 s, single frames at 0, 2, ... s."""
    frames = [save_picture(tmp_path / f"{n}.png", seed=n).name for n in range(4)]
    lines = [turns([{"type": "video", "video": frames, "fps": 0.5}])]
    batch = only(read_samples(write_lines(tmp_path / "d.jsonl", lines)), processors(family))
    prompt = processors(family).tokenizer.decode(batch.inputs["input_ids"][0])
    assert time in prompt


def test_placeholder_tokens_in_a_text_are_refused(tmp_path: Path, processors: Any) -> None:
    lines = [{"id": "sly", **turns("what is <|image_pad|> ?")}]
    samples = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    with pytest.raises(DataError, match="0 images, but 1 placeholders") as caught:
        only(samples, processors("qwen2_vl"))
    assert "sample sly" in str(caught.value)


def test_chat_templates_that_refuse_a_conversation_are_quoted(
    tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    changed = load_processor(tiny("qwen2_vl"))
    changed.chat_template = "{{ raise_exception('roles must alternate') }}"
    samples = read_samples(write_lines(tmp_path / "data.jsonl", [turns()]))
    with pytest.raises(DataError, match="roles must alternate"):
        only(samples, changed)


def test_what_the_processor_refuses_names_the_samples(tmp_path: Path, processors: Any) -> None:
    save_picture(tmp_path / "a.png", size=(1000, 2))
    lines = [{"id": "thin", **turns([image("a.png")])}]
    samples = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    with pytest.raises(DataError, match="processor refuses the data") as caught:
        only(samples, processors("qwen2_vl"))
    assert "thin" in str(caught.value)


@pytest.mark.parametrize(
    "ran_out",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..")],
    ids=["python", "torch"],
)
def test_memory_that_runs_out_is_no_fault_of_the_sample(
    tmp_path: Path, processors: Any, monkeypatch: pytest.MonkeyPatch, ran_out: Exception
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise ran_out

    processor = processors("qwen2_vl")
    monkeypatch.setattr(type(processor), "__call__", run_out)
    samples = read_samples(write_lines(tmp_path / "data.jsonl", [turns()]))
    with pytest.raises(type(ran_out)):
        only(samples, processor)


def test_a_file_that_vanished_names_the_sample(tmp_path: Path, processors: Any) -> None:
    save_picture(tmp_path / "a.png")
    lines = [{"id": "ghost", **turns([image("a.png")])}]
    samples = read_samples(write_lines(tmp_path / "data.jsonl", lines))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="missing") as caught:
        only(samples, processors("qwen2_vl"))
    assert "sample ghost" in str(caught.value)
    with pytest.raises(DataError, match="cannot be read"):
        fingerprint(samples)


def test_a_batch_size_below_one_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="batch of 0"):
        batches([], None, batch_size=0)


def together(samples: Sequence[Sample], processor: Any) -> dict[str, torch.Tensor]:
    """All samples in one call of the processor, padded by its tokenizer."""
    given: dict[str, Any] = {"images": [], "videos": [], "metadata": []}
    for sample in samples:
        for kind, item in media_of(sample):
            files = item[kind] if isinstance(item[kind], list) else [item[kind]]
            frames = [np.asarray(Image.open(sample.folder / file)) for file in files]
            if kind == "image":
                given["images"].append(Image.fromarray(frames[0]))
                continue
            indices = [*range(len(frames)), *[len(frames) - 1] * (len(frames) == 1)]
            given["videos"].append(np.stack(frames)[indices])
            fps = float(item.get("fps", 2.0))
            given["metadata"].append(
                {"fps": fps, "total_num_frames": len(frames), "frames_indices": indices}
            )
    return dict(
        processor(
            text=[render(sample, processor).text for sample in samples],
            images=given["images"],
            videos=given["videos"],
            return_tensors="pt",
            text_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
            videos_kwargs={"do_sample_frames": False, "video_metadata": given["metadata"]},
        )
    )


def test_a_batch_is_what_the_processor_makes_of_its_samples_at_once(
    tmp_path: Path, processor: Any
) -> None:
    """To the last bit, though each sample is processed by itself."""
    samples = mixed_samples(tmp_path)
    batch, expected = only(samples, processor), together(samples, processor)
    # The only clip of one frame is lengthened for processors that take frames two by two.
    if processor.video_processor.temporal_patch_size == 1:
        samples = [sample for sample in samples if sample.id != "still"]
        batch, expected = only(samples, processor), together(samples, processor)
    assert batch.inputs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch.inputs[name], value), name


@pytest.mark.parametrize("token", [None, pytest.param("colour", marks=pytest.mark.slow)])
def test_any_token_pads(tiny: Callable[..., Path], tmp_path: Path, token: str | None) -> None:
    """A tokenizer needs none of its own, and the result has the same bytes whichever it is."""
    data, folder = tiny_vlm.samples(tmp_path / "data"), tiny("qwen2_vl")
    changed = shutil.copytree(folder, tmp_path / "changed")
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (changed / "tokenizer_config.json").write_text(
        json.dumps(settings | ({} if token is None else {"pad_token": token}))
    )
    processor = load_processor(changed)
    assert processor.tokenizer.pad_token == token
    (batch,) = batches(read_samples(data), processor)
    padding = set(batch.inputs["input_ids"][~batch.attended].tolist())
    assert len(padding) == 1
    assert not padding & {IMAGE_ID, VIDEO_ID}
    for source, out in ((folder, "plain"), (changed, "other")):
        recipe = pq.load_recipe("w4a8-static-all").with_rules({"solver": "rtn"})
        pq.quantize(source, recipe, tmp_path / out, data)
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_batches_are_made_when_they_are_asked_for(
    tmp_path: Path, processors: Callable[[str], Any]
) -> None:
    samples = mixed_samples(tmp_path)
    made = batches(samples, processors("qwen2_vl"), batch_size=2)
    assert len(made) == 4
    assert [batch.ids for batch in made[1:3]] == [made[1].ids, made[2].ids]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert len(batches(samples, processors("qwen2_vl"), batch_size=2)) == 4
    assert made[0:0].parts == ()
    with pytest.raises(DataError, match="missing"):
        made[0]


def test_rows_that_were_cut_are_named(tmp_path: Path, processors: Callable[[str], Any]) -> None:
    samples = mixed_samples(tmp_path)
    pair = [sample for sample in samples if sample.id in ("short", "long")]
    processor = processors("qwen2_vl")
    assert only(pair, processor, limits=Limits(max_length=40)).cut == ("long",)
    assert only(pair, processor).cut == ()
