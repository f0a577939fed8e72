"""Calibration samples from datasets as VLMEvalKit and its wrappers make them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from prismquant.compat.mquant.prompts import samples_of_prompts
from prismquant.data import Sample
from prismquant.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from pathlib import Path

BARE = SimpleNamespace()


def dataset(*prompts: Any) -> Any:
    """A dataset whose rows are its prompts."""
    return SimpleNamespace(data=SimpleNamespace(iloc=prompts), build_prompt=lambda row: row)


def read(*prompts: Any, wrapper: Any = BARE, count: int = 8) -> tuple[Sample, ...]:
    return samples_of_prompts(dataset(*prompts), "Tiny_VAL", wrapper, count)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(path)
    return str(path)


def test_items_become_one_question(picture: str) -> None:
    items = [{"type": "image", "value": picture}, {"type": "text", "value": "what <image> is ?"}]
    (sample,) = read(items)
    assert (sample.id, sample.kind) == ("Tiny_VAL-0", "image")
    content = [
        {"type": "image", "image": picture},
        {"type": "text", "text": "what <image> is ?"},
    ]
    assert sample.messages == ({"role": "user", "content": content},)


def test_every_form_of_a_prompt_is_understood(picture: str) -> None:
    shown = {"type": "image", "image": picture}
    asked = {"type": "text", "text": "what is it ?"}
    forms: list[Any] = [
        [picture, "what is it ?"],
        [{"type": "image", "value": picture}, "what is it ?"],
        [shown, asked],
        [{"role": "user", "content": [{"type": "image", "value": picture}, asked]}],
    ]
    for form in forms:
        (sample,) = read(form)
        assert sample.messages == ({"role": "user", "content": [shown, asked]},)
    (sample,) = read("what is it ?")
    assert sample.kind == "text"
    roles = [
        {"type": "text", "value": text, "role": role}
        for role, text in (("system", "be brief"), ("user", "why ?"))
    ]
    (sample,) = read(roles)
    assert [message["role"] for message in sample.messages] == ["system", "user"]


def test_the_first_rows_are_taken_in_their_order() -> None:
    found = read("one", "two", "three", count=2)
    assert [sample.id for sample in found] == ["Tiny_VAL-0", "Tiny_VAL-1"]
    assert len(read("one", "two", "three")) == 3


def test_tables_of_pandas_are_read_row_by_row(picture: str) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"image_path": [picture] * 3, "question": ["a ?", "b ?", "c ?"]})
    given = SimpleNamespace(
        data=table, build_prompt=lambda row: [row["image_path"], row["question"]]
    )
    found = samples_of_prompts(given, None, BARE, 8)
    assert [sample.id for sample in found] == ["sample-0", "sample-1", "sample-2"]
    assert [sample.messages[0]["content"][1]["text"] for sample in found] == ["a ?", "b ?", "c ?"]


def test_a_wrappers_own_prompts_and_contents_count(picture: str) -> None:
    def prepare(items: list[dict[str, Any]], dataset: str) -> list[dict[str, Any]]:
        """Like VLMEvalKit's wrapper of Qwen2-VL."""
        assert dataset == "Tiny_VAL"
        return [
            {"type": "image", "image": f"file://{item['value']}", "min_pixels": 64}
            if item["type"] == "image"
            else {"type": "text", "text": item["value"]}
            for item in items
        ]

    wrapper = SimpleNamespace(
        use_custom_prompt=lambda name: name == "Tiny_VAL",
        build_prompt=lambda row, dataset: [picture, f"{row} of {dataset}"],
        system_prompt="be brief",
        _prepare_content=prepare,
    )
    (sample,) = read("row", wrapper=wrapper)
    system, user = sample.messages
    assert (system["role"], system["content"]) == ("system", "be brief")
    image, text = user["content"]
    assert (image["image"], image["min_pixels"]) == (picture, 64)
    assert text["text"] == "row of Tiny_VAL"


def test_what_cannot_be_used_is_told(picture: str) -> None:
    with pytest.raises(ArgumentError, match="is no dataset"):
        samples_of_prompts(SimpleNamespace(data=[1]), None, BARE, 1)
    with pytest.raises(DataError, match="holds no samples"):
        read()
    with pytest.raises(DataError, match="build_prompt gave a NoneType"):
        read(None)
    with pytest.raises(DataError, match=r"Tiny_VAL-1: .*missing\.png"):
        read("fine", [{"type": "image", "value": f"{picture}.missing.png"}])
    with pytest.raises(DataError, match="audio"):
        read([{"type": "audio", "value": "a.wav"}])
