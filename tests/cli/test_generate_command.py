"""`prismquant generate`: what a person asks, and what is answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import prismquant as pq
from prismquant.errors import DataError
from prismquant.evaluate.ask import Decoding, Question, ask

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def quantized(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("asked") / "out"
    pq.quantize(tiny("qwen2_vl"), "w4a16", out, solver="rtn")
    return out


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    Image.new("RGB", (56, 56), "red").save(path)
    return str(path)


def test_a_packed_model_is_asked_beside_its_reference(
    tiny: Callable[..., Path], quantized: Path, picture: str, run: Cli
) -> None:
    words = ["generate", str(quantized), "--packed", "--prompt", "a b", "--image", picture]
    words += ["--reference", str(tiny("qwen2_vl")), "--max-new-tokens", "3"]
    code, out, _ = run(*words, "--json")
    assert code == 0
    told = json.loads(out)
    assert list(told) == [str(tiny("qwen2_vl")), str(quantized)]
    for reply in told.values():
        assert 1 <= reply["tokens"] <= 3
        assert reply["prompt_tokens"] > 4
    assert [len(reply["kernels"]) for reply in told.values()] == [0, 1]
    code, out, _ = run(*words, "--show-kernels")
    assert code == 0
    assert "int4 g128 sym" in out
    assert "tokens read" in out


def test_packed_and_dequantized_answers_are_the_same(quantized: Path, picture: str) -> None:
    question = Question("a b c", images=(picture,))
    for decoding in (Decoding(6), Decoding(6, temperature=0.9, top_p=0.8, seed=3)):
        replies = [ask(quantized, question, decoding, packed=packed) for packed in (True, False)]
        assert replies[0].text == replies[1].text
        assert replies[0].tokens == replies[1].tokens


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--show-kernels"], "add --packed"),
        (["--top-p", "0.5"], "add --temperature"),
        (["--dtype", "int8"], "dtype"),
        (["--image", "nowhere.png"], "nowhere.png"),
    ],
)
def test_what_cannot_be_is_told(quantized: Path, words: list[str], said: str, run: Cli) -> None:
    code, out, err = run("generate", quantized, "--prompt", "a", *words)
    assert code != 0
    assert said in err
    assert not out


def test_the_text_must_not_hold_placeholders(quantized: Path) -> None:
    with pytest.raises(DataError, match="placeholders"):
        ask(quantized, Question("<|image_pad|>"), Decoding(1))
