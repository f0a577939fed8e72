"""Scores of the methods that Fisher is compared with, against their definitions written out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny_vlm
import torch
from analyses import FORMATS, analysis_of, batches_of, rounded_weights, scores_of
from torch import Tensor, nn
from torch.nn import functional

from prismquant.errors import DataError
from prismquant.models.float_model import load_float
from prismquant.runtime.linear import ActivationQuantizer
from prismquant.search.methods.gradient import SquaredGradients
from prismquant.search.methods.layer_output import OutputError
from prismquant.search.methods.weight_error import WeightError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from prismquant.data.batches import Batch
    from prismquant.search.analysis import Analysis

FAMILY = "qwen3_vl"
# Inputs and outputs of a layer, pass by pass.
Seen = dict[str, list[tuple[Tensor, Tensor]]]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> nn.Module:
    return load_float(tiny(FAMILY), torch.float64)


@pytest.fixture(scope="module")
def batches(tiny: Callable[..., Path], calibration_file: Path) -> list[Batch]:
    return batches_of(tiny(FAMILY), calibration_file)


@pytest.fixture(scope="module")
def analysis(tiny: Callable[..., Path], batches: list[Batch]) -> Analysis:
    return analysis_of(tiny(FAMILY), batches)


@pytest.fixture(scope="module")
def rounded(
    tiny: Callable[..., Path], analysis: Analysis, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """Weights that a run of its own rounds, by option and layer."""
    out = tmp_path_factory.mktemp("rounded")
    return {
        name: rounded_weights(tiny(FAMILY), choice, out / name)
        for name, choice in analysis.choices.formats.items()
    }


def watched_logits(model: nn.Module, names: list[str], batch: Batch, seen: Seen) -> Tensor:
    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.setdefault(name, []).append((args[0].detach(), output.requires_grad_(True)))

        return hook

    handles = [model.get_submodule(n).register_forward_hook(watch(n)) for n in names]
    logits: Tensor = model(**batch.inputs, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def error_of(layer: nn.Module, weight: Tensor, x: Tensor, spec: object) -> Tensor:
    """Error of a layer's output, [rows, out], without its bias."""
    own = layer.weight.detach().flatten(1)
    rows = x.reshape(-1, own.shape[1])
    given = rows if spec is None else ActivationQuantizer(spec)(rows.float()).double()
    return given @ weight.flatten(1).double().T - rows @ own.T


def test_squared_gradients_equal_autograd_by_hand(
    model: nn.Module,
    batches: list[Batch],
    analysis: Analysis,
    rounded: dict[str, dict[str, Tensor]],
) -> None:
    names = [site.name for site in analysis.bound.sites]
    sums: dict[tuple[str, str], float] = {}
    for batch in batches:
        seen: Seen = {}
        logits = watched_logits(model, names, batch, seen)
        answer = batch.answer_mask[0].nonzero().flatten()
        targets = batch.inputs["input_ids"][0, answer]
        loss = functional.cross_entropy(logits[answer - 1], targets)
        flat = [(name, *pair) for name, own in seen.items() for pair in own]
        slopes = torch.autograd.grad(loss, [out for *_, out in flat], allow_unused=True)
        for one in analysis.wanted:
            for option, rows in one.rows.items():
                for (name, x, _), slope in zip(flat, slopes, strict=True):
                    if slope is None or name not in {site.name for site in one.sites}:
                        continue
                    spec = rows[0].config.activations
                    error = error_of(model.get_submodule(name), rounded[option][name], x, spec)
                    square = (slope.reshape(error.shape) * error).square().sum()
                    key = (one.unit.name, option)
                    sums[key] = sums.get(key, 0.0) + float(square) / len(batches)
    found = scores_of(analysis, SquaredGradients())
    flat_found = {
        (unit, option): own["answer"].loss
        for unit, options in found.items()
        for option, own in options.items()
    }
    assert flat_found == pytest.approx(sums, rel=1e-4)
    assert all({*own} == {"answer"} for options in found.values() for own in options.values())


@pytest.mark.parametrize("relative", [True, False])
@torch.no_grad()
def test_output_errors_equal_those_of_the_whole_model(
    model: nn.Module,
    batches: list[Batch],
    analysis: Analysis,
    rounded: dict[str, dict[str, Tensor]],
    relative: bool,
) -> None:
    names = [site.name for site in analysis.bound.sites]
    seen: Seen = {}
    for batch in batches:
        watched_logits(model, names, batch, seen)
    found = scores_of(analysis, OutputError(relative=relative))
    assert {*found} == {one.unit.name for one in analysis.wanted}
    for one in analysis.wanted:
        for option, rows in one.rows.items():
            error = whole = 0.0
            for site in one.sites:
                for x, output in seen[site.name]:
                    layer, spec = model.get_submodule(site.name), rows[0].config.activations
                    own = error_of(layer, rounded[option][site.name], x, spec)
                    error += float(own.square().sum())
                    whole += float(output.square().sum())
            expected = error / (whole if relative else len(batches))
            scores = found[one.unit.name][option]
            assert {*scores} == {"answer", "text", "image", "video"}
            for score in scores.values():
                assert score.loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("relative", [True, False])
def test_weight_errors_need_no_samples(
    tiny: Callable[..., Path],
    model: nn.Module,
    rounded: dict[str, dict[str, Tensor]],
    relative: bool,
) -> None:
    analysis = analysis_of(tiny(FAMILY), [])
    found = scores_of(analysis, WeightError(relative=relative))
    assert not WeightError().needs_samples
    for one in analysis.wanted:
        for option in one.rows:
            error = whole = 0.0
            for site in one.sites:
                weight = model.get_parameter(f"{site.name}.weight").detach()
                error += float((rounded[option][site.name].double() - weight).square().sum())
                whole += float(weight.square().sum())
            score = found[one.unit.name][option]["answer"]
            assert score.loss == pytest.approx(error / (whole if relative else 1), rel=1e-4)


def test_keys_and_values_have_outputs_and_no_weights(
    tiny: Callable[..., Path], batches: list[Batch]
) -> None:
    formats = "kv:fp8,kv:int4-head,int4-g32"
    analysis = analysis_of(tiny(FAMILY), batches, formats)
    assert "kv_cache" not in scores_of(analysis, WeightError())
    for method in (OutputError(), SquaredGradients()):
        found = scores_of(analysis, method)["kv_cache"]
        assert 0 < found["kv:fp8"]["answer"].loss < found["kv:int4-head"]["answer"].loss


def test_squared_gradients_need_answers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_vlm.samples(tmp_path, ("text",), count=2)
    text = data.read_text().replace("assistant", "user")
    data.write_text(text)
    folder = tiny(FAMILY)
    analysis = analysis_of(folder, batches_of(folder, data), FORMATS)
    with pytest.raises(DataError, match="needs answers"):
        scores_of(analysis, SquaredGradients())
