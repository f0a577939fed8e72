"""Other tools' analyses of the same samples, each in an environment of its own."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.search.subjects import write_inputs
from bench.search.tables import Result

MODELOPT = ("gradient", "kl_div")


def bits_and_group(name: str) -> tuple[int, int]:
    """Bits and group size of symmetric integers in groups, e.g. ``int4-g32``.

    Raises:
        SystemExit: It is another format, which other tools are not given here.
    """
    found = re.fullmatch(r"int(\d)-g(\d+)", name)
    if found is None:
        raise SystemExit(f"other tools are compared with formats like int4-g32 alone, not {name}")
    return int(found[1]), int(found[2])


def effective_bits(formats: Sequence[str]) -> list[float]:
    """What other tools count as bits, of the weights' codes alone, at each budget."""
    bits = [bits_and_group(name)[0] for name in formats]
    found: list[float] = []
    for low, high in itertools.pairwise(bits):
        found += ([float(low)] if found else []) + [(low + high) / 2]
    return found


@dataclass(frozen=True)
class Analysis:
    """One way in which another tool scores layers and finds mixes.

    Attributes:
        python: Interpreter of its environment.
        module: The module of this bench that runs it.
        options: More words of its command line.
    """

    python: str
    module: str
    options: tuple[str, ...] = ()

    def run(self, folder: Path, calibration: Path, formats: Sequence[str], work: Path) -> Result:
        """Scores by group of modules, bits of each module at each budget, and what it took.

        Args:
            folder: The float checkpoint.
            calibration: Samples; the tool gets what the model is given for each.
            formats: On offer, fewest bits first; all in groups of one size.
            work: Where files may lie for a moment.
        """
        with tempfile.TemporaryDirectory(dir=work) as place:
            samples, out = Path(place) / "samples", Path(place) / "out.json"
            write_inputs(folder, calibration, samples)
            command = [self.python, "-m", self.module, str(folder), str(samples), str(out)]
            grids = [bits_and_group(name) for name in formats]
            command += [*self.options, "--group-size", str(grids[0][1])]
            command += ["--formats", *(str(bits) for bits, _ in grids)]
            command += ["--bits", *map(str, effective_bits(formats))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-4000:])
            found: Result = json.loads(out.read_text(encoding="utf-8"))
            return found


def analyses(
    modelopt: str | None, auto_round: str | None, modes: Sequence[str]
) -> Mapping[str, Analysis]:
    """Analyses of the tools whose environments are there, by the name that the table has for them.

    Args:
        modelopt: Interpreter of an environment with ModelOpt; None: it is left out.
        auto_round: Likewise with AutoRound.
        modes: Of ModelOpt.
    """
    found = {}
    if modelopt is not None:
        for mode in modes:
            words = ("--method", mode)
            found[f"modelopt {mode}"] = Analysis(modelopt, "bench.search.modelopt", words)
    if auto_round is not None:
        found["autoscheme"] = Analysis(auto_round, "bench.search.auto_round")
    return found
