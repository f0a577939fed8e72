"""Figures of an evaluation agree with brute force in float64, and with greedy decoding."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny_vlm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.errors import DataError, ModelError, NumericsError
from prismquant.evaluate.fidelity import evaluate_model, normalize_answer, prompt_inputs
from prismquant.evaluate.figures import Deviation, Fidelity, Outcome, summarize
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

VOCABULARY = 11
VISION = 10


class Table(nn.Module):
    """Logits that depend on the token and its position, as a table: all that a model is here."""

    def __init__(self, seed: int, scale: float = 2.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(
            scale * torch.randn(40, VOCABULARY, VOCABULARY, generator=generator)
        )
        self.widths: list[int] = []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Any = 0, **_: Any
    ) -> SimpleNamespace:
        places = torch.arange(input_ids.shape[1])[None, :]
        logits = self.weight[places, input_ids]
        if isinstance(logits_to_keep, Tensor):
            logits = logits[:, logits_to_keep]
        self.widths.append(logits.shape[1])
        return SimpleNamespace(logits=logits)


class Plain(nn.Module):
    """The same without the option to compute a part of the logits only."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids, attention_mask).logits)


def make_batch(rows: Sequence[tuple[list[int], int]], first: int = 0, **changes: Any) -> Batch:
    """Rows of (tokens, number of answer tokens); one more token, a line end, follows those."""
    width = max(len(tokens) for tokens, _ in rows) + 1
    ids, attention = torch.zeros(2, len(rows), width, dtype=torch.long)
    answer = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (tokens, count) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        attention[row, : len(tokens)] = 1
        answer[row, len(tokens) - 1 - count : len(tokens) - 1] = True
    names = tuple(str(first + row) for row in range(len(rows)))
    kinds = tuple("image" if VISION in tokens else "text" for tokens, _ in rows)
    batch = Batch(
        {"input_ids": ids, "attention_mask": attention}, answer, ids == VISION, names, kinds
    )
    return replace(batch, **changes)


ROWS = [
    ([1, VISION, VISION, VISION, 2, 3, 4, 5, 1], 2),
    ([1, 2, 3, 4, 1], 1),
    ([2, VISION, 7, 8, 9, 9, 3, 1], 3),
    ([3, 3, 5, 1], 0),
]


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def brute_force(model: Table, reference: Table) -> dict[str, Any]:
    """Every figure, one token at a time in float64."""
    tables = [m.weight.detach().double().numpy() for m in (model, reference)]
    kl: dict[str, list[list[float]]] = {"answer": [], "text": [], "vision": []}
    agreed: dict[str, list[bool]] = {"answer": [], "text": [], "vision": []}
    nll, exact = [], []
    for tokens, count in ROWS:
        mine: dict[str, list[float]] = {"answer": [], "text": [], "vision": []}
        losses, right = [], []
        for place in range(len(tokens) - 1):
            q, p = (log_softmax(table[place, tokens[place]]) for table in tables)
            is_answer = len(tokens) - 1 - count <= place + 1 < len(tokens) - 1
            name = "answer" if is_answer else "vision" if tokens[place] == VISION else "text"
            mine[name].append(float((np.exp(p) * (p - q)).sum()))
            agreed[name].append(bool(p.argmax() == q.argmax()))
            if is_answer:
                losses.append(-float(q[tokens[place + 1]]))
                right.append(bool(q.argmax() == tokens[place + 1]))
        for name, values in mine.items():
            if values:
                kl[name].append(values)
        if count:
            nll.append(losses)
            exact.append(all(right))
    return {"kl": kl, "agreed": agreed, "nll": nll, "exact": exact}


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("plain", [False, True])
def test_every_figure_agrees_with_brute_force(chunk: int, plain: bool) -> None:
    model, reference = Table(0), Table(1)
    truth = brute_force(model, reference)
    batches = [make_batch(ROWS[:3]), make_batch(ROWS[3:], first=3)]
    pair = (Plain(model), Plain(reference)) if plain else (model, reference)
    result = evaluate_model(pair[0], batches, pair[1], chunk=chunk)
    overall = result.overall
    flat = [loss for losses in truth["nll"] for loss in losses]
    assert (overall.samples, overall.answers, overall.answer_tokens) == (4, 3, len(flat))
    assert overall.nll_token == pytest.approx(np.mean(flat), rel=1e-12)
    assert overall.nll_answer == pytest.approx(sum(flat) / 3, rel=1e-12)
    assert overall.exact_match == pytest.approx(np.mean(truth["exact"]))
    assert set(overall.divergence) == {"answer", "text", "vision"}
    for name, part in overall.divergence.items():
        values = [value for row in truth["kl"][name] for value in row]
        assert part.tokens == len(values)
        assert part.kl == pytest.approx(np.mean(values), rel=1e-12)
        assert part.top1 == pytest.approx(np.mean(truth["agreed"][name]))
    # Padding and each row's last token are in no class.
    assert sum(part.tokens for part in overall.divergence.values()) == sum(
        len(tokens) - 1 for tokens, _ in ROWS
    )
    assert set(result.by_kind) == {"text", "image"}
    assert result.by_kind["image"].answers == 2
    assert result.by_kind["text"].samples == 2


def test_figures_do_not_depend_on_batches_or_on_padding() -> None:
    model, reference = Table(0), Table(1)
    together = evaluate_model(model, [make_batch(ROWS)], reference)
    alone = [make_batch([row], first=number) for number, row in enumerate(ROWS)]
    assert evaluate_model(model, alone, reference) == together
    padded = make_batch([*ROWS, ([1] * 30, 1)])
    wide = evaluate_model(model, [padded], reference)
    assert wide.outcomes[:4] == together.outcomes


def test_a_model_beside_itself_does_not_diverge() -> None:
    result = evaluate_model(Table(0), [make_batch(ROWS)], Table(0))
    assert all(part.kl == 0.0 for part in result.overall.divergence.values())
    assert all(part.top1 == 1.0 for part in result.overall.divergence.values())
    assert result.right_to_wrong == result.wrong_to_right == ()


def test_a_tiny_divergence_is_not_lost_in_rounding() -> None:
    """A change of logits by d moves KL by d^2 / 2 times a variance; here that is near 1e-13."""
    model, reference = Table(0, scale=1.0).double(), Table(0, scale=1.0).double()
    with torch.no_grad():
        model.weight[..., 0] += 1e-6
    truth = brute_force(model, reference)
    values = [value for row in truth["kl"]["answer"] for value in row]
    part = evaluate_model(model, [make_batch(ROWS)], reference).overall.divergence["answer"]
    assert 0 < part.kl < 1e-12
    assert part.kl == pytest.approx(np.mean(values), rel=1e-2)


def test_answers_alone_need_no_reference_and_few_logits() -> None:
    model = Table(0)
    with_reference = evaluate_model(Table(0), [make_batch(ROWS)], Table(1))
    result = evaluate_model(model, [make_batch(ROWS)])
    assert result.overall.nll_token == with_reference.overall.nll_token
    assert result.overall.exact_match == with_reference.overall.exact_match
    assert result.overall.divergence == {}
    assert result.overall.reference_nll_token is None
    # Only columns that predict an answer token of any row are computed.
    assert model.widths == [5]


def forced(choices: dict[tuple[int, int], int]) -> Table:
    """A table that finds one token most probable at given (place, token)."""
    table = Table(3, scale=0.1)
    with torch.no_grad():
        for (place, token), choice in choices.items():
            table.weight[place, token, choice] += 10
    return table


def test_flips_are_named_each_way() -> None:
    rows = [([1, 2, 5, 6, 1], 2), ([1, 3, 5, 6, 1], 2), ([1, 4, 5, 6, 1], 2)]
    shared = {(1, 4): 5, (2, 5): 6}
    model = forced({**shared, (1, 2): 5, (1, 3): 7})
    reference = forced({**shared, (1, 2): 7, (1, 3): 5})
    batch = make_batch(rows, ids=("gained", "lost", "kept"), types=("a", "b", ""))
    result = evaluate_model(model, [batch], reference)
    assert result.right_to_wrong == ("lost",)
    assert result.wrong_to_right == ("gained",)
    assert result.overall.exact_match == pytest.approx(2 / 3)
    assert result.overall.reference_exact_match == pytest.approx(2 / 3)
    assert {name: part.exact_match for name, part in result.by_type.items()} == {"a": 1, "b": 0}


def test_one_wrong_token_spoils_an_answer_and_so_does_its_end() -> None:
    rows = [([1, 2, 5, 6, 1], 2)]
    assert (
        evaluate_model(forced({(1, 2): 5, (2, 5): 6}), [make_batch(rows)]).overall.exact_match == 1
    )
    for broken in ({(1, 2): 4, (2, 5): 6}, {(1, 2): 5, (2, 5): 4}):
        assert evaluate_model(forced(broken), [make_batch(rows)]).overall.exact_match == 0


deviations = st.builds(
    Deviation, tokens=st.integers(1, 50), kl=st.floats(0, 10), agreed=st.integers(0, 1)
)


def outcome(number: int, deviation: Deviation) -> Outcome:
    return Outcome(
        str(number), "text", "", 2, 1.5, True, None, 1.0, False, None, {"answer": deviation}
    )


@given(st.lists(deviations, min_size=2, max_size=20))
def test_the_standard_error_is_that_of_a_ratio(parts: list[Deviation]) -> None:
    result = summarize([outcome(number, part) for number, part in enumerate(parts)])
    part = result.overall.divergence["answer"]
    tokens = np.array([p.tokens for p in parts], dtype=np.float64)
    kl = np.array([p.kl for p in parts])
    assert part.kl == pytest.approx(kl.sum() / tokens.sum(), rel=1e-9)
    residuals = kl - part.kl * tokens
    spread = math.sqrt((residuals**2).sum() / (len(parts) - 1) / len(parts))
    assert part.kl_error == pytest.approx(spread / tokens.mean(), rel=1e-9, abs=1e-12)


def test_with_equal_lengths_the_error_is_the_ordinary_one() -> None:
    values = [0.1, 0.4, 0.2, 0.9]
    parts = [Deviation(3, 3 * value, 0) for value in values]
    part = summarize([outcome(i, p) for i, p in enumerate(parts)]).overall.divergence["answer"]
    assert part.kl_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert summarize([outcome(0, parts[0])]).overall.divergence["answer"].kl_error is None


def test_results_survive_json() -> None:
    batch = make_batch(ROWS, types=("count", "", "count", "colour"))
    result = evaluate_model(Table(0), [batch], Table(1))
    assert Fidelity.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    with pytest.raises(DataError, match="no result of an evaluation"):
        Fidelity.from_dict({"overall": {}})
    with pytest.raises(DataError, match="no result of an evaluation"):
        Fidelity.from_dict({"outcomes": [{"id": "a", "deviations": {}}]})


def test_ruled_out_tokens_do_not_make_the_divergence_undefined() -> None:
    model, reference = Table(0), Table(1)
    with torch.no_grad():
        model.weight[..., 0] = -torch.inf
        reference.weight[..., 0] = -torch.inf
    part = evaluate_model(model, [make_batch(ROWS)], reference).overall.divergence["text"]
    assert 0 < part.kl < 10


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", ["model", "reference"])
def test_logits_that_are_not_finite_name_the_sample(value: float, whose: str) -> None:
    tables = {"model": Table(0), "reference": Table(1)}
    with torch.no_grad():
        tables[whose].weight[4, 9] = value  # only the third row reads 9 there
    with pytest.raises(NumericsError, match=f"the {whose}'s logits") as caught:
        evaluate_model(tables["model"], [make_batch(ROWS)], tables["reference"], chunk=2)
    assert "sample 2" in str(caught.value)


def test_models_of_different_vocabularies_are_not_compared() -> None:
    reference = Table(0)
    reference.weight = nn.Parameter(torch.randn(40, VOCABULARY, VOCABULARY + 1))
    with pytest.raises(ModelError, match="11 tokens and its reference 12"):
        evaluate_model(Table(0), [make_batch(ROWS)], reference)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        evaluate_model(Table(0), [])
    with pytest.raises(DataError, match="no sample has an answer"):
        evaluate_model(Table(0), [make_batch(ROWS[3:])])
    assert evaluate_model(Table(0), [make_batch(ROWS[3:])], Table(1)).overall.exact_match is None
    with pytest.raises(DataError, match="processor"):
        evaluate_model(Table(0), [make_batch(ROWS)], generated=True)


def test_progress_is_told_and_modes_are_restored() -> None:
    model, reference, told = Table(0).train(), Table(1).eval(), []
    evaluate_model(
        model, [make_batch(ROWS), make_batch(ROWS[:1], 4)], reference, progress=told.append
    )
    assert told == [4, 5]
    assert model.training
    assert not reference.training


@pytest.mark.parametrize(
    ("text", "plain"),
    [(" Red. ", "red"), ("red", "red"), ("A b.c", "a b.c"), ("STRASSE", "strasse"), (". ", "")],
)
def test_normalized_answers(text: str, plain: str) -> None:
    assert normalize_answer(text) == plain


def test_prompts_are_padded_on_the_left_and_end_before_the_answer() -> None:
    batch = make_batch(ROWS)
    batch.inputs["pixel_values"] = torch.ones(3, 5)
    prompts = prompt_inputs(batch)
    assert torch.equal(prompts["pixel_values"], torch.ones(3, 5))
    for row, (tokens, count) in enumerate(ROWS):
        prompt = tokens[: len(tokens) - 1 - count] if count else tokens
        attended = prompts["attention_mask"][row].bool()
        assert prompts["input_ids"][row][attended].tolist() == prompt
        assert attended[-len(prompt) :].all()
        assert not attended[: -len(prompt)].any()


# Real models


def taught(folder: Path, batch: Batch) -> nn.Module:
    """A model that was trained on the first half of a batch until it knows the answers by heart."""
    model = load_float(folder, dtype=torch.float32).train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    half = torch.zeros(len(batch), 1, dtype=torch.bool)
    half[: len(batch) // 2] = True
    targets = (batch.answer_mask & half)[:, 1:]
    for _ in range(12):
        logits = model(**batch.inputs).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits[targets], batch.inputs["input_ids"][:, 1:][targets]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def test_teacher_forcing_and_greedy_decoding_agree(
    tiny: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """A model knows some answers and not others; both ways must find the same ones right."""
    path = tiny_vlm.samples(tmp_path, count=8)
    # The second half has answers of two words that the model has never seen.
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[4:]:
        line["messages"][1]["content"] += " square"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    folder = tiny(family)
    processor = load_processor(folder)
    samples = read_samples(path, require_answers=True)
    options: dict[str, Any] = {"vision_token_ids": (5, 6)}
    (batch,) = make_batches(samples, processor, batch_size=8, **options)
    model, reference = taught(folder, batch), load_float(folder, dtype=torch.float32)
    parts = list(make_batches(samples, processor, batch_size=5, **options))
    result = evaluate_model(model, parts, reference, generated=True, processor=processor)
    exact = [o.exact for o in result.outcomes]
    assert exact == [o.generated for o in result.outcomes]
    assert [o.reference_exact for o in result.outcomes] == [
        o.reference_generated for o in result.outcomes
    ]
    assert exact == [True] * 4 + [False] * 4
    assert result.overall.generated_match == result.overall.exact_match == 0.5
    assert set(result.wrong_to_right) == {
        o.id for o in result.outcomes[:4] if not o.reference_exact
    }
    assert set(result.by_kind) == {"text", "image", "video"}
    # One batch or several: the same figures up to float32's rounding inside the model.
    whole = evaluate_model(model, [batch], reference).overall
    for name, part in whole.divergence.items():
        assert result.overall.divergence[name].kl == pytest.approx(part.kl, rel=1e-4)
