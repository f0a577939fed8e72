"""Asymmetric calibration against float64 brute force, and what it gains in a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prismquant as pq
from prismquant.algorithms.correction import Correction
from prismquant.data import read_samples
from prismquant.data.batches import make_batches
from prismquant.diagnostics.solver_diagnostics import CorrectionDiagnostics
from prismquant.errors import DataError, NumericsError, RecipeError
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.statistics.drift import Drift

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from prismquant.data.batches import Batch

IN, OUT = 12, 5
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
EVERY = 4


def drawn(seed: int, calls: int, tokens: int = 30, drift: float = 0.3) -> list[tuple[Tensor, ...]]:
    """Calls of (seen, wanted, weights), correlated across channels as in a model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator)
    turn = torch.randn(IN, IN, generator=generator) / IN**0.5
    result = []
    for _ in range(calls):
        wanted = torch.randn(tokens, IN, generator=generator) @ mix
        noise = torch.randn(tokens, IN, generator=generator)
        seen = wanted + drift * (wanted @ turn + 0.5 * noise)
        weights = torch.rand(tokens, generator=generator).round(decimals=1)
        result.append((seen, wanted, weights))
    return result


def recorded(calls: Sequence[tuple[Tensor, ...]], weighted: bool = True) -> Drift:
    record = Drift(IN)
    for seen, wanted, weights in calls:
        record.update(seen, wanted, weights if weighted else None)
    return record


def weights_of(seed: int, *rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1000)
    return [torch.randn(count, IN, generator=generator) for count in rows or (OUT,)]


def moments(calls: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Sums of ``u u^T`` and ``(f - u) u^T`` in float64, token by token."""
    hessian, drift = torch.zeros(2, IN, IN, dtype=torch.float64)
    for seen, wanted, weights in calls:
        for u, f, w in zip(seen.double(), wanted.double(), weights.double(), strict=True):
            hessian += w * torch.outer(u, u)
            drift += w * torch.outer(f - u, u)
    return hessian, drift


def damped(hessian: Tensor, damping: float) -> Tensor:
    return hessian + torch.diag(damping * hessian.diagonal())


def lost(weight: Tensor, corrected: Tensor, calls: Sequence[tuple[Tensor, ...]]) -> float:
    """Sum of w |W f - W* u|^2 over all tokens."""
    return sum(
        float(
            ((f.double() @ weight.double().T - u.double() @ corrected.double().T) ** 2).sum(1)
            @ w.double()
        )
        for u, f, w in calls
    )


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), calls=st.integers(1, 9))
def test_at_full_strength_it_is_the_least_squares_solution(seed: int, calls: int) -> None:
    """With next to no damping: W* = W E[f u^T] E[u u^T]^-1, so nothing correlated is left."""
    seen, weights = drawn(seed, calls), weights_of(seed, 3, 2)
    corrected, notes = Correction(strength=1.0, damping=1e-8).correct(recorded(seen), weights)
    hessian, drift = moments(seen)
    for weight, result in zip(weights, corrected, strict=True):
        truth = weight.double() @ (hessian + drift) @ torch.linalg.inv(hessian)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), truth, rtol=1e-3, atol=1e-3)
        assert lost(weight, result, seen) <= lost(weight, weight, seen) * (1 + 1e-6)
    assert notes.strength == 1.0


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), strength=st.floats(0, 1), damping=st.sampled_from([0.01, 0.5]))
def test_given_strength_and_damping_are_taken(seed: int, strength: float, damping: float) -> None:
    seen, (weight,) = drawn(seed, 5), weights_of(seed)
    (result,), notes = Correction(strength, damping).correct(recorded(seen), [weight])
    hessian, drift = moments(seen)
    step = weight.double() @ drift @ torch.linalg.inv(damped(hessian, damping))
    truth = weight.double() + strength * step
    torch.testing.assert_close(result.double(), truth, rtol=1e-4, atol=1e-4)
    assert notes == CorrectionDiagnostics(strength, damping)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_the_chosen_strength_and_damping_do_best_on_held_out_calls(seed: int) -> None:
    """Of all strengths on a grid and all dampings; each layer has its own strength."""
    calls, weights = drawn(seed, 9, tokens=10, drift=0.5), weights_of(seed, 3, 2)
    held = [call for index, call in enumerate(calls) if index % EVERY == EVERY - 1]
    kept = [call for index, call in enumerate(calls) if index % EVERY != EVERY - 1]
    hessian, drift = moments(kept)
    inverses = {d: torch.linalg.inv(damped(hessian, d)) for d in DAMPINGS}
    steps = {d: [w.double() @ drift @ inverses[d] for w in weights] for d in DAMPINGS}
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)

    def best(weight: Tensor, step: Tensor) -> tuple[float, float]:
        losses = [lost(weight, weight.double() + a * step, held) for a in grid]
        return min(losses), float(grid[losses.index(min(losses))])

    found = {d: [best(w, s) for w, s in zip(weights, steps[d], strict=True)] for d in DAMPINGS}
    corrected, notes = Correction().correct(recorded(calls), weights)
    damping = notes.damping
    totals = {d: sum(loss for loss, _ in found[d]) for d in DAMPINGS}
    assert totals[damping] == pytest.approx(min(totals.values()), rel=1e-3)
    expected = sum(strength for _, strength in found[damping]) / len(weights)
    assert notes.strength == pytest.approx(expected, abs=0.011)
    # What was tried on the held-out calls is then done with all of them.
    whole, all_drift = moments(calls)
    inverse = torch.linalg.inv(damped(whole, damping))
    for weight, result, (_, strength) in zip(weights, corrected, found[damping], strict=True):
        step = weight.double() @ all_drift @ inverse
        torch.testing.assert_close(
            result.double(),
            weight.double() + strength * step,
            rtol=0,
            atol=0.02 * float(step.abs().max()) + 1e-5,
        )


def test_strength_zero_changes_nothing() -> None:
    (weight,) = weights_of(0)
    for damping in (None, 0.1):
        (result,), _ = Correction(0.0, damping).correct(recorded(drawn(0, 5)), [weight])
        assert torch.equal(result, weight)


@pytest.mark.parametrize("how", [Correction(), Correction(1.0), Correction(damping=0.01)])
def test_without_drift_nothing_changes(how: Correction) -> None:
    (weight,) = weights_of(1)
    calls = [(seen, seen, weights) for seen, _, weights in drawn(1, 6)]
    (result,), _ = how.correct(recorded(calls), [weight])
    assert torch.equal(result, weight)


def test_a_drift_that_is_noise_is_not_followed() -> None:
    """Nothing of it recurs in the held-out calls, so the strength is small."""
    generator = torch.Generator().manual_seed(3)
    calls = []
    for _ in range(8):
        wanted = torch.randn(6, IN, generator=generator)
        seen = torch.randn(6, IN, generator=generator)
        # Orthogonal to what is seen on average: the best guess of the drift is none.
        calls.append((seen, seen + 0.1 * wanted, torch.ones(6)))
    (weight,) = weights_of(3)
    (full,), _ = Correction(strength=1.0, damping=0.003).correct(recorded(calls), [weight])
    (chosen,), notes = Correction().correct(recorded(calls), [weight])
    assert notes.strength < 0.7
    assert (chosen - weight).norm() < 0.7 * (full - weight).norm()


def test_the_order_of_tokens_and_of_calls_of_a_part_does_not_matter() -> None:
    calls, (weight,) = drawn(4, 8), weights_of(4)
    (first,), notes = Correction().correct(recorded(calls), [weight])
    shuffled = []
    for seen, wanted, weights in calls:
        order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(9))
        shuffled.append((seen[order], wanted[order], weights[order]))
    # Calls 3 and 7 are held out, and may change places; so may the others.
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [6, 5, 4, 7, 2, 1, 0, 3]):
        (second,), other = Correction().correct(recorded([shuffled[i] for i in order]), [weight])
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
        assert asdict(other) == pytest.approx(asdict(notes), rel=1e-4)


def test_padding_is_ignored_whatever_it_holds() -> None:
    calls, (weight,) = drawn(5, 6), weights_of(5)
    (expected,), _ = Correction().correct(recorded(calls), [weight])
    padded = []
    for seen, wanted, weights in calls:
        junk = torch.full((3, IN), float("nan"))
        padded.append(
            (
                torch.cat([seen, junk]),
                torch.cat([wanted, junk]),
                torch.cat([weights, torch.zeros(3)]),
            )
        )
    (result,), _ = Correction().correct(recorded(padded), [weight])
    assert torch.equal(result, expected)


def test_weights_of_one_are_no_weights() -> None:
    calls, (weight,) = drawn(6, 5), weights_of(6)
    ones = [(seen, wanted, torch.ones(len(seen))) for seen, wanted, _ in calls]
    (a,), _ = Correction().correct(recorded(ones), [weight])
    (b,), _ = Correction().correct(recorded(ones, weighted=False), [weight])
    assert torch.equal(a, b)


def test_the_second_moments_are_the_mean_over_all_tokens() -> None:
    calls = drawn(7, 6)
    hessian, _ = moments(calls)
    count = sum(float(weights.sum()) for _, _, weights in calls)
    torch.testing.assert_close(
        recorded(calls).result().double(), hessian / count, rtol=1e-4, atol=1e-4
    )


def test_one_call_alone_gets_a_careful_correction() -> None:
    """There is nothing to test on: half of the way, with the strongest damping."""
    calls, (weight,) = drawn(8, 1), weights_of(8)
    (result,), notes = Correction().correct(recorded(calls), [weight])
    assert notes == CorrectionDiagnostics(0.5, 0.3)
    hessian, drift = moments(calls)
    step = weight.double() @ drift @ torch.linalg.inv(damped(hessian, 0.3))
    torch.testing.assert_close(result.double(), weight.double() + step / 2, rtol=1e-4, atol=1e-4)


def test_channels_that_are_never_active_keep_their_weights() -> None:
    calls, (weight,) = drawn(9, 5), weights_of(9)
    for seen, wanted, _ in calls:
        seen[:, 2] = 0
        wanted[:, 2] = 0
    for how in (Correction(), Correction(1.0, 1e-6)):
        (result,), _ = how.correct(recorded(calls), [weight])
        assert torch.equal(result[:, 2], weight[:, 2])
        assert torch.isfinite(result).all()


def test_inputs_that_are_all_zero_are_corrected_by_nothing() -> None:
    zeros = torch.zeros(4, IN)
    (weight,) = weights_of(10)
    (result,), _ = Correction().correct(recorded([(zeros, zeros, torch.ones(4))] * 5), [weight])
    assert torch.equal(result, weight)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"strength cannot be 1\.5"):
        Correction(strength=1.5)
    for damping in (0.0, -1.0, 11.0):
        with pytest.raises(RecipeError, match="damping"):
            Correction(damping=damping)
    with pytest.raises(DataError, match="not of the same tokens"):
        Drift(IN).update(torch.ones(2, IN), torch.ones(3, IN))
    with pytest.raises(NumericsError):
        Drift(IN).update(torch.full((2, IN), float("nan")), torch.ones(2, IN))
    with pytest.raises(NumericsError):
        Drift(IN).result()
    with pytest.raises(NumericsError):
        Correction(1.0, 0.1).correct(
            recorded([(torch.ones(2, IN), torch.full((2, IN), float("inf")), torch.ones(2))]),
            weights_of(0),
        )


# In a model


def inputs_of(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Counted inputs of layers, [rows, in] each."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            counted = mask.reshape(-1).bool()
            found[name].append(rows[counted] if len(rows) == len(counted) else rows)

        return hook

    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in names]
    for batch in batches:
        mask = batch.inputs["attention_mask"]
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


SMOOTH: dict[str, Any] = {"name": "smoothquant", "options": {"search": False, "alpha": 1.0}}


@pytest.mark.parametrize(("bits", "transforms"), [(2, []), (3, [SMOOTH])])
def test_the_quantized_model_comes_closer_to_the_float_chain(
    tiny: Callable[..., Path], tmp_path: Path, bits: int, transforms: list[dict[str, Any]]
) -> None:
    """|W F - Q U|^2 of the last block's layers, on the samples of calibration.

    Scale that is moved in one model has to be moved in the other: no output of these layers shows
    it, and a drift between two bases would.
    """
    folder, data = tiny("qwen2_vl"), tiny_vlm.samples(tmp_path / "data", count=8)
    rule = {"match": {"modality": "llm", "role": ["attn", "mlp"]}, "weights": f"int{bits}-g32"}
    bound = bind(folder)
    batches = list(
        make_batches(
            read_samples(data),
            load_processor(folder),
            batch_size=2,
            vision_token_ids=bound.vision_token_ids,
        )
    )
    names = [
        f"model.language_model.layers.1.{leaf}"
        for leaf in ("self_attn.q_proj", "mlp.gate_proj", "self_attn.o_proj", "mlp.down_proj")
    ]
    full = load_float(folder)
    wanted = inputs_of(full, names, batches)
    losses: dict[str, dict[str, float]] = {}
    settings: dict[str, Any] = {"none": "none", "full": {"strength": 1.0}, "auto": "auto"}
    for kind, correction in settings.items():
        out = tmp_path / kind
        recipe = {
            "rules": [rule | {"correction": correction}],
            "transforms": transforms,
            "calibration": {"batch_size": 2},
        }
        record = pq.quantize(folder, recipe, out, data).record
        model = load_model(out)
        seen = inputs_of(model, names, batches)
        losses[kind] = {
            name: float(
                (
                    wanted[name] @ full.get_parameter(f"{name}.weight").T
                    - seen[name] @ model.get_parameter(f"{name}.weight").T
                )
                .square()
                .sum()
            )
            for name in names
        }
        told = [layer.correction for step in record.steps for layer in step.layers]
        assert all((one is not None) == (kind != "none") for one in told)
    for kind in ("full", "auto"):
        assert sum(losses[kind].values()) < 0.97 * sum(losses["none"].values())
