"""The training tool makes models of its families, and packs rows that ask as one question does."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from prismquant.demo import scenes

if TYPE_CHECKING:
    from pathlib import Path

training = pytest.importorskip("tools.train_demo_model", reason="runs in the source tree only")
pytestmark = pytest.mark.slow

NEW = ("qwen3_vl_moe", "qwen3_5")


def rows(count: int) -> list[Any]:
    """Samples of all kinds with up to ten questions each."""
    return [
        scenes.make_sample(kind, scenes.sample_rng("train", 0, index), 1.0, 10)
        for index in range(count)
        for kind in training.KINDS
    ]


def logits(run: Any, model: Any, samples: list[Any]) -> torch.Tensor:
    """What a model says to the answers of samples, a row for each sample."""
    with torch.no_grad():
        found: torch.Tensor = training.answer_logits(model, run.family, run.packer.pack(samples))[0]
    return found


@pytest.fixture(scope="module", params=NEW)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two steps."""
    out = tmp_path_factory.mktemp(request.param)
    run = training.Run(training.Settings(request.param, steps=2, warmup=1), out)
    run.train(report_every=1, save_every=1, measure_every=10, per_kind=10)
    return run


def test_two_steps_leave_a_checkpoint_that_transformers_loads(trained: Any) -> None:
    folder: Path = trained.out / "checkpoint"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == trained.settings.family
    auto = training.transformers.AutoModelForImageTextToText
    loaded = auto.from_pretrained(folder, dtype=torch.float32).eval()
    shipped = copy.deepcopy(trained.model).eval()
    with torch.no_grad():
        for value in shipped.parameters():
            value.copy_(value.to(torch.bfloat16))
    samples = rows(2)
    assert torch.equal(logits(trained, loaded, samples), logits(trained, shipped, samples))
    processor = training.transformers.AutoProcessor.from_pretrained(folder)
    training.check_against_processor(loaded, trained.family, trained.packer, processor, 0)


def test_a_run_goes_on_where_it_was_saved(trained: Any) -> None:
    again = training.Run(trained.settings, trained.out)
    again.resume()
    assert again.step == 2
    for (name, value), (_, other) in zip(
        trained.trained.named_parameters(), again.trained.named_parameters(), strict=True
    ):
        assert torch.equal(value, other), name


def test_questions_of_a_row_are_answered_as_each_alone(trained: Any) -> None:
    samples = rows(3)
    alone = [replace(sample, turns=[turn]) for sample in samples for turn in sample.turns]
    together = logits(trained, trained.model, samples)
    apart = torch.cat([logits(trained, trained.model, [sample]) for sample in alone])
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=0)


def test_the_card_tells_each_experts_share(trained: Any) -> None:
    card = (trained.out / "checkpoint" / "README.md").read_text(encoding="utf-8")
    measured = training.measure(trained.model, trained.family, trained.packer, 0, per_kind=10)
    shares = measured["shares"]
    assert ("Share of the tokens' choices" in card) == bool(shares)
    if trained.settings.family != "qwen3_vl_moe":
        assert not shares
        return
    assert [len(layer) for layer in shares] == [trained.settings.experts] * trained.settings.layers
    assert all(sum(layer) == pytest.approx(1) for layer in shares)


def test_the_load_is_balanced_where_experts_share_it_evenly() -> None:
    draw = torch.Generator().manual_seed(0)
    routing = [torch.randn(50, 4, generator=draw) for _ in range(3)]
    real = torch.arange(50) < 40
    expected = 0.0
    for scores in routing:
        counts, likely = [0.0] * 4, [0.0] * 4
        for token in range(40):
            shares = scores[token].double().softmax(-1)
            for expert in sorted(range(4), key=lambda one: -float(scores[token, one]))[:2]:
                counts[expert] += 1 / 80
            likely = [a + float(b) / 40 for a, b in zip(likely, shares, strict=True)]
        expected += sum(4 * a * b for a, b in zip(counts, likely, strict=True)) / 3
    assert float(training.balance_loss(routing, real, 2)) == pytest.approx(expected, rel=1e-5)
    even = torch.eye(4).repeat(5, 1) + torch.eye(4).roll(1, 0).repeat(5, 1)
    assert float(training.balance_loss([even], torch.ones(20) > 0, 2)) == pytest.approx(1)
