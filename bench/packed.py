"""Products with weights in codes against dense ones, and what a packed model takes.

    python -m bench.packed [--size OUT IN] [--rows 1 4 16 ..] [--formats int4-g128 ..]
                           [--shape qwen2-vl-2b --blocks N] [--tokens N] [--out FILE.md]

The first table has seconds of the processor for one layer: torch's product with a dense weight, in
bfloat16 and in float32, and ours with codes of each format, by each backend that takes the case;
in the same run, the least of several. The second, with --shape, quantizes a random model of real
dimensions to W4A16, loads it dense and packed, each in a process of its own, and decodes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

import prismquant as pq
from bench.engine.models import MODELS, weight_files_bytes, write_model
from bench.engine.process import measure, thread_environment
from prismquant.export.load_quantized import load_model
from prismquant.formats.quantized_layer import QuantizedTensor
from prismquant.formats.spec import NumberSpec, spec
from prismquant.kernels.dispatch import PACKED_LINEAR, use
from prismquant.kernels.tiled_weight import TiledWeight
from prismquant.memory import resident_bytes
from prismquant.models.config import identify, native_config
from prismquant.models.load import empty_model
from prismquant.report.tables import format_bytes, markdown_table, rich_table

FORMATS = (
    "int4-g128",
    "int4-g128-asym",
    "int3-g128",
    "int2-g64",
    "int8-channel",
    "nvfp4",
    "fp8-channel",
)
ROWS = (1, 4, 16, 32, 64, 256)
_REPEATS = 5
_Table = tuple[list[str], list[list[str]]]


def least_seconds(work: Callable[[], object]) -> float:
    """Of this thread's processor; other processes make it no longer."""
    found = []
    for _ in range(_REPEATS):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return min(found)


def random_codes(form: NumberSpec, shape: tuple[int, int]) -> QuantizedTensor:
    """A weight whose codes are drawn; what they are worth changes no time."""
    generator = torch.Generator().manual_seed(0)
    integers = form.kind == "int"
    span = (-(1 << form.bits - 1), 1 << form.bits - 1) if integers else (0, 1 << form.bits - 1)
    codes = torch.randint(*span, shape, generator=generator, dtype=torch.int64).to(torch.int8)
    scale = torch.ones(form.scale_shape(*shape), dtype=torch.float32)
    zero = None if form.symmetric else torch.zeros_like(scale, dtype=torch.int8)
    divisor = torch.ones(1) if form.scale == "e4m3" else None
    if form.scale.startswith("e8m0"):
        scale = scale.to(torch.float8_e8m0fnu)
    return QuantizedTensor(codes, scale, zero, form, divisor)


def dense_row(x: Tensor, weight: Tensor) -> float:
    """Seconds of torch's product."""
    return least_seconds(lambda: functional.linear(x, weight))


def backend_times(tiled: TiledWeight, x: Tensor) -> Iterator[tuple[str, float]]:
    """Seconds of each backend that takes an input."""
    for backend in PACKED_LINEAR.homes:
        with use(backend):
            try:
                PACKED_LINEAR.choose(x, tiled)
            except pq.PrismQuantError:
                continue
            yield backend, least_seconds(lambda: PACKED_LINEAR(x, tiled))


def layer_table(shape: tuple[int, int], formats: Sequence[str], rows: Sequence[int]) -> _Table:
    """Milliseconds of one layer by what multiplies and by rows of the input."""
    headers = ["weight", "by", *(f"{count} rows" for count in rows)]
    inputs = {count: torch.randn(count, shape[1]) for count in rows}
    cells = []
    weight = torch.randn(shape)
    for dtype in (torch.bfloat16, torch.float32):
        own = weight.to(dtype)
        times = [f"{1e3 * dense_row(x.to(dtype), own):.1f}" for x in inputs.values()]
        cells.append([f"dense {str(dtype).removeprefix('torch.')}", "torch", *times])
    del weight
    for name in formats:
        tiled = TiledWeight.of(random_codes(spec(name), shape))
        found = {count: dict(backend_times(tiled, x.bfloat16())) for count, x in inputs.items()}
        for backend in PACKED_LINEAR.homes:
            known = (times.get(backend) for times in found.values())
            cells.append(
                [name, backend, *("" if one is None else f"{1e3 * one:.1f}" for one in known)]
            )
    return headers, cells


@torch.no_grad()
def alone(folder: Path, packed: bool, tokens: int, told: Path) -> None:
    """What a process does: load, read a question, decode, and leave the figures in a file."""
    arch = identify(folder)
    empty_model(native_config(arch, folder), arch)  # so that libraries are not counted
    before = resident_bytes()
    started = time.perf_counter()
    model: Any = load_model(folder, packed=packed)
    loaded = time.perf_counter() - started
    held = resident_bytes() - before
    question = torch.arange(256).view(1, -1) % 100 + 100
    started = time.perf_counter()
    model(input_ids=question, attention_mask=torch.ones_like(question))
    read = time.perf_counter() - started
    start = question[:, :8]
    started = time.perf_counter()
    model.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
    )
    decoded = time.perf_counter() - started
    found = {"loaded": loaded, "held": held, "read": read, "decoded": decoded / tokens}
    told.write_text(json.dumps(found))


def model_table(shape: str, blocks: int | None, tokens: int) -> _Table:
    """Memory and seconds of a model, dense and packed.

    Raises:
        RuntimeError: A process failed; its last words.
    """
    headers = ["loaded", "stored", "held", "of stored", "peak RSS", "load s"]
    headers += ["256 tokens s", "ms a token"]
    cells = []
    with tempfile.TemporaryDirectory() as work:
        dimensions = MODELS[shape].cut(blocks) if blocks else MODELS[shape]
        source = write_model(Path(work) / "model", dimensions)
        out, told = Path(work) / "out", Path(work) / "told.json"
        pq.quantize(source, pq.load_recipe("w4a16").with_rules({"solver": "rtn"}), out)
        for folder, packed in ((source, False), (out, False), (out, True)):
            command = [sys.executable, "-m", "bench.packed", "--alone", str(folder), str(told)]
            command += ["--tokens", str(tokens), *["--packed"] * packed]
            done = measure(command, log=Path(work) / "log", environment=thread_environment(1))
            if done.code:
                raise RuntimeError(done.tail)
            found = json.loads(told.read_text())
            stored = weight_files_bytes(folder)
            sizes = [format_bytes(stored), format_bytes(found["held"])]
            sizes += [f"{found['held'] / stored:.2f}", format_bytes(done.peak)]
            seconds = [f"{found['loaded']:.1f}", f"{found['read']:.2f}"]
            what = "bfloat16" if folder == source else "W4A16, packed" if packed else "W4A16, dense"
            cells.append([what, *sizes, *seconds, f"{1e3 * found['decoded']:.0f}"])
    return headers, cells


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them as Markdown where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=[3584, 9472], metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--shape", choices=sorted(MODELS), help="a whole model of its dimensions")
    parser.add_argument("--blocks", type=int, help="cut its towers to so many")
    parser.add_argument("--tokens", type=int, default=16, help="to decode")
    parser.add_argument("--out", type=Path, help="write the tables as Markdown, too")
    parser.add_argument("--alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--packed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone is not None:
        alone(options.alone[0], options.packed, options.tokens, options.alone[1])
        return
    torch.set_num_threads(1)
    tables: dict[str, _Table] = {}
    if options.formats:
        title = f"one layer, {options.size[0]} x {options.size[1]}, ms of one core"
        tables[title] = layer_table(tuple(options.size), options.formats, options.rows)
    if options.shape:
        title = f"{options.shape}, one of {os.cpu_count()} cores"
        tables[title] = model_table(options.shape, options.blocks, options.tokens)
    for title, (headers, cells) in tables.items():
        Console(width=120, highlight=False).print(rich_table(headers, cells, title=title))
    if options.out is not None:
        text = [f"{title}\n\n{markdown_table(*table)}" for title, table in tables.items()]
        options.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
