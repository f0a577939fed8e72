"""What PrismQuant does in a process of its own, for ``structure.py``: one JSON object on stdout.

    PYTHONPATH=.:tests python tools/structure_probes.py quantize SCRATCH
    PYTHONPATH=.:tests python tools/structure_probes.py load CHECKPOINT

``quantize`` gathers the functions that are entered while a small model is quantized by the preset
w4a16, ``load`` the modules that are there once a checkpoint has been loaded.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from functools import partial
from pathlib import Path
from types import CodeType, FrameType

import prismquant

FAMILY, PRESET = "qwen2_vl", "w4a16"
# A solve of one layer: the function of this name, in a file or folder whose name has this word.
SOLVE, SOLVER = "solve", "gptq"


class Trace:
    """A profile function that gathers which functions of the package are entered.

    Attributes:
        run: All of them.
        solve: Those entered during the first solve of a layer.
    """

    def __init__(self) -> None:
        self.package = f"{Path(str(prismquant.__file__)).parent}{os.sep}"
        self.run: set[CodeType] = set()
        self.solve: set[CodeType] = set()
        self._solving: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Take note of a call; what Python calls a profile function with."""
        code = frame.f_code
        if not code.co_filename.startswith(self.package):
            return
        if event == "return" and frame is self._solving:
            self._solving = None
        # Bodies of modules and classes lack this flag; comprehensions have names in brackets.
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_name[0] != "<":
            self.run.add(code)
            if not self.solve and self._is_solve(code):
                self._solving = frame
            if self._solving is not None:
                self.solve.add(code)

    def _is_solve(self, code: CodeType) -> bool:
        return code.co_name == SOLVE and SOLVER in code.co_filename.removeprefix(self.package)

    def named(self, codes: set[CodeType]) -> list[str]:
        """File and name of each function."""
        return [f"{c.co_filename.removeprefix(self.package)}:{c.co_qualname}" for c in codes]


def quantize(scratch: Path) -> dict[str, list[str]]:
    """Functions entered by one run, whose checkpoint lies in ``scratch/out``, and by one solve.

    An earlier run has imported and compiled what is needed: whether compiled code was in numba's
    cache would change the numbers.
    """
    import tiny_vlm  # type: ignore[import-not-found]

    model = tiny_vlm.build(FAMILY, scratch / "model")
    calibration = tiny_vlm.samples(scratch / "data")
    run = partial(
        prismquant.quantize, model, PRESET, calibration=calibration, device="cpu", dtype="float32"
    )
    run(out=scratch / "earlier")
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    run(out=scratch / "out")
    sys.setprofile(None)
    return {"run": trace.named(trace.run), "solve": trace.named(trace.solve)}


def load(checkpoint: Path) -> dict[str, list[str]]:
    """Modules of the package once a checkpoint has been loaded."""
    prismquant.load(checkpoint)
    package = prismquant.__name__
    return {"modules": [name for name in sys.modules if name.split(".")[0] == package]}


if __name__ == "__main__":
    found = {"quantize": quantize, "load": load}[sys.argv[1]](Path(sys.argv[2]))
    print()
    print(json.dumps(found))
