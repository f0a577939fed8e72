"""Fisher scores equal per-sample gradients taken by hand, and predict measured divergence."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tiny_vlm
import torch
from analyses import FORMATS, analysis_of, batches_of, rounded_weights, scores_of
from torch import Tensor

import prismquant as pq
from prismquant.engine import activation_store
from prismquant.engine.activation_store import OnDisk
from prismquant.engine.placement import Placement
from prismquant.errors import ArgumentError, DataError
from prismquant.export.load_quantized import load_model
from prismquant.models.bind import bind
from prismquant.models.float_model import load_float
from prismquant.runtime.linear import ActivationQuantizer
from prismquant.runtime.mixed import Precision
from prismquant.search import backward_scores, option_errors
from prismquant.search.format_grammar import rule_of
from prismquant.search.methods.fisher import Fisher
from prismquant.search.probes import generator_of, probes
from prismquant.search.sensitivity import TOKEN_CLASSES
from prismquant.search.token_places import token_places

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from prismquant.data.batches import Batch


class ByHand:
    """Changes of the same random losses, in the graph of the whole model, sample by sample."""

    def __init__(self, folder: Path, batches: list[Batch], method: Fisher, seed: int) -> None:
        self.bound, self.batches = bind(folder), batches
        self.model = load_float(folder, torch.float64)
        self.seen: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
        self.slopes: list[dict[tuple[str, int], dict[int, Tensor]]] = []
        self.tokens = dict.fromkeys(TOKEN_CLASSES, 0)
        for batch in batches:
            self._sample(batch, method, seed)

    def _sample(self, batch: Batch, method: Fisher, seed: int) -> None:
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                seen.setdefault(name, []).append((args[0].detach(), output.requires_grad_(True)))

            return hook

        names = [site.name for site in self.bound.sites]
        handles = [self.model.get_submodule(n).register_forward_hook(watch(n)) for n in names]
        logits = self.model(**batch.inputs, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        places = token_places(batch, self.bound)[0]
        outputs = [out for own in seen.values() for _, out in own]
        slopes: dict[tuple[str, int], dict[int, Tensor]] = {}
        for number, name in enumerate(TOKEN_CLASSES):
            mine = (places == number).nonzero().flatten()
            self.tokens[name] += len(mine)
            for draw in range(method.draws if len(mine) else 0):
                generator = generator_of(seed, *batch.ids, name, draw, device=torch.device("cpu"))
                (probe,) = probes(logits[mine], [generator])
                found = torch.autograd.grad(
                    logits[mine], outputs, probe, retain_graph=True, allow_unused=True
                )
                slopes[name, draw] = {
                    id(out): g for out, g in zip(outputs, found, strict=True) if g is not None
                }
        self.seen.append(seen)
        self.slopes.append(slopes)

    def scores(
        self,
        layers: list[str],
        weights: dict[str, Tensor],
        quantizer: ActivationQuantizer | None,
        draws: int,
    ) -> dict[str, float]:
        """Half the mean square of the changes that the layers together make, per token."""
        sums = dict.fromkeys(TOKEN_CLASSES, 0.0)
        for seen, slopes in zip(self.seen, self.slopes, strict=True):
            for (name, _), found in slopes.items():
                change = 0.0
                for layer in layers:
                    own = self.model.get_submodule(layer).weight.flatten(1)
                    for x, output in seen.get(layer, []):
                        if id(output) in found:
                            rows = x.reshape(-1, own.shape[1])
                            given = rows if quantizer is None else quantizer(rows.float()).double()
                            wide = weights[layer].flatten(1).double()
                            error = given @ wide.T - rows @ own.T
                            change += float((found[id(output)].reshape(error.shape) * error).sum())
                sums[name] += change**2 / (2 * draws)
        return {name: sums[name] / count for name, count in self.tokens.items() if count}


def test_scores_equal_gradients_of_every_sample_by_hand(
    tiny_folder: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """For every unit of every tower, class of tokens, and kind of format."""
    batches, method = batches_of(tiny_folder, calibration_file), Fisher(draws=2)
    analysis = analysis_of(tiny_folder, batches, seed=3)
    found = scores_of(analysis, method)
    by_hand = ByHand(tiny_folder, batches, method, 3)
    for name, choice in analysis.choices.formats.items():
        weights = rounded_weights(tiny_folder, choice, tmp_path / name)
        for one in analysis.wanted:
            rows = one.rows[name]
            spec = rows[0].config.activations
            expected = by_hand.scores(
                [site.name for site in one.sites],
                weights,
                None if spec is None else ActivationQuantizer(spec),
                method.draws,
            )
            own = {c: score.loss for c, score in found[one.unit.name][name].items()}
            assert own == pytest.approx(expected, rel=1e-4, abs=1e-12), (one.unit.name, name)
    assert {*found} == {one.unit.name for one in analysis.wanted}


@torch.no_grad()
def divergences(folder: Path, batches: list[Batch], changed: nn.Module) -> dict[str, float]:
    """Divergence per token of each class of a changed model from the float one."""
    model, bound = load_float(folder, torch.float32), bind(folder)
    sums = torch.zeros(len(TOKEN_CLASSES) + 1, 2, dtype=torch.float64)
    for batch in batches:
        p, q = (
            torch.log_softmax(one(**batch.inputs, use_cache=False).logits.double(), dim=-1)
            for one in (model, changed)
        )
        terms = (p.exp() * (p - q)).sum(dim=-1).flatten()
        places = token_places(batch, bound).flatten()
        sums[:, 0].index_add_(0, places % len(sums), terms)
        sums[:, 1].index_add_(0, places % len(sums), torch.ones_like(terms))
    return {name: float(sums[n, 0] / sums[n, 1]) for n, name in enumerate(TOKEN_CLASSES)}


@pytest.mark.parametrize(
    ("unit", "option"),
    [
        pytest.param("model.visual.patch_embed.proj", "int8-channel", marks=pytest.mark.slow),
        pytest.param(
            "model.visual.deepstack_merger_list.0.linear_fc1",
            "int8-channel",
            marks=pytest.mark.slow,
        ),
        ("model.language_model.layers.0.mlp.down_proj", "int8-channel+int8-token"),
        ("lm_head", "int8-channel"),
        ("kv_cache", "kv:int8-head"),
    ],
)
def test_a_score_is_the_divergence_that_is_measured(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path, unit: str, option: str
) -> None:
    """In nats per token, where errors are small; within what few samples leave open."""
    folder = tiny("qwen3_vl")
    batches = batches_of(folder, calibration_file)
    analysis = analysis_of(folder, batches, option)
    others = frozenset(one.unit.name for one in analysis.wanted) - {unit}
    method = Fisher(draws=100, classes=("answer", "image"))
    found = scores_of(replace(analysis, done=others), method)[unit][option]
    rules: dict[str, Any] = {"name": "one", "rules": []}
    choice = analysis.choices.formats[option]
    if choice.cache is None:
        (one,) = [one for one in analysis.wanted if one.unit.name == unit]
        rules["rules"] = [rule_of(choice) | {"match": {"name": [s.name for s in one.sites]}}]
    else:
        rules["kv_cache"] = dict(choice.cache)
    pq.quantize(folder, rules, tmp_path / "out", calibration_file, solver="rtn")
    measured = divergences(folder, batches, load_model(tmp_path / "out"))
    for name, score in found.items():
        assert score.error is not None
        assert score.loss == pytest.approx(measured[name], rel=0.25), name


@pytest.mark.slow
def test_draws_depend_on_the_seed_and_the_sample_alone(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """Not on the order of samples, nor on where outputs wait."""
    folder = tiny("qwen2_vl")
    batches = batches_of(folder, calibration_file)
    first = scores_of(analysis_of(folder, batches), Fisher())
    again = scores_of(analysis_of(folder, batches[::-1]), Fisher())
    other = scores_of(analysis_of(folder, batches, seed=1), Fisher())
    for unit, options in first.items():
        for option, classes in options.items():
            for name, score in classes.items():
                assert again[unit][option][name] == score
                assert other[unit][option][name].loss != score.loss


def test_outputs_and_gradients_may_wait_in_files(
    tiny: Callable[..., Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activation_store, "_LEAST_BYTES", 1)
    folder = tiny("qwen3_vl")
    batches = batches_of(folder, calibration_file)
    more: dict[str, Any] = {"solver": "gptq", "placement": Placement()}
    kept = scores_of(analysis_of(folder, batches, **more), Fisher())
    store = OnDisk(tmp_path / "waiting")
    analysis = analysis_of(folder, batches, kept=store, **more)
    assert scores_of(analysis, Fisher()) == kept
    assert not list((tmp_path / "waiting").iterdir())


@pytest.mark.slow
def test_parts_that_are_looked_at_together_change_nothing(
    tiny: Callable[..., Path], calibration_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits place by place, gradients loss by loss, errors made anew for every sample."""
    folder = tiny("qwen3_vl")
    batches = batches_of(folder, calibration_file)
    formats = f"{FORMATS},kv:fp8"
    expected = scores_of(analysis_of(folder, batches, formats), Fisher())
    monkeypatch.setattr(backward_scores, "_LOGIT_BYTES", 1)
    monkeypatch.setattr(backward_scores, "_GRADIENT_BYTES", 1)
    monkeypatch.setattr(option_errors, "_KEPT_BYTES", 1)
    found = scores_of(analysis_of(folder, batches, formats), Fisher())
    for unit, options in expected.items():
        for option, classes in options.items():
            for name, score in classes.items():
                own = found[unit][option][name]
                assert (own.loss, own.error) == pytest.approx((score.loss, score.error), rel=1e-6)


@pytest.mark.slow
def test_units_that_are_done_are_passed_and_change_nothing(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    folder = tiny("qwen3_vl")
    batches = batches_of(folder, calibration_file)
    formats = f"{FORMATS},kv:fp8"
    whole = scores_of(analysis_of(folder, batches, formats), Fisher())
    names = [*whole]
    for count in (1, 7, len(names) - 1):
        done = frozenset(names[:count])
        rest = scores_of(analysis_of(folder, batches, formats, done=done), Fisher())
        assert rest == {name: whole[name] for name in names[count:]}
    everything = analysis_of(folder, batches, formats, done=frozenset(names))
    assert scores_of(everything, Fisher()) == {}


def test_classes_that_nobody_asks_for_or_that_samples_lack_cost_nothing(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny("qwen2_vl")
    batches = batches_of(folder, tiny_vlm.samples(tmp_path, ("text", "image"), count=4))
    for asked, given in ((TOKEN_CLASSES, {"answer", "text", "image"}), (("text",), {"text"})):
        found = scores_of(analysis_of(folder, batches, "int4-g32"), Fisher(classes=asked))
        assert all({*own["int4-g32"]} == given for own in found.values())
    with pytest.raises(DataError, match="class video"):
        scores_of(analysis_of(folder, batches, "int4-g32"), Fisher(classes=("video",)))


def test_texts_alone_score_the_language_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("qwen3_vl")
    batches = batches_of(folder, tiny_vlm.samples(tmp_path, ("text",), count=3))
    analysis = analysis_of(folder, batches, "int4-g32")
    language = {one.unit.name for one in analysis.wanted if one.unit.modality == "llm"}
    assert {*scores_of(analysis, Fisher())} == language


def test_a_head_that_is_tied_is_gone_through_and_not_scored(
    tiny: Callable[..., Path], calibration_file: Path
) -> None:
    """In bfloat16, as models are run."""
    folder = tiny("qwen2_vl", tie=True, dtype=torch.bfloat16)
    batches = batches_of(folder, calibration_file)
    full = scores_of(analysis_of(folder, batches, "int4-g32"), Fisher(draws=4))
    assert "lm_head" not in full
    half = Placement(precision=Precision(torch.bfloat16))
    found = scores_of(analysis_of(folder, batches, "int4-g32", placement=half), Fisher(draws=4))
    # The same draws of nearly the same distributions.
    for unit, options in full.items():
        expected = options["int4-g32"]["text"].loss
        assert found[unit]["int4-g32"]["text"].loss == pytest.approx(expected, rel=0.3), unit


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ArgumentError, match="draws"):
        Fisher(draws=0)
    with pytest.raises(ArgumentError, match="no class"):
        Fisher(classes=())


RANK = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from analyses import FORMATS, analysis_of, batches_of, scores_of
from prismquant.distributed import joined
from prismquant.engine.placement import Placement
from prismquant.search.methods.fisher import Fisher

folder, data, out = map(Path, sys.argv[2:])
with joined() as ranks:
    own = batches_of(folder, data)[ranks.rank :: ranks.size]
    more = {"solver": "gptq", "placement": Placement(), "ranks": ranks}
    analysis = analysis_of(folder, own, FORMATS + ",kv:fp8", **more)
    found = scores_of(analysis, Fisher())
    losses = {
        f"{unit} {option} {name}": score.loss
        for unit, options in found.items()
        for option, classes in options.items()
        for name, score in classes.items()
    }
    (out / f"{ranks.size}-{ranks.rank}.json").write_text(json.dumps(losses))
"""


@pytest.mark.slow
def test_ranks_share_samples_and_find_what_one_finds(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Three ranks of two samples each, of which one sees texts alone; all know the scores."""
    (tmp_path / "rank.py").write_text(RANK)
    helpers = Path(__file__).resolve().parent.parent
    given = [tmp_path / "rank.py", helpers, tiny("qwen3_vl"), calibration_file, tmp_path]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    for start in ([], torchrun):
        line = [sys.executable, *start, *map(str, given)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    alone, *ranks = (
        json.loads((tmp_path / name).read_text())
        for name in ("1-0.json", "3-0.json", "3-1.json", "3-2.json")
    )
    assert ranks[0] == ranks[1] == ranks[2] == pytest.approx(alone, rel=1e-5)
