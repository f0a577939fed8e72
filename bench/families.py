"""Every family that the package describes: its file tried, a small model quantized, read by others.

    python -m bench.families [--families NAME ..] [--cells FILE.jsonl]
        [--vllm-python PATH --vllm-path DIR]           (see bench/vllm_loader.py)

For each family a random model with two narrow blocks in each tower, as transformers writes it. The
architecture file is tried (prismquant arch check). Then all towers are quantized by each preset, on
texts, and on pictures, clips and sounds where the family takes them; the result is measured against
the float model, read by transformers, and its logits are compared with ours. Finished families are
kept in --cells, and not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prismquant.api import measure, quantize
from prismquant.check import Severity, check
from prismquant.errors import PrismQuantError, brief
from prismquant.export.load_quantized import load_model
from prismquant.families.check_family import check_family
from prismquant.families.small_batches import kinds_of
from prismquant.families.specimen import write_samples
from prismquant.models.bind import bind
from prismquant.models.config import import_transformers
from prismquant.models.processor import load_processor

sys.path.append("tests")
import tiny_families
import tiny_text
import tiny_vlm
from known_failures import inputs_scaled_per_token
from sample_logits import sample_logits

PRESETS = ("w4a16-all", "w8a8-all")
_SAMPLES = 8

Row = dict[str, Any]


def makers() -> dict[str, Any]:
    """Each family, and the module that makes a small model of it."""
    found = dict.fromkeys(tiny_vlm.FAMILIES, tiny_vlm)
    for maker in (tiny_families, tiny_text):
        found |= dict.fromkeys((*maker.FAMILIES, *maker.SPARSE), maker)
    return found


def try_family(family: str, maker: Any, work: Path, vllm: tuple[str, str] | None) -> Row:
    """All that is known of a family after it was tried."""
    folder = maker.build(family, work / "source")
    started = time.monotonic()
    found = check_family(folder)
    row: Row = {"family": family, "title": found.title, "seconds": time.monotonic() - started}
    row["claims"] = [len(found.claims), [c.what for c in found.claims if c.holds is not True]]
    replays = [c.said for c in found.claims if c.what.startswith("units are run")]
    apart = [float(number) for said in replays for number in re.findall(r"by ([0-9.e+-]+)", said)]
    row["replay"] = max(apart, default=None)
    kinds = kinds_of(bind(folder).config, load_processor(folder))
    write_samples(work / "data", kinds, _SAMPLES)
    data = work / "data" / "samples.jsonl"
    for preset in PRESETS:
        # Of text alone there is one tower, which the presets without the suffix mean.
        asked = preset if bind(folder).arch.sees else preset.removesuffix("-all")
        out = work / preset
        try:
            row[preset] = _quantized(folder, asked, out, data)
        except PrismQuantError as error:
            row[preset] = {"error": error.what}
            continue
        if vllm is not None:
            row[preset]["vllm"] = _in_vllm(out, *vllm)
    return row


def _quantized(folder: Path, preset: str, out: Path, data: Path) -> Row:
    """A preset's result: what was lost, and how far transformers' logits are from ours."""
    quantize(folder, preset, out, data, fallback=True)
    found = measure(out, data, reference=folder)
    cell: Row = {"kl": found.overall.divergence["answer"].kl}
    cell["vllm rules"] = _refused(out, "vllm") or "ok"
    if refused := _refused(out, "transformers"):
        return cell | {"transformers": refused}
    ours = sample_logits(load_model(out), folder, data)
    kind = getattr(import_transformers(), bind(folder).arch.hf_class)
    try:
        theirs = kind.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
        with inputs_scaled_per_token():
            cell["transformers"] = float((sample_logits(theirs, folder, data) - ours).abs().max())
    # Another library, on what it may not read.
    except Exception as error:
        cell["transformers"] = brief(error)
    return cell


def _refused(folder: Path, reader: str) -> str:
    """Why a reader does not take a checkpoint, by the rules of ``prismquant check``; or nothing."""
    found = check(folder, reader).findings
    return next((one.what for one in found if one.severity is Severity.ERROR), "")


def _in_vllm(folder: Path, python: str, path: str) -> str:
    """Verdict of vLLM's own loader."""
    loader = [python, "bench/vllm_loader.py", "--json", str(folder)]
    ran = subprocess.run(
        loader, capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}
    )
    told = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if not told:
        return "the loader itself failed"
    answer: Mapping[str, Any] = json.loads(told[-1])
    return "takes it" if answer["ok"] else str(answer.get("error"))


def main() -> int:
    """Try the families, and print what came of it; 1 if a claim is wrong."""
    known = makers()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=sorted(known), choices=sorted(known))
    parser.add_argument("--cells", type=Path, help="keeps finished families")
    parser.add_argument("--vllm-python")
    parser.add_argument("--vllm-path")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept: Path | None = options.cells
    lines = kept.read_text(encoding="utf-8").splitlines() if kept and kept.exists() else []
    done: dict[str, Row] = {row["family"]: row for row in map(json.loads, lines)}
    vllm = (options.vllm_python, options.vllm_path) if options.vllm_python else None
    for family in options.families:
        if family in done:
            continue
        print(family, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as work:
            done[family] = try_family(family, known[family], Path(work), vllm)
        if kept:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[family]) + "\n")
    rows = [done[family] for family in options.families]
    print(table(rows))
    print(json.dumps(rows))
    return int(any(row["claims"][1] for row in rows))


def table(rows: list[Row]) -> str:
    """A Markdown table of what came of each family."""
    parts = ("KL", "transformers apart", "vLLM")
    headers = ["family", "claims", "replay apart"]
    headers += [f"{preset}: {part}" for preset in PRESETS for part in parts]
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)]]
    for row in rows:
        count, wrong = row["claims"]
        line = [row["title"], f"{count - len(wrong)} of {count}", f"{row['replay']:.0e}"]
        for preset in PRESETS:
            cell = row[preset]
            read = cell.get("transformers", cell.get("error", ""))
            apart = f"{read:.0e}" if isinstance(read, float) else str(read)
            vllm = cell.get("vllm") or cell.get("vllm rules", "")
            line += [f"{cell['kl']:.4f}" if "kl" in cell else "", apart, vllm]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
