"""Models of text alone: families of one tower, whose numbers are those of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiny_text
import tiny_vlm
import torch
from torch import Tensor, nn

import prismquant as pq
from prismquant.algorithms.rotation import RotatedTower, Rotation
from prismquant.api import export
from prismquant.check.apply_rules import check
from prismquant.check.findings import Severity
from prismquant.check.target_reader import TargetReader
from prismquant.data import read_samples
from prismquant.data.batches import Batch, make_batches
from prismquant.engine.replay import Replay
from prismquant.errors import DataError, PlanError
from prismquant.export.load_quantized import load_model
from prismquant.models.arch import EdgeKind, Modality
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.float_model import load_float
from prismquant.models.load import empty_model, materialize
from prismquant.models.processor import load_processor
from prismquant.models.rotated_reader import RotatedReader
from prismquant.shards import ShardReader
from prismquant.storage import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six conversations without pictures."""
    return tiny_vlm.samples(tmp_path_factory.mktemp("texts"), kinds=("text",))


@pytest.fixture(params=tiny_text.FAMILIES)
def text_family(request: pytest.FixtureRequest) -> str:
    """Every family of text models in turn."""
    return str(request.param)


def batches_of(folder: Path, data: Path, size: int = 4) -> list[Batch]:
    processor = load_processor(folder)
    return list(make_batches(read_samples(data), processor, batch_size=size, vision_token_ids=()))


@torch.no_grad()
def logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Logits of all counted tokens, [N, V]."""
    parts = [model(**batch.inputs, use_cache=False).logits[batch.attended] for batch in batches]
    return torch.cat(parts).double()


def from_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    auto = import_transformers().AutoModelForCausalLM
    model: nn.Module = auto.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    return model


# ------------------------------------------------------------------------------------------ binding


def test_every_layer_is_a_site_of_the_language_model(
    tiny: Callable[..., Path], text_family: str
) -> None:
    bound = bind(tiny(text_family))
    model = empty_model(bound.config, bound.arch)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {site.name for site in bound.sites} == linears
    assert {site.modality for site in bound.sites} == {Modality.LLM}
    assert [item.name for item in bound.left_alone] == ["model.embed_tokens"]
    assert [step.kind for step in bound.steps] == ["block", "block", "head"]
    assert bound.vision_token_ids == ()


def test_our_float_model_is_that_of_transformers(
    tiny: Callable[..., Path], text_family: str, texts: Path
) -> None:
    folder = tiny(text_family)
    batches = batches_of(folder, texts)
    ours, theirs = logits(load_float(folder), batches), logits(from_transformers(folder), batches)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_scale_moved_along_any_edge_leaves_the_function(
    tiny: Callable[..., Path], text_family: str, texts: Path
) -> None:
    folder = tiny(text_family)
    bound, batches = bind(folder), batches_of(folder, texts)
    model = load_float(folder, torch.float64)
    before = logits(model, batches)
    generator = torch.Generator().manual_seed(1)
    for edge in bound.edges:
        scale = 0.5 + torch.rand(edge.size, generator=generator, dtype=torch.float64)
        source = model.get_submodule(edge.source)
        source.weight += float(edge.from_one)
        source.weight *= scale if source.weight.dim() == 1 else scale[:, None]
        source.weight -= float(edge.from_one)
        if getattr(source, "bias", None) is not None:
            source.bias *= scale
        columns = scale
        if edge.kind is EdgeKind.VALUE:
            heads = scale.view(edge.kv_heads, -1)
            columns = heads.repeat_interleave(edge.heads // edge.kv_heads, 0).flatten()
        for consumer in edge.readers:
            model.get_submodule(consumer).weight.div_(columns)
    assert {edge.kind for edge in bound.edges} >= {EdgeKind.VALUE, EdgeKind.LINEAR}
    # Norms of transformers compute in float32.
    torch.testing.assert_close(logits(model, batches), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_a_rotated_model_has_the_same_function(
    tiny: Callable[..., Path], text_family: str, texts: Path, tie: bool
) -> None:
    folder = tiny(text_family, tie=tie)
    bound, batches = bind(folder), batches_of(folder, texts)
    turned = Rotation(residual=bool(bound.streams))
    reader = RotatedReader(folder, bound, [RotatedTower(Modality.LLM, turned)])
    rotated = empty_model(bound.config, bound.arch)
    if turned.residual:
        rotated.config.tie_word_embeddings = False
    materialize(rotated, "", reader, bound.names, "cpu", torch.float64)
    before = logits(load_float(folder, torch.float64), batches)
    torch.testing.assert_close(logits(rotated, batches), before, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("size", [1, 6])
@torch.no_grad()
def test_replay_equals_the_models_own_forward(
    tiny: Callable[..., Path], text_family: str, texts: Path, size: int
) -> None:
    """Padded batches, longer than the sliding windows of the families that have one."""
    folder = tiny(text_family)
    bound, batches, model = bind(folder), batches_of(folder, texts, size), load_float(folder)
    assert max(int(batch.attended.sum(1).max()) for batch in batches) > tiny_text.WINDOW
    replay = Replay(model, bound, batches, device=torch.device("cpu"), dtype=torch.float32)
    assert replay.vision_steps() == []
    table = bound.arch.embeddings
    replay.begin_llm({table: model.get_submodule(table).forward})
    for step in bound.steps:
        module, rows = model.get_submodule(step.name), []
        for call in replay.calls(step):
            output = module(*call.args, **call.kwargs)
            rows.append(output)
            call.keep(output)
    # What the head puts out: some models bound it before it is a logit.
    seen: list[Tensor] = []
    model.get_submodule("lm_head").register_forward_hook(lambda *given: seen.append(given[-1]))
    logits(model, batches)
    for row, own, batch in zip(rows, seen, batches, strict=True):
        assert torch.equal(row[batch.attended], own[batch.attended])


def test_the_engines_embeddings_are_the_models_own(
    tiny: Callable[..., Path], text_family: str, texts: Path
) -> None:
    """Of a few rows of the table, whatever the model multiplies them by, or pads with."""
    from prismquant.engine.walk import ModelWalk

    folder = tiny(text_family)
    bound, batches = bind(folder), batches_of(folder, texts)
    walk = ModelWalk(bound, ShardReader(folder), batches)
    assert walk.main is not None
    model = load_float(folder)
    for batch in batches:
        ids = batch.inputs["input_ids"]
        table = bound.arch.embeddings
        own = model.get_submodule(table)(ids)
        assert torch.equal(walk.main.lookups()[table](ids), own)


# ---------------------------------------------------------------------------------- from end to end


@pytest.mark.parametrize(
    "preset", ["w4a16", pytest.param("w8a8", marks=pytest.mark.slow), "w8a8-static"]
)
def test_what_is_written_is_read_by_transformers_as_by_us(
    tiny: Callable[..., Path], text_family: str, texts: Path, tmp_path: Path, preset: str
) -> None:
    folder, out = tiny(text_family), tmp_path / "out"
    pq.quantize(folder, preset, out, texts)
    batches = batches_of(folder, texts)
    ours, theirs = logits(load_model(out), batches), logits(from_transformers(out), batches)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    full = logits(load_float(folder), batches)
    assert (ours - full).abs().max() > 1e-3, "nothing was quantized"


def test_presets_for_the_whole_model_are_for_models_of_text_too(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Rules of towers that are not there are idle, which is told; any other idle rule is wrong."""
    plan = pq.inspect(tiny("llama"), "w8a8-all")
    assert [line for line in plan.remarks if "is idle" in line] == [
        "rules[1] is idle: it is of a vision tower or a projector, and this Llama has none",
        "rules[2] is idle: it is of a vision tower or a projector, and this Llama has none",
    ]
    assert len(plan.quantized) == 14
    mistaken = {
        "rules": [{"weights": "int8-channel"}, {"match": {"name": "no.such"}, "solver": "rtn"}]
    }
    with pytest.raises(PlanError, match=r"rules\[1\] matches no layer"):
        pq.inspect(tiny("llama"), mistaken)


def test_the_command_line_from_a_checkpoint_to_its_check(
    tiny: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    """Quantize, check for each reader, evaluate against the source, export."""
    folder, out = tiny("llama", tie=True), tmp_path / "out"
    pq.quantize(folder, "w4a16", out, texts)
    for reader in TargetReader:
        found = check(out, reader).findings
        assert [one.what for one in found if one.severity is not Severity.NOTE] == []
    measured = pq.measure(out, texts, reference=folder)
    assert measured.overall.answer_tokens > 0
    assert measured.overall.divergence["answer"].kl > 0
    batches = batches_of(folder, texts)
    expected = logits(load_model(out), batches)
    export(out, "dense", tmp_path / "dense", options={"dtype": "float32"})
    dense = logits(from_transformers(tmp_path / "dense"), batches)
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------ the tokenizer


def test_the_public_loader_gives_model_and_processor(
    tiny: Callable[..., Path], texts: Path
) -> None:
    model, processor = pq.load(tiny("qwen3"))
    text = processor.apply_chat_template(
        [{"role": "user", "content": "what is it"}], tokenize=False
    )
    assert text == "<|im_start|>user\nwhat is it<|im_end|>\n"
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it"}]
    assert (
        processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False) == text
    )
    assert model(**processor([text])).logits.shape[0] == 1


def test_a_tokenizer_without_a_template_takes_texts_as_they_are(
    tiny: Callable[..., Path], texts: Path, tmp_path: Path
) -> None:
    folder = tiny("llama", chat=False)
    write_text(tmp_path / "plain.jsonl", '{"text": "red blue green"}\n')
    (batch,) = batches_of(folder, tmp_path / "plain.jsonl")
    tokenizer = load_processor(folder).tokenizer
    assert batch.inputs["input_ids"][0].tolist() == tokenizer("red blue green")["input_ids"]
    with pytest.raises(DataError, match=r"no chat template(?s:.)*sample text-0"):
        batches_of(folder, texts)


def test_pictures_are_refused(
    tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match="4 samples show pictures or clips, and the model does not see"
    ):
        pq.quantize(tiny("llama"), "w4a16", tmp_path / "out", calibration_file)
    assert not (tmp_path / "out").exists()
