"""The command that asks a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from prismquant.arguments import FLOATS, as_device, as_dtype, as_path
from prismquant.cli.output import say_json, show
from prismquant.errors import ArgumentError
from prismquant.report.tables import as_text, format_bytes, rich_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismquant.cli.options import GenerateOptions
    from prismquant.runtime.packed_layers import KernelUse


def generate(asked: GenerateOptions) -> None:
    """Ask a model, and another one the same, and look at the answers."""
    if asked.show_kernels and not asked.packed:
        raise ArgumentError(
            "a model that is not loaded packed multiplies by torch alone",
            where="--show-kernels",
            remedy="add --packed",
        )
    if not asked.temperature and asked.top_p != 1:
        raise ArgumentError(
            "the likeliest token is taken each time, so there is nothing to sample",
            where="--top-p",
            remedy="add --temperature, e.g. 0.7",
        )
    from prismquant.evaluate.ask import Decoding, Question, ask
    from prismquant.models.given_arch import described_by
    from prismquant.threads import use_threads

    folders = [as_path(asked.model, "model")]
    if asked.reference is not None:
        folders.insert(0, as_path(asked.reference, "reference"))
    question = Question(asked.prompt, tuple(asked.image or ()), tuple(asked.video or ()))
    decoding = Decoding(asked.max_new_tokens, asked.temperature, asked.top_p, asked.seed)
    dtype = None if asked.dtype is None else as_dtype(asked.dtype, known=FLOATS)
    device = as_device(asked.device)
    use_threads(None)
    replies = {}
    with described_by(asked.arch):
        for folder in folders:
            # A reference in floating point has no codes.
            replies[str(folder)] = ask(
                folder,
                question,
                decoding,
                packed=asked.packed and folder is folders[-1],
                device=device,
                dtype=dtype,
                trust_remote_code=asked.trust_remote_code,
            )
    if asked.as_json:
        say_json({name: asdict(reply) for name, reply in replies.items()})
        return
    for name, reply in replies.items():
        figures = (
            f"{reply.prompt_tokens} tokens read, {reply.tokens} written in {reply.seconds:.1f} s"
        )
        show(as_text(f"{name}: {figures}", "bold"), soft_wrap=True)
        show(as_text(reply.text or "(no text)"), soft_wrap=True)
    if asked.show_kernels:
        _show_kernels(replies[str(folders[-1])].kernels)


def _show_kernels(uses: Sequence[KernelUse]) -> None:
    """Print which code multiplies, and why what comes before it does not."""
    headers = ["weights", "layers", "memory", "one row", "many rows"]
    rows = [
        [use.format, str(use.layers), format_bytes(use.nbytes), use.decode, use.prefill]
        for use in uses
    ]
    show(rich_table(headers, rows))
    for refusal in dict.fromkeys(refusal for use in uses for refusal in use.refusals):
        show(as_text(f"note: not {refusal}", "yellow"), soft_wrap=True)
