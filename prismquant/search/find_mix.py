"""From a file of a sensitivity to the recipe of the best mix, and to the whole front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from prismquant.arguments import as_count, as_path
from prismquant.errors import PlanError
from prismquant.export.exporter import Progress
from prismquant.outputs import require_empty, require_text_result
from prismquant.recipe.schema import Recipe
from prismquant.search.allocate import Mix, allocate
from prismquant.search.constraints import Asked, Constraints, parse_constraints
from prismquant.search.found_recipe import FIRST_WORDS, WrittenRecipe, provenance, recipe_of
from prismquant.search.front_picture import front_svg
from prismquant.search.pareto import MAX_POINTS, Front, pareto_front
from prismquant.search.sensitivity import Sensitivity
from prismquant.search.sensitivity_file import read_sensitivity
from prismquant.storage import file_digest, make_folder, write_json, write_text

FRONT_VERSION = 1
"""Version of the layout of ``front.json``."""


@dataclass(frozen=True)
class FoundMix:
    """The best mix within constraints, as a recipe.

    Attributes:
        mix: Formats of all units, with what is predicted.
        recipe: The recipe; laid over the model it gives every layer the format of the mix.
        text: The recipe as YAML, with where it comes from in a comment.
        front: The whole front as ``front.json`` has it; None: it was not asked for.
    """

    mix: Mix
    recipe: Recipe
    text: str
    front: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        front = {} if self.front is None else {"front": self.front}
        return {"name": self.recipe.name, **summary(self.mix), **asdict(self.mix), **front}


def find_mix(
    sensitivity: str | Path,
    *,
    out: str | Path | None = None,
    pareto: str | Path | None = None,
    points: int = 64,
    progress: Progress = lambda done, total, name: None,
    **asked: Unpack[Asked],
) -> FoundMix:
    """Find the mix of formats that loses least within constraints, and write it as a recipe.

    Args:
        sensitivity: The file that ``prismquant analyze`` wrote.
        out: File of the recipe; an earlier one of the same command is replaced. None: none.
        pareto: Folder of the whole front: ``front.json``, ``front.svg`` and a recipe a point; must
            not exist or be empty. Without any bound the mix at the knee of the front is taken.
        points: Sizes at which the front is computed.
        progress: Is told how many sizes are done, of how many, and the next one.
        asked: The constraints, see :class:`~prismquant.search.constraints.Asked`.

    Raises:
        ArgumentError: An argument is no such value, or nothing bounds the mix.
        StorageError, DataError: A file cannot be read, or a result cannot be written there.
        PlanError: No mix keeps to the constraints; says which least can, and what holds it there.
    """
    source = as_path(sensitivity, "sensitivity")
    constraints = parse_constraints(asked)
    count = as_count(points, "points", least=2, most=MAX_POINTS)
    folder = None if pareto is None else as_path(pareto, "pareto")
    if folder is None:
        constraints.require_bounded()
    else:
        require_empty(folder, remedy="choose another folder for --pareto, or delete it")
    target = None if out is None else as_path(out, "out")
    if target is not None:
        require_text_result(target, inputs=[source], first_words=FIRST_WORDS)
    search = _Search(read_sensitivity(source), constraints, source, file_digest(source))
    mix = allocate(search.found, constraints) if constraints.bounded else None
    content = None
    if folder is not None:
        front = pareto_front(search.found, constraints, count, progress)
        mix = mix or front.mixes[front.knee]
        content = search.write_front(folder, front)
    if mix is None:
        raise PlanError("no mix was looked for", remedy="give a bound, or --pareto")
    written = search.recipe(mix)
    if target is not None:
        write_text(target, written.text)
    return FoundMix(mix, written.recipe, written.text, content)


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

    def recipe(self, mix: Mix) -> WrittenRecipe:
        """The recipe of a mix, with where it comes from in its comment."""
        name = f"{self.found.method}-{mix.bits:.2f}-bits"
        lines = provenance(self.found, mix, self.constraints, str(self.source), self.digest)
        return recipe_of(self.found, mix, self.constraints, name, lines)

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
