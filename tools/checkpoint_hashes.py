"""Hashes of the checkpoints that a version of PrismQuant writes, to show that two write the same.

    git worktree add /tmp/old 8265462
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
    PYTHONPATH=/tmp/old python tools/checkpoint_hashes.py --inputs /tmp/inputs --out old.json
    PYTHONPATH=.        python tools/checkpoint_hashes.py --inputs /tmp/inputs --out new.json
    python tools/checkpoint_hashes.py --compare old.json new.json

Four small models are quantized in each of the ways below, in float32 on one thread of a CPU, and
sha256 is taken of every shard and of ``config.json``. The package is the one on PYTHONPATH; only
its public functions are called. Source models and calibration data are made once, by the first
version that is run, and hashed as well: a comparison of runs on different inputs says so.

The processor and the version of torch decide the last bits: compare runs of one machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SAMPLES = 6

# Where the makers of inputs live: the first name that can be imported is taken.
EMBEDDED = Path("demo/checkpoint")
SCENES = ("prismquant.demo.scenes",)
OUTLIERS = ("prismquant.models.outliers",)
TINY_MODELS = "tests/**/tiny_vlm.py"


@dataclass(frozen=True)
class Case:
    """One way to quantize.

    Attributes:
        preset: Name of the recipe.
        rule: Fields that are set for every layer besides.
        calibrated: Whether calibration data are given.
    """

    preset: str
    rule: dict[str, Any] = field(default_factory=dict)
    calibrated: bool = True

    @property
    def name(self) -> str:
        """The preset, and what is said besides."""
        extras = [f"{key}={value}" for key, value in self.rule.items()]
        return " ".join([self.preset, *extras, *([] if self.calibrated else ["no data"])])


# Together: every solver, transform, tuner and correction, static and dynamic inputs, keys and
# values, vision towers, and every kind of number format.
CASES = (
    Case("w4a16"),
    Case("w8a8-static-all"),
    Case("awq-gptq-w4a16"),
    Case("smoothquant-w8a8"),
    Case("rotation-gptq-w4a8"),
    Case("nvfp4"),
    Case("fp8-kv"),
    Case("mquant-w4a8-static"),
    Case("zeroquant-w4a8"),
    Case("autoround-w2a16"),
    # Two paths that no preset takes: gradients of the loss, and no calibration at all.
    Case("w4a16", {"vision_weight": "gradient"}),
    Case("mxfp8-all", {"solver": "rtn"}, calibrated=False),
)
MODELS = ("embedded", "embedded-outliers", "qwen3_vl", "video_llama_3")

Hashes = dict[str, str]


@dataclass(frozen=True)
class Input:
    """A source checkpoint and its calibration data."""

    model: Path
    calibration: Path

    def hashes(self) -> Hashes:
        """Of all files that a run reads."""
        files = [path for path in self.calibration.parent.rglob("*") if path.is_file()]
        data = hashlib.sha256(b"".join(sha256(path).encode() for path in sorted(files)))
        return {**hash_files(self.model), "calibration": data.hexdigest()}


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> Hashes:
    """Digests of a checkpoint's shards and of its ``config.json``."""
    shards = sorted(folder.rglob("*.safetensors"))
    found = {str(path.relative_to(folder)): sha256(path) for path in shards}
    return {**found, "config.json": sha256(folder / "config.json")}


def first_module(names: tuple[str, ...]) -> Any:
    """The first of the modules that this version of the package has."""
    for name in names:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise SystemExit(f"none of these modules exists: {', '.join(names)}; name the new one here")


def tiny_models(package: Path) -> Any:
    """The tests' builder of small random models, from beside the package."""
    found = sorted(package.parent.glob(TINY_MODELS))
    if not found:
        raise SystemExit(f"no {TINY_MODELS} beside {package}: run a source tree")
    sys.path.insert(0, str(found[0].parent))
    return importlib.import_module(found[0].stem)


def make_input(name: str, folder: Path) -> Input:
    """Build a source model and its calibration data, unless they are there from an earlier run."""
    import prismquant

    package = Path(str(prismquant.__file__)).parent
    model, finished = folder / name / "model", folder / name / "calibration-file"
    if not finished.exists():
        shutil.rmtree(folder / name, ignore_errors=True)
        data = folder / name / "calibration"
        if name.startswith("embedded"):
            if name == "embedded":
                shutil.copytree(package / EMBEDDED, model)
            else:
                first_module(OUTLIERS).add_outliers(package / EMBEDDED, model, modality="llm")
            scenes = first_module(SCENES)
            calibration = scenes.write_dataset(data, split="calibration", count=SAMPLES)
        else:
            builder = tiny_models(package)
            builder.build(name, model)
            calibration = builder.samples(data, count=SAMPLES)
        finished.write_text(Path(calibration).name)
    return Input(model, folder / name / "calibration" / finished.read_text())


def quantize(case: Case, source: Input, out: Path) -> Hashes:
    """Run one case; an error is a result too."""
    import prismquant

    recipe = prismquant.load_recipe(case.preset)
    if case.rule:
        recipe = recipe.with_rules(case.rule)
    calibration = source.calibration if case.calibrated else None
    try:
        prismquant.quantize(
            source.model, recipe, out, calibration, fallback=True, device="cpu", dtype="float32"
        )
    except Exception as error:
        # The other cases still count. Scratch folders are called differently each time.
        return {"error": f"{type(error).__name__}: {error}".replace(str(out), "OUT")}
    return hash_files(out)


def measure(
    models: list[str], presets: list[str], inputs: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Quantize every model in every way; returns the report that is compared."""
    import torch

    import prismquant

    torch.set_num_threads(1)
    runs: dict[str, dict[str, Hashes]] = {}
    sources: dict[str, Hashes] = {}
    for name in models:
        source = make_input(name, inputs)
        sources[name], runs[name] = source.hashes(), {}
        for case in CASES:
            if case.preset not in presets:
                continue
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                found = quantize(case, source, Path(scratch) / "out")
            runs[name][case.name] = found
            said = found.get("error") or f"{len(found) - 1} shards"
            tell(f"{name:18} {case.name:32} {time.monotonic() - start:6.1f} s  {said}")
    return {
        "package": str(Path(str(prismquant.__file__)).parent),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "inputs": sources,
        "runs": runs,
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """One line for each thing in which two reports differ, or that one of them lacks."""
    for key in ("torch", "machine"):
        if old[key] != new[key]:
            yield f"{key}: {old[key]} -> {new[key]}"
    for model in sorted({*old["runs"], *new["runs"]}):
        before, after = old["inputs"].get(model, {}), new["inputs"].get(model, {})
        yield from _changes(f"{model}: input", before, after)
        before, after = old["runs"].get(model, {}), new["runs"].get(model, {})
        for case in sorted({*before, *after}):
            yield from _changes(f"{model}, {case}:", before.get(case, {}), after.get(case, {}))


def _changes(where: str, old: Hashes, new: Hashes) -> Iterator[str]:
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            before, after = (side.get(name, "absent") for side in (old, new))
            short = 16 if name != "error" else None
            yield f"{where} {name}: {before[:short]} -> {after[:short]}"


def compare(old_path: Path, new_path: Path) -> int:
    """Print the differences of two reports; 1 if there are any, or if nothing was compared."""
    old, new = (json.loads(path.read_text()) for path in (old_path, new_path))
    lines = list(differences(old, new))
    print(*lines, sep="\n", end="\n" if lines else "")
    runs = [run for model in new["runs"].values() for run in model.values()]
    refused = sum("error" in run for run in runs)
    print(f"{len(runs)} runs, {refused} of them refused; {len(lines)} differences")
    return int(bool(lines) or len(runs) == refused)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    presets = list(dict.fromkeys(case.preset for case in CASES))
    parser = argparse.ArgumentParser(description="hashes of quantized checkpoints")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--out", type=Path, help="JSON file of the hashes")
    parser.add_argument("--inputs", type=Path, help="folder of source models, kept for later runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--presets", nargs="+", choices=presets, default=presets)
    options = parser.parse_args(arguments)
    if options.compare:
        return compare(*options.compare)
    if not options.out or not options.inputs:
        parser.error("--out and --inputs are needed, or --compare")
    report = measure(
        options.models, options.presets, options.inputs, lambda line: print(line, flush=True)
    )
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any("error" in run for model in report["runs"].values() for run in model.values()))


if __name__ == "__main__":
    sys.exit(main())
