"""From a file of a sensitivity to the recipe of the best mix, and to the whole front."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismquant.errors import ModelError, PlanError
from prismquant.evaluate.figures import Outcome
from prismquant.export.exporter import Progress
from prismquant.outputs import require_empty, require_text_result
from prismquant.recipe.schema import Recipe
from prismquant.search.allocate import Mix, allocate
from prismquant.search.constraints import Constraints
from prismquant.search.found_recipe import (
    FIRST_WORDS,
    WrittenRecipe,
    provenance,
    recipe_of,
    require_changes,
)
from prismquant.search.front_picture import front_svg
from prismquant.search.pareto import Front, pareto_front
from prismquant.search.repair import Measured, Verified, measured, told, verified_lines, verify
from prismquant.search.sensitivity import Sensitivity
from prismquant.search.sensitivity_file import read_sensitivity
from prismquant.storage import file_digest, make_folder, write_json, write_text

FRONT_VERSION = 1
"""Version of the layout of ``front.json``."""


@dataclass(frozen=True)
class AsAnalyzed:
    """Calibration data of the mixes that are measured.

    Attributes:
        source: By file or name; None: there are none.
        samples: How many are taken; None: as many as the recipe says.
        seq_length: Tokens of a window of running text; None: the usual number.
    """

    source: str | None = None
    samples: int | None = None
    seq_length: int | None = None

    @classmethod
    def of(cls, found: Sensitivity) -> AsAnalyzed:
        """The data by which an analysis was made."""
        data = found.calibration
        count = sum(dict(data.get("samples") or {}).values())
        source = str(data.get("source") or "") or None
        return cls(source, count or None, data.get("seq_length")) if source else cls()


Trial = Callable[[Path, Recipe, AsAnalyzed, Path], tuple[int, Sequence[Outcome]]]
"""Quantizes a model by a recipe, with calibration data, into a folder, and measures it against the
model. Gives the bytes of all tensors on disk, and what became of each sample."""


@dataclass(frozen=True)
class FoundMix:
    """The best mix within constraints, as a recipe.

    Attributes:
        mix: Formats of all units, with what is predicted.
        recipe: The recipe; laid over the model it gives every layer the format of the mix.
        text: The recipe as YAML, with where it comes from in a comment.
        front: The whole front as ``front.json`` has it; None: it was not asked for.
        verified: What was measured and changed; None: the mix was not verified.
    """

    mix: Mix
    recipe: Recipe
    text: str
    front: Mapping[str, Any] | None = None
    verified: Verified | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        found = {"name": self.recipe.name, **summary(self.mix), **asdict(self.mix)}
        found |= {} if self.front is None else {"front": self.front}
        return found | ({} if self.verified is None else {"verified": told(self.verified)})


@dataclass(frozen=True)
class Verification:
    """Way in which a mix is to be measured.

    Attributes:
        data: Samples that no statistic saw, by file or name.
        trial: Quantizes and measures.
        swaps: At most so many swaps are tried.
        model: Folder of the model; None: where it lay when it was analyzed.
        calibration: Calibration data; None: those of the analysis.
    """

    data: str
    trial: Trial
    swaps: int
    model: Path | None = None
    calibration: str | None = None


@dataclass(frozen=True)
class SearchRequest:
    """Everything that a caller of :func:`prismquant.api.find_mix` may say, checked.

    Attributes:
        source: The file of the sensitivity.
        constraints: What a mix must keep to.
        out: File of the recipe; None: none is written.
        pareto: Folder of the front; None: none is computed.
        points: Sizes at which it is computed.
        verification: How the mix is to be measured; None: it is not.
    """

    source: Path
    constraints: Constraints
    out: Path | None
    pareto: Path | None
    points: int
    verification: Verification | None


def search_mix(
    asked: SearchRequest, progress: Progress = lambda done, total, name: None
) -> FoundMix:
    """Find the mix of formats that loses least within constraints, and write what is asked for.

    Args:
        asked: What is looked for, and where the results go.
        progress: Is told how many sizes, or mixes to measure, are done, of how many, and the next.

    Raises:
        ArgumentError: Nothing bounds the mix.
        PrismQuantError: A file cannot be read or written, no mix keeps to the constraints, or the
            mix cannot be measured.
    """
    constraints = asked.constraints
    if asked.pareto is None:
        constraints.require_bounded()
    else:
        require_empty(asked.pareto, remedy="choose another folder for --pareto, or delete it")
    if asked.out is not None:
        require_text_result(asked.out, inputs=[asked.source], first_words=FIRST_WORDS)
    search = _Search(
        read_sensitivity(asked.source), constraints, asked.source, file_digest(asked.source)
    )
    mix = allocate(search.found, constraints) if constraints.bounded else None
    front = None
    if asked.pareto is not None:
        front = pareto_front(search.found, constraints, asked.points, progress)
        mix = mix or front.mixes[front.knee]
    if mix is None:
        raise PlanError("no mix was looked for", remedy="give a bound, or --pareto")
    require_changes(mix)
    content = None
    if asked.pareto is not None and front is not None:
        content = search.write_front(asked.pareto, front)
    verified = None
    if asked.verification is not None:
        verified = search.verify(mix, asked.verification, asked.out, progress)
        mix = verified.mix
    lines = (
        []
        if asked.verification is None or verified is None
        else verified_lines(verified, asked.verification.data)
    )
    written = search.recipe(mix, lines)
    if asked.out is not None:
        write_text(asked.out, written.text)
    return FoundMix(mix, written.recipe, written.text, content, verified)


def summary(mix: Mix) -> dict[str, Any]:
    """Counts of units by format, the most common first."""
    return {"units": dict(Counter(mix.formats.values()).most_common())}


@dataclass(frozen=True)
class _Search:
    """A sensitivity with its file, and what is asked of it."""

    found: Sensitivity
    constraints: Constraints
    source: Path
    digest: str

    def recipe(self, mix: Mix, more: Sequence[str] = ()) -> WrittenRecipe:
        """The recipe of a mix, with where it comes from in its comment, and more lines there."""
        name = f"{self.found.method}-{mix.bits:.2f}-bits"
        lines = provenance(self.found, mix, self.constraints, str(self.source), self.digest)
        source = {"file": str(self.source), "sha256": self.digest}
        return recipe_of(self.found, mix, self.constraints, name, [*lines, *more], source)

    def verify(
        self, mix: Mix, asked: Verification, out: Path | None, progress: Progress
    ) -> Verified:
        """Measure the mix in folders beside the recipe, which are gone afterwards."""
        model = asked.model or Path(self.found.model)
        data = AsAnalyzed.of(self.found)
        if asked.calibration is not None:
            data = AsAnalyzed(asked.calibration)
        weights = self.constraints.weights or self.found.weights
        done = itertools.count()
        with tempfile.TemporaryDirectory(
            prefix=".prismquant-verify-", dir=None if out is None else out.parent
        ) as place:

            def run(tried: Mix) -> Measured:
                number = next(done)
                progress(number, asked.swaps + 1, f"measuring mix {number + 1}")
                folder = Path(place) / str(number)
                recipe = self.recipe(tried).recipe
                size, outcomes = asked.trial(model, recipe, data, folder)
                shutil.rmtree(folder, ignore_errors=True)
                if size != tried.stored_bytes:
                    raise ModelError(
                        f"the checkpoint has {size:,} bytes of tensors, and the sensitivity says "
                        f"{tried.stored_bytes:,}: it is of another model",
                        where=str(model),
                        remedy="name the one that was analyzed with --model",
                    )
                return measured(outcomes, weights)

            return verify(self.found, mix, self.constraints, run, asked.swaps)

    def write_front(self, folder: Path, front: Front) -> dict[str, Any]:
        """Write recipes, ``front.svg`` and ``front.json``, which comes last; gives its content."""
        make_folder(folder)
        points = []
        for number, mix in enumerate(front.mixes):
            name = f"point-{number:03}.yaml" if mix.changes else None
            if name is not None:
                write_text(folder / name, self.recipe(mix).text)
            told = asdict(mix)
            told.pop("notes")
            points.append({"recipe": name, **summary(mix), **told})
        content = {
            "version": FRONT_VERSION,
            "sensitivity": str(self.source),
            "sensitivity_sha256": self.digest,
            "model": self.found.model,
            "method": self.found.method,
            "solver": self.found.solver,
            "constraints": self.constraints.describe(),
            "knee": front.knee,
            "notes": list(front.mixes[0].notes),
            "points": points,
        }
        write_text(folder / "front.svg", front_svg(content))
        write_json(folder / "front.json", content)
        return content
