"""compressed-tensors' own decompression of checkpoints, for an environment of its own.

    python -m venv old && old/bin/pip install torch==2.13.0 transformers==5.20.0
    old/bin/pip install compressed-tensors==0.17.0
    old/bin/python -m bench.peers.decompress < JOBS

A job is a line of JSON: ``folder``; ``dense``, a folder with the expected weights in float32; and
``layers``, what the configuration calls each quantized layer, by the prefix of its tensors. Answers
a line each: the largest difference, after both were rounded to the dtype that the library gives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.peers import worker


def main() -> int:
    """Answer every job."""
    torch.set_num_threads(1)
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    for line in sys.stdin:
        job = json.loads(line)
        try:
            found = decompressed(Path(job["folder"]), Path(job["dense"]), job["layers"])
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({"folder": job["folder"], **found}), flush=True)
    return 0


def decompressed(folder: Path, dense: Path, layers: dict[str, str]) -> dict[str, Any]:
    """The library's weights against the dense ones."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = {name: g for g in section["config_groups"].values() for name in g["targets"]}
    stored, expected = tensors(folder), tensors(dense)
    apart, dtypes = 0.0, set()
    for prefix, called in layers.items():
        group = groups[called]
        scheme = QuantizationScheme.model_validate(group)
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        own = {n.removeprefix(f"{prefix}."): t for n, t in stored.items() if n.startswith(prefix)}
        values = compressor.decompress(own, scheme)["weight"]
        wanted = expected[f"{prefix}.weight"].to(values.dtype)
        apart = max(apart, float((values.float() - wanted.float()).abs().max()))
        dtypes.add(str(values.dtype).removeprefix("torch."))
    return {"apart": apart, "dtypes": sorted(dtypes)}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


if __name__ == "__main__":
    sys.exit(main())
