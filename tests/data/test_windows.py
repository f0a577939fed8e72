"""Running text in windows: every token is in one, none in two, and perplexity is that of a book."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from hypothesis import given
from hypothesis import strategies as st

import prismquant as pq
from prismquant.data import fingerprint, read_samples
from prismquant.data.batches import make_batches
from prismquant.data.media import Limits
from prismquant.data.windows import Windows, window_remarks
from prismquant.errors import DataError
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORDS = ("red", "green", "blue", "what", "is", "it", "the", "colour", "of", "\n", "?")


def text_of_words(count: int, seed: int = 0) -> str:
    draw = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[index] for index in draw)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), length=st.integers(2, 12))
def test_windows_are_the_documents_tokens_in_their_order(
    tiny: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    length: int,
) -> None:
    folder = tiny("llama")
    tokenizer = load_processor(folder).tokenizer
    documents = [text_of_words(size, seed) for seed, size in enumerate(sizes)]
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text("\n\f\n".join(documents))
    # The line's end before a form feed belongs to the document.
    stored = [*(f"{text}\n" for text in documents[:-1]), documents[-1]]
    tokens = [tokenizer(text)["input_ids"] for text in stored]
    if max(map(len, tokens)) < 2:
        with pytest.raises(DataError, match="no two tokens"):
            read_samples(file, windows=Windows(folder, length))
        return
    samples = read_samples(file, windows=Windows(folder, length))
    for number, own in enumerate(tokens, start=1):
        parts = [s.window for s in samples if s.window and s.window.document == f"a-{number}"]
        joined = [token for part in parts for token in part.tokens]
        whole = len(own) // length * length
        if whole:
            assert [len(part.tokens) for part in parts] == [length] * (whole // length)
            assert joined == own[:whole]
            assert {part.left for part in parts} == {len(own) - whole}
        else:
            assert joined == (own if len(own) > 1 else [])
            assert all(part.short and not part.left for part in parts)
    assert len({sample.id for sample in samples}) == len(samples)


def test_batches_hold_the_windows_and_nothing_else(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny("llama")
    (tmp_path / "a.txt").write_text(text_of_words(50))
    samples = read_samples(tmp_path / "a.txt", windows=Windows(folder, 8))
    (batch,) = make_batches(samples, load_processor(folder), batch_size=9, vision_token_ids=())
    windows = [list(sample.window.tokens) for sample in samples if sample.window]
    assert batch.inputs["input_ids"].tolist() == windows
    assert batch.answer_mask.all()
    assert batch.attended.all()
    assert all(batch.running)
    shorter = Limits(max_length=5)
    (cut,) = make_batches(
        samples, load_processor(folder), batch_size=9, vision_token_ids=(), limits=shorter
    )
    assert cut.answer_mask.shape[1] == 5
    assert cut.answer_mask.all()
    assert len(cut.cut) == len(samples)


def test_a_whole_document_is_a_sample_where_nobody_cuts_it(
    tiny: Callable[..., Path], processors: Callable[[str], Any], tmp_path: Path
) -> None:
    """Of a vision-language model, too: without its chat template."""
    (tmp_path / "a.txt").write_text("what is it")
    processor = processors("qwen2_vl")
    (batch,) = make_batches(
        read_samples(tmp_path / "a.txt"), processor, batch_size=2, vision_token_ids=(5, 6)
    )
    assert batch.inputs["input_ids"][0].tolist() == processor.tokenizer("what is it")["input_ids"]
    (tmp_path / "a.txt").write_text("what is <|image_pad|> it")
    with pytest.raises(DataError, match="placeholder of a picture"):
        next(
            iter(
                make_batches(
                    read_samples(tmp_path / "a.txt"),
                    processor,
                    batch_size=2,
                    vision_token_ids=(5, 6),
                )
            )
        )


def test_what_is_left_out_is_told(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red green blue red green\n\f\nred blue\n\f\nred red red red")
    samples = read_samples(tmp_path / "a.txt", windows=Windows(tiny("llama"), 4))
    assert window_remarks(samples) == (
        "running text: 2 windows of 4 tokens; documents shorter than a window, taken whole: 1; "
        "tokens at documents' ends that fill no window, left out: 2",
    )
    assert window_remarks([replace(one, window=None) for one in samples]) == ()


def test_a_limit_tells_what_it_leaves_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("llama")
    text = text_of_words(30)
    (tmp_path / "a.txt").write_text(f"{text}\f red")
    count = len(load_processor(folder).tokenizer(f"{text}\f red")["input_ids"])
    whole, windows = count // 8, Windows(folder, 8)
    feeds = (
        "running text: form feeds that do not stand alone on their line are text and end no "
        "document: 1"
    )
    assert window_remarks(read_samples(tmp_path / "a.txt", limit=2, windows=windows)) == (
        f"running text: 2 of {whole} windows of 8 tokens; tokens left out, in windows not used and "
        f"at documents' ends: {count - 16} of {count}",
        feeds,
    )
    (tmp_path / "b.txt").write_text("red\n\f\nred blue\n\f\ngreen red")
    (told,) = window_remarks(read_samples(tmp_path / "b.txt", limit=1, windows=windows))
    assert told.startswith("running text: documents shorter than a window, taken whole: 1 of 3; ")


def test_lengths_that_are_impossible_or_idle_are_refused(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny("llama")
    (tmp_path / "a.txt").write_text(text_of_words(30))
    with pytest.raises(DataError, match="2000 tokens are impossible: the model has 1024"):
        read_samples(tmp_path / "a.txt", windows=Windows(folder, 2000))
    chats = tiny_vlm.samples(tmp_path, kinds=("text",))
    assert len(read_samples(chats, windows=Windows(folder))) == 6
    with pytest.raises(DataError, match="the data hold conversations") as caught:
        read_samples(chats, windows=Windows(folder, 8))
    assert "--seq-length" in str(caught.value.remedy)


def test_other_windows_are_other_data(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("llama")
    (tmp_path / "a.txt").write_text(text_of_words(64))
    prints = {
        fingerprint(read_samples(tmp_path / "a.txt", windows=Windows(folder, length)))
        for length in (8, 16, 32)
    }
    assert len(prints) == 3


def test_a_limit_counts_windows(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text_of_words(80))
    windows = Windows(tiny("llama"), 8)
    assert len(read_samples(tmp_path / "a.txt", limit=3, windows=windows)) == 3


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_models_own_loss(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As published: the text's tokens in rows of equal length, transformers' loss of each row."""
    folder, out = tiny("llama"), tmp_path / "out"
    text = text_of_words(100)
    (tmp_path / "book.txt").write_text(text)
    quantized = pq.quantize(folder, "w4a16", out, tmp_path / "book.txt", seq_length=16)
    assert any(line.startswith("running text: ") for line in quantized.plan.remarks)
    result = pq.measure(out, tmp_path / "book.txt", reference=folder, seq_length=16, batch_size=3)
    tokens = torch.tensor(load_processor(folder).tokenizer(text)["input_ids"])
    rows = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    auto = import_transformers().AutoModelForCausalLM
    for model, found in (
        (load_float(folder), result.overall.reference_perplexity),
        (auto.from_pretrained(out, dtype=torch.float32).eval(), result.overall.perplexity),
    ):
        losses = [float(model(row[None], labels=row[None]).loss) for row in rows]
        assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert result.overall.exact_match is None
    assert result.overall.answer_tokens == len(rows) * 15
    assert result.notes[0].startswith(f"running text: {len(rows)} windows of 16 tokens")
    with pytest.raises(DataError, match="no answers that could be decoded"):
        pq.measure(out, tmp_path / "book.txt", generated=True)


def test_conversations_have_no_perplexity(tiny: Callable[..., Path], tmp_path: Path) -> None:
    chats = tiny_vlm.samples(tmp_path, kinds=("text",))
    result = pq.measure(tiny("llama"), chats)
    assert result.overall.perplexity is None
    assert result.overall.exact_match is not None
