"""GPTQModel reads many exports in one process, for an environment of its own.

    python -m venv peer && peer/bin/pip install gptqmodel==7.6.0 transformers==5.23.0
    peer/bin/python -m bench.peers.gptqmodel_reader < JOBS

A job is a line of JSON: ``folder`` and ``dense``, the same weights in floating point. Answers a
line each; see :mod:`bench.read_exports`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bench import read_exports
from bench.peers import worker


def main() -> int:
    """Answer every job."""
    torch.set_num_threads(1)
    _operators = worker.declare_torchvision_operators()  # gone as soon as nothing holds it
    from transformers import AutoModelForImageTextToText

    for line in sys.stdin:
        job = json.loads(line)
        try:
            dense = AutoModelForImageTextToText.from_pretrained(job["dense"], dtype=torch.bfloat16)
            found = read_exports.compared(Path(job["folder"]), dense)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({"folder": job["folder"], **found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
