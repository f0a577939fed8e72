"""Where the answer of a conversation stands, whatever template and tokenizer make of it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from tiny_data import text, turns, write_lines

import prismquant as pq
from prismquant.data import batches, read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.data.spans import NoSpan, Rendered, answer_span
from prismquant.models.processor import load_processor
from prismquant.quantization import perform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
# As Qwen3-VL-Thinking: the prompt ends with an open thought, and an answer without one gets an
# empty one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Asks in one way and writes in another.
OTHERWISE = TURNS + "{% endfor %}{% if add_generation_prompt %}<|im_start|>bot:\n{% endif %}"
# No token ends the answer.
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
# The answer is changed, so that nothing tells where it stands.
UPSIDE_DOWN = "{% for m in messages[::-1] %}{{ m['content'] | upper }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer makes one token of two newlines."""
    path = tmp_path_factory.mktemp("merging") / "model"
    shutil.copytree(tiny("qwen2_vl"), path)
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"]["\n\n"] = len(content["model"]["vocab"])
    split = content["pre_tokenizer"]["pretokenizers"][1]
    split["pattern"] = {"Regex": r"\n+|\d|[^\sA-Za-z\d]"}
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def batch_of(folder: Path, template: str | None, path: Path, *lines: Any) -> tuple[Batch, Any]:
    processor = load_processor(folder)
    if template is not None:
        processor.chat_template = template
    samples = read_samples(write_lines(path / "data.jsonl", lines))
    (batch,) = make_batches(samples, processor, batch_size=8, vision_token_ids=(5, 6))
    return batch, processor


def answers(batch: Batch, processor: Any) -> list[list[str]]:
    return [
        processor.tokenizer.convert_ids_to_tokens(ids[mask].tolist())
        for ids, mask in zip(batch.inputs["input_ids"], batch.answer_mask, strict=True)
    ]


def test_a_token_of_both_prompt_and_answer_belongs_to_the_answer(
    folder: Path, tmp_path: Path
) -> None:
    lines = [turns(answer="red"), turns(answer="\nred"), turns(answer=[text("\n\nred")])]
    batch, processor = batch_of(folder, None, tmp_path, *lines)
    assert answers(batch, processor) == [
        ["red", "<|im_end|>"],
        ["\n\n", "red", "<|im_end|>"],
        ["<unk>", "red", "<|im_end|>"],  # three newlines, which this vocabulary does not know
    ]
    assert batch.unknown == {}


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (THINKING, ["\n\n", "<", "<unk>", "<unk>", ">", "\n\n", "red", "<|im_end|>"]),
        (OTHERWISE, ["red", "<|im_end|>"]),
    ],
)
def test_templates_that_write_answers_in_their_own_way(
    folder: Path, tmp_path: Path, template: str, answer: list[str]
) -> None:
    """What follows the prompt, even where a token reaches into it; else what is in its place."""
    batch, processor = batch_of(folder, template, tmp_path, turns(), turns("how many ?"))
    assert answers(batch, processor) == [answer, answer]


@pytest.mark.parametrize(
    ("template", "reason"),
    [(ENDLESS, "no special token"), (UPSIDE_DOWN, "does not continue its own prompt")],
)
def test_an_answer_that_cannot_be_told_leaves_the_sample_without(
    folder: Path, tmp_path: Path, template: str, reason: str
) -> None:
    batch, _ = batch_of(folder, template, tmp_path, {"id": "a", **turns()})
    assert not batch.answer_mask.any()
    assert reason in batch.unknown["a"]


def test_a_tokenizer_without_offsets_is_asked_for_both_texts(folder: Path, tmp_path: Path) -> None:
    """The prompt's tokens must then be the first of the whole."""

    class Plain:
        added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer
            self.all_special_ids = tokenizer.all_special_ids

        def __call__(self, words: str, **options: Any) -> Any:
            return self._tokenizer(words, **options)

    lines = [turns(answer="red"), turns(answer="\nred")]
    batch, processor = batch_of(folder, None, tmp_path, *lines)
    plain = type("P", (), {"tokenizer": Plain(processor.tokenizer)})
    prompt = "<|im_start|>user\nwhat is it ?<|im_end|>\n<|im_start|>assistant\n"
    for row, end in enumerate(("red", "\nred")):
        rendered = Rendered(f"{prompt}{end}<|im_end|>\n", len(prompt))
        tokens = batch.inputs["input_ids"][row][batch.attended[row]].tolist()
        if row == 0:
            first, last = answer_span(tokens, rendered, plain)
            assert batch.answer_mask[0].nonzero().flatten().tolist() == list(range(first, last))
        else:
            with pytest.raises(NoSpan, match="not the first tokens"):
                answer_span(tokens, rendered, plain)


def hide(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Let answers of these words be some that cannot be told apart."""

    def span(tokens: Any, rendered: Rendered, processor: Any) -> tuple[int, int]:
        if rendered.text[rendered.start :].startswith(words):
            raise NoSpan("nobody knows")
        return answer_span(tokens, rendered, processor)

    monkeypatch.setattr(batches, "answer_span", span)


def test_statistics_need_no_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same checkpoint, whether answers can be told apart or not, and no word of it."""
    lines = [turns(answer="red"), turns("how many ?", answer="\nred")]
    data = write_lines(tmp_path / "data.jsonl", lines)
    pq.quantize(folder, "w4a8-static", tmp_path / "known", data)
    hide(monkeypatch, "red", "\nred")
    result = pq.quantize(folder, "w4a8-static", tmp_path / "unknown", data)
    assert not any("answer" in remark for remark in result.plan.remarks)
    for path in (tmp_path / "known").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "unknown" / path.name).read_bytes()


def test_evaluation_leaves_such_samples_out_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"id": "a", **turns()}, {"id": "b", **turns(answer="blue")}]
    data = write_lines(tmp_path / "data.jsonl", lines)
    hide(monkeypatch, "blue")
    result = pq.measure(folder, data, reference=folder)
    assert (result.overall.samples, result.overall.answers) == (2, 1)
    assert [outcome.answer_tokens for outcome in result.outcomes] == [2, 0]
    assert result.notes == (
        "1 sample (b) is left out of what looks at answers, as it cannot be told where theirs "
        "begin: nobody knows",
    )
    assert type(result).from_dict(result.to_dict()) == result


def test_gradients_leave_such_samples_out_and_say_so(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = read_samples(calibration_file)
    last = samples[-1]
    assert last.kind == "video"
    assert last.answer is not None
    seen: list[str] = []

    def weights(plan: Any, bound: Any, given: Sequence[Batch], *_: Any) -> dict[str, float]:
        seen.extend(name for batch in given for name in batch.ids)
        return {}

    monkeypatch.setattr(perform, "vision_weights", weights)
    hide(monkeypatch, last.answer)
    gradient = {"match": {"modality": "llm"}, "vision_weight": "gradient"}
    recipe = pq.load_recipe("w4a16").with_rules(gradient)
    result = pq.quantize(tiny("qwen2_vl"), recipe, tmp_path / "out", calibration_file)
    hidden = {sample.id for sample in samples if sample.answer == last.answer}
    shown = {sample.id for sample in samples if sample.kind != "text"}
    assert set(seen) == shown - hidden
    (remark,) = [line for line in result.plan.remarks if "looks at answers" in line]
    assert last.id in remark
