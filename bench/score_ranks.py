"""Rank correlation of every method's scores with the true divergence of one quantized unit.

    python -m bench.score_ranks [--solvers rtn gptq] [--samples 64] [--seeds 1] [--held-out 96]
        [--scores "fisher, 2 draws" gradient ..]

On the embedded model, all towers. *True* is the KL divergence by class of token on held-out
questions, in float32, of the model in which one unit of choice alone has a format, its codes chosen
with the calibration samples. Printed is Spearman's rank correlation over the units, the mean over
formats and seeds of calibration samples and in brackets the lowest of them, for each class of
tokens; and for methods that predict a divergence the median over units of predicted over true.

Beside the methods of ``prismquant analyze`` other estimators of the same quantity are tried:
``plain sums``, without weights of samples; ``labels``, gradients of labels that the model draws
itself with random signs, in place of probes; and ``kfac``, tr(G dW H dW^T), with gradients and
inputs as if they were independent. The last two are plain sums as well.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn

from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.demo.main_job import CHECKPOINT
from prismquant.demo.scenes import Split, write_dataset
from prismquant.engine.calls import Gradients
from prismquant.engine.visit import Visit
from prismquant.engine.walk import ModelWalk
from prismquant.models.bind import bind
from prismquant.models.bound import BoundModel
from prismquant.models.float_model import load_float
from prismquant.models.processor import load_processor
from prismquant.report.tables import rich_table
from prismquant.search import backward_scores
from prismquant.search.analysis import Analysis, AnalysisMethod
from prismquant.search.analysis_methods import build_method
from prismquant.search.choices import make_choices
from prismquant.search.format_grammar import formats_on_offer
from prismquant.search.methods import fisher
from prismquant.search.option_errors import LayerError, Option, solve_step
from prismquant.search.sample_weights import with_sample_weights
from prismquant.search.sensitivity import TOKEN_CLASSES
from prismquant.search.token_places import token_places
from prismquant.search.watched_step import WatchedCall
from prismquant.shards import ShardReader

FORMATS = "int2-g32,int3-g32,int4-g32,int4-channel+int8-token"
# Loss by option and class of token.
Losses = dict[Option, dict[str, float]]


def label_probes(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Gradients of ``s log p_y`` with labels drawn from the model and random signs."""
    p = torch.softmax(logits.detach().float(), dim=-1)

    def draw(generator: torch.Generator) -> Tensor:
        labels = torch.multinomial(p, 1, generator=generator)
        signs = torch.randint(0, 2, (len(p), 1), generator=generator)
        return (torch.zeros_like(p).scatter_(1, labels, 1.0) - p) * (2 * signs - 1)

    return torch.stack([draw(generator) for generator in generators])


class Moments:
    """Second moments of gradients and of output errors, gathered beside a walk back.

    Attributes:
        slopes: Sums of ``g g^T`` by layer and loss.
        errors: Sums of ``dY dY^T`` by layer and option.
        tokens: Tokens that have passed each layer.
    """

    def __init__(self) -> None:
        self.slopes: defaultdict[tuple[str, int], Tensor | float] = defaultdict(float)
        self.errors: defaultdict[tuple[str, Option], Tensor | float] = defaultdict(float)
        self.tokens: defaultdict[str, int] = defaultdict(int)

    def take(self, _: object, sample: int, watch: WatchedCall, found: Sequence[Gradients]) -> None:
        """Stand in for the sums of a walk back; the head is left out."""
        with torch.no_grad():
            for (name, _x, output), own in zip(watch.layers, found, strict=False):
                self.tokens[name] += output[..., 0].numel()
                for number, slope in enumerate(own):
                    if slope is not None:
                        rows = slope.reshape(-1, watch.errors.site(name).out_features)
                        self.slopes[name, number] += rows.T @ rows
            for number, option, error in watch.changes():
                if number < len(watch.layers):
                    self.errors[watch.layers[number][0], option] += error.T @ error

    def losses(self, draws: int) -> Losses:
        """The form's value for each option; of all classes, those of the samples."""
        found: Losses = defaultdict(lambda: dict.fromkeys(TOKEN_CLASSES, 0.0))
        for (name, option), errors in self.errors.items():
            for index, kind in enumerate(TOKEN_CLASSES):
                for draw in range(draws):
                    slopes = self.slopes[name, index * draws + draw]
                    product = torch.as_tensor(slopes * errors).sum()
                    found[option][kind] += float(product) / self.tokens[name]
        return found


def scores_of(analysis: Analysis, method: AnalysisMethod, *, weighted: bool = False) -> Losses:
    """Scores of a method; one that knows a single class has it for all."""
    found: Losses = {}
    scored = list(method.scores(analysis))
    if weighted:
        towers = {one.unit.name: one.unit.modality for one in analysis.choices.units}
        scored = list(with_sample_weights(scored, towers))
    for one in scored:
        for option, scores in one.scores.items():
            own = {name: score.loss for name, score in scores.items()}
            any_class = next(iter(own.values()))
            found[one.unit, option] = {name: own.get(name, any_class) for name in TOKEN_CLASSES}
    return found


def candidates(analysis: Analysis) -> dict[str, Callable[[], Losses]]:
    """Every method and estimator by its name: what gives its scores."""

    def labels(draws: int) -> Losses:
        with mock.patch.object(fisher, "probes", label_probes):
            return scores_of(analysis, fisher.Fisher(draws))

    def kfac() -> Losses:
        moments = Moments()
        with mock.patch.object(backward_scores._StepWork, "_take", lambda *a: moments.take(*a)):
            scores_of(analysis, fisher.Fisher(2))
        return moments.losses(2)

    found: dict[str, Callable[[], Losses]] = {}
    for draws in (1, 2, 8):
        method = fisher.Fisher(draws)
        found[f"fisher, {draws} draws"] = partial(scores_of, analysis, method, weighted=True)
        found[f"plain sums, {draws} draws"] = partial(scores_of, analysis, method)
    found |= {f"labels, {draws} draws": partial(labels, draws) for draws in (2, 8)}
    found["kfac, 2 draws"] = kfac
    for name in ("gradient", "output", "weight", "kl_div"):
        found[name] = partial(scores_of, analysis, build_method(name, {}))
    return found


def solved(analysis: Analysis) -> dict[Option, list[LayerError]]:
    """The codes of every option."""
    found: defaultdict[Option, list[LayerError]] = defaultdict(list)
    visit = Visit(layers=[site.name for site in analysis.bound.sites], stagewise=False)
    reader = ShardReader(analysis.bound.folder)
    with torch.no_grad():
        for unit in ModelWalk(analysis.bound, reader, analysis.batches, visit=visit).units():
            with unit.loaded():
                for errors in solve_step(unit, analysis).by_layer.values():
                    for error in errors:
                        found[error.option].append(error)
                unit.advance()
    return found


@contextlib.contextmanager
def in_place(model: nn.Module, errors: Sequence[LayerError]) -> Iterator[None]:
    """Within the block, a model has an option's weights, and its inputs are rounded."""
    with contextlib.ExitStack() as stack:
        for error in errors:
            module = model.get_submodule(error.row.site.name)
            weight = module.get_parameter("weight")
            before = weight.detach().clone()
            stack.callback(weight.data.copy_, before)
            change = error.weight_error(before.flatten(1))
            weight.data.add_(change.reshape(before.shape))
            quantizer = error.input_quantizer(before.device)
            if quantizer is not None:
                hook = module.register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]),))
                stack.callback(hook.remove)
        yield


@torch.no_grad()
def true_losses(
    bound: BoundModel, options: Mapping[Option, Sequence[LayerError]], batches: Sequence[Batch]
) -> Losses:
    """Divergence of the model with one option in place, by class of token."""
    model = load_float(bound.folder, torch.float32)

    def distributions() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            places = token_places(batch, bound)
            logits = model(**batch.whole().inputs, use_cache=False).logits[places >= 0]
            yield torch.log_softmax(logits.double(), dim=-1), places[places >= 0]

    before = list(distributions())
    found: Losses = {}
    for option, errors in options.items():
        sums = torch.zeros(2, len(TOKEN_CLASSES), dtype=torch.float64)
        with in_place(model, errors):
            for (p, places), (q, _) in zip(before, distributions(), strict=True):
                sums[0].index_add_(0, places, (p.exp() * (p - q)).sum(dim=-1))
                sums[1].index_add_(0, places, torch.ones(len(p), dtype=torch.float64))
        found[option] = dict(zip(TOKEN_CLASSES, (sums[0] / sums[1]).tolist(), strict=True))
    return found


def correlations(found: Losses, true: Losses) -> dict[str, list[float]]:
    """Spearman's rank correlation over units, for each class of tokens, format by format."""
    by_class: dict[str, list[float]] = {}
    for name in TOKEN_CLASSES:
        for choice in FORMATS.split(","):
            options = [option for option in true if option[1] == choice and option in found]
            pairs = [(found[option][name], true[option][name]) for option in options]
            by_class.setdefault(name, []).append(float(spearmanr(*zip(*pairs, strict=True))[0]))
    return by_class


def median_ratio(found: Losses, true: Losses, name: str) -> float:
    """Median over options of predicted over true loss."""
    return statistics.median(found[o][name] / true[o][name] for o in found if true[o][name] > 0)


def data(folder: Path, split: Split, count: int, seed: int, size: int) -> list[Batch]:
    """Questions of the embedded model's generator."""
    path = write_dataset(folder / f"{split}-{seed}", split=split, count=count, seed=seed)
    ids = bind(CHECKPOINT).vision_token_ids
    processor = load_processor(CHECKPOINT)
    samples = read_samples(path)
    return list(make_batches(samples, processor, batch_size=size, vision_token_ids=ids))


def main() -> None:
    """Run the comparison and print a table for each solver."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--solvers", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--scores", nargs="+", default=[], help="some of the rows; else all")
    options = parser.parse_args()
    console, bound = Console(), bind(CHECKPOINT)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        held_out = data(Path(place), "evaluation", options.held_out, 0, 16)
        for solver in options.solvers:
            choices = make_choices(bound, formats_on_offer(FORMATS), solver=solver)
            ranks: defaultdict[str, defaultdict[str, list[float]]]
            ranks = defaultdict(lambda: defaultdict(list))
            ratios: defaultdict[str, list[float]] = defaultdict(list)
            for seed in range(options.seeds):
                batches = data(Path(place), "calibration", options.samples, seed, 1)
                analysis = Analysis(bound, choices, batches, seed=seed)
                true = true_losses(bound, solved(analysis), held_out)
                for name, make in candidates(analysis).items():
                    if options.scores and name not in options.scores:
                        continue
                    found = make()
                    for kind, values in correlations(found, true).items():
                        ranks[name][kind] += values
                    if name.startswith(("fisher", "plain", "labels", "kl_div")):
                        ratios[name].append(median_ratio(found, true, "answer"))
            header = ["scores", *TOKEN_CLASSES, "predicted/true, answer"]
            rows = [
                [
                    name,
                    *(
                        f"{statistics.mean(by_class[kind]):.3f} ({min(by_class[kind]):.3f})"
                        for kind in TOKEN_CLASSES
                    ),
                    f"{statistics.mean(ratios[name]):.2f}" if name in ratios else "-",
                ]
                for name, by_class in ranks.items()
            ]
            console.print(rich_table(header, rows, title=f"{solver}, {options.samples} samples"))


if __name__ == "__main__":
    main()
