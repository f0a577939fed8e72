"""Arguments and options of commands; of those with many, as one value."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

T = TypeVar("T")

# Not typer's paths: an empty word is no folder, and must not become the current one.
Model = Annotated[str, typer.Argument(help="Folder of a checkpoint.", show_default=False)]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", help="A preset's name or a file, of this or another tool."),
]
OptionalRecipe = Annotated[
    str | None,
    typer.Option("--recipe", help="A preset's name or a file, of this or another tool."),
]
Arch = Annotated[
    str | None,
    typer.Option("--arch", help="An architecture file that describes the model."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies in the checkpoint's folder.")
]
Fallback = Annotated[
    bool,
    typer.Option("--fallback", help="Where a format cannot hold a layer, take the nearest."),
]
OnFailure = Annotated[
    str | None,
    typer.Option("--on-failure", help="Where a solver fails: stop, or rtn to round to nearest."),
]
Shards = Annotated[
    int | None,
    typer.Option("--tensor-parallel", min=1, help="Devices that will share each layer."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels", min=1, help="Of a picture or a frame; by default what its processor allows."
    ),
]
MaxFrames = Annotated[
    int | None, typer.Option("--max-frames", min=1, help="Of a clip; 64 of a file by default.")
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Cut samples to so many tokens, and say which."),
]
SeqLength = Annotated[
    int | None,
    typer.Option("--seq-length", min=2, help="Tokens of a window of a .txt file; 2048 by default."),
]
KVCache = Annotated[str | None, typer.Option("--kv-cache", help="fp8, fp8-head, int8 .., or none.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..")]
MemoryBudget = Annotated[
    str | None,
    typer.Option("--memory-budget", help="Take no more than this, e.g. 4GiB; on a CPU."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Threads to compute with; measured by default."),
]


@dataclass(frozen=True)
class QuantizeOptions:
    """The arguments and options of ``prismquant quantize``."""

    model: Model
    out: Annotated[str, typer.Option(help="Folder of the result.", show_default=False)]
    recipe: OptionalRecipe = None
    mquant_args: Annotated[
        str | None,
        typer.Option("--mquant-args", help="Flags of MQuant, as one text, in place of a recipe."),
    ] = None
    calib: Annotated[
        str | None,
        typer.Option(help="Calibration samples: JSONL, LLaVA JSON, text, or a data set's name."),
    ] = None
    samples: Annotated[int | None, typer.Option(min=1, help="At most so many samples.")] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples run together.")] = None
    solver: Annotated[
        str | None, typer.Option(help="Use this method for every layer: rtn or gptq.")
    ] = None
    kv_cache: KVCache = None
    fallback: Fallback = False
    on_failure: OnFailure = None
    tensor_parallel: Shards = None
    device: Device = "cpu"
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = (
        False
    )
    memory_budget: MemoryBudget = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16 or mixed (linear layers in bfloat16; default if the "
            "CPU can)."
        ),
    ] = None
    max_pixels: MaxPixels = None
    max_frames: MaxFrames = None
    max_length: MaxLength = None
    seq_length: SeqLength = None
    threads: Threads = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Refuse statistics without vision tokens, and NaN in any tensor."
        ),
    ] = False
    trust_remote_code: Trust = False
    arch: Arch = None
    as_json: AsJson = False


@dataclass(frozen=True)
class AnalyzeOptions:
    """The arguments and options of ``prismquant analyze``."""

    model: Model
    formats: Annotated[
        list[str],
        typer.Option(
            help="On offer: int4-g128, w4a8, int8-channel+int8-token, kv:fp8 ..; commas or again.",
            show_default=False,
        ),
    ]
    out: Annotated[str, typer.Option(help="File of the result, JSON.", show_default=False)]
    calib: Annotated[
        str | None, typer.Option(help="Calibration samples; answers are not needed.")
    ] = None
    method: Annotated[
        str | None, typer.Option(help="fisher (default), gradient, kl_div, output or weight.")
    ] = None
    solver: Annotated[str, typer.Option(help="Whose codes are scored: gptq or rtn.")] = "gptq"
    samples: Annotated[
        int | None, typer.Option(min=1, help="At most so many samples, 64 by default.")
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples run together, 8 by default; see the method.")
    ] = None
    draws: Annotated[int | None, typer.Option(min=1, help="Of random losses.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0
    weight: Annotated[
        str | None,
        typer.Option(help="Of classes of tokens in the sum; answer=1,text=0.2 by default."),
    ] = None
    modalities: Annotated[
        list[str] | None, typer.Option(help="vision, projector, llm; all by default.")
    ] = None
    disable: Annotated[
        list[str] | None,
        typer.Option(help="Leave layers alone: names with wildcards, e.g. '*lm_head*'; again."),
    ] = None
    device: Device = "cpu"
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16 or mixed; on a CPU float32 by default."),
    ] = None
    memory_budget: MemoryBudget = None
    max_pixels: MaxPixels = None
    max_frames: MaxFrames = None
    max_length: MaxLength = None
    seq_length: SeqLength = None
    threads: Threads = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an analysis that was cut off.")
    ] = False
    trust_remote_code: Trust = False
    arch: Arch = None
    as_json: AsJson = False


@dataclass(frozen=True)
class EvalOptions:
    """The arguments and options of ``prismquant eval``."""

    model: Model
    data: Annotated[str, typer.Option(help="Samples with answers.", show_default=False)]
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with, usually the unquantized one.")
    ] = None
    out: Annotated[str | None, typer.Option(help="Write the result as JSON.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many samples.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Samples run together.")] = 16
    generated: Annotated[
        bool, typer.Option("--generated", help="Also decode and compare normalized text.")
    ] = False
    max_pixels: MaxPixels = None
    max_frames: MaxFrames = None
    max_length: MaxLength = None
    seq_length: SeqLength = None
    trust_remote_code: Trust = False
    arch: Arch = None
    as_json: AsJson = False


@dataclass(frozen=True)
class GenerateOptions:
    """The arguments and options of ``prismquant generate``."""

    model: Model
    prompt: Annotated[str, typer.Option(help="What is asked.", show_default=False)]
    image: Annotated[list[str] | None, typer.Option(help="A picture that it is about.")] = None
    video: Annotated[list[str] | None, typer.Option(help="A clip that it is about.")] = None
    reference: Annotated[
        str | None, typer.Option(help="Model to ask as well, usually the unquantized one.")
    ] = None
    packed: Annotated[
        bool, typer.Option("--packed", help="Keep weights in codes, and multiply with these.")
    ] = False
    show_kernels: Annotated[
        bool, typer.Option("--show-kernels", help="Say which code multiplies; with --packed.")
    ] = False
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most of an answer.")] = 128
    temperature: Annotated[
        float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token.")
    ] = 0.0
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Sample from tokens of this probability together.")
    ] = 1.0
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu"
    dtype: Annotated[
        str | None, typer.Option(help="Of the arithmetic; the checkpoint's by default.")
    ] = None
    trust_remote_code: Trust = False
    arch: Arch = None
    as_json: AsJson = False


@dataclass(frozen=True)
class SearchOptions:
    """The arguments and options of ``prismquant search``."""

    sensitivity: Annotated[
        str, typer.Argument(help="File that `prismquant analyze` wrote.", show_default=False)
    ]
    out: Annotated[
        str | None, typer.Option(help="Write the recipe to this file; printed without it.")
    ] = None
    bits: Annotated[
        str | None, typer.Option(help="Mean bits per weight of the whole model, e.g. 4.6.")
    ] = None
    size: Annotated[str | None, typer.Option(help="Bytes of all tensors, e.g. 3.2GB.")] = None
    max_loss: Annotated[
        str | None,
        typer.Option("--max-loss", help="Predicted loss; by itself, the fewest bytes are found."),
    ] = None
    weight: Annotated[
        list[str] | None, typer.Option(help="What classes of tokens count: answer=1,text=0.2.")
    ] = None
    cap: Annotated[
        list[str] | None,
        typer.Option(help="The most of a modality, in bits or bytes: vision=8, llm=2GB."),
    ] = None
    floor: Annotated[list[str] | None, typer.Option(help="The least of a modality: llm=4.")] = None
    cache_bytes: Annotated[
        str | None, typer.Option("--cache-bytes", help="Keys and values of a token, e.g. 64KiB.")
    ] = None
    latency: Annotated[
        str | None, typer.Option(help="JSON file of milliseconds by layer and format.")
    ] = None
    latency_ms: Annotated[
        str | None, typer.Option("--latency-ms", help="Milliseconds by that file.")
    ] = None
    tensor_parallel: Shards = None
    reader: Annotated[
        str | None,
        typer.Option("--for", help="Who loads it: vllm, transformers, sglang or prismquant."),
    ] = None
    pareto: Annotated[
        str | None,
        typer.Option(help="Write the whole front to this folder: JSON, picture, recipes."),
    ] = None
    points: Annotated[
        int | None,
        typer.Option(min=2, max=1000, help="Sizes of the front of --pareto; 64 by default."),
    ] = None
    verify: Annotated[
        str | None,
        typer.Option(help="Samples with answers: run the mix, measure it, keep swaps that help."),
    ] = None
    swaps: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1000,
            help="Swaps that --verify tries, 8 by default; each quantizes the model.",
        ),
    ] = None
    model: Annotated[
        str | None, typer.Option(help="For --verify, if the model has moved since the analysis.")
    ] = None
    calib: Annotated[
        str | None, typer.Option(help="Calibration for --verify; by default as in the analysis.")
    ] = None
    arch: Arch = None
    as_json: AsJson = False


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Make a command of a function of one value, whose fields become arguments and options."""
    hints = get_type_hints(options, include_extras=True)

    def made(run: Callable[[T], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            run(options(**given))

        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(options)  # type: ignore[arg-type]
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = hints
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return command

    return made
