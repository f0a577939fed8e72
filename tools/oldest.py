"""The oldest versions that pyproject.toml allows, as a constraints file on stdout.

torch and torchvision are left out: they come first, in the build that ``make`` was told of.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

_PROJECT = Path(__file__).parent.parent / "pyproject.toml"
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)>=(?P<oldest>[\w.]+)")
_FIRST = ("torch", "torchvision", "triton")


def lower_bounds() -> dict[str, str]:
    """Package -> the version that its lower bound names, over all extras."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [_REQUIREMENT.match(line) for line in itertools.chain.from_iterable(groups)]
    bounds = {(match["name"], match["oldest"]) for match in found if match is not None}
    names = [name for name, _ in bounds]
    if len(set(names)) < len(names):
        raise SystemExit(f"a package has two lower bounds: {sorted(bounds)}")
    return {name: oldest for name, oldest in sorted(bounds) if name not in _FIRST}


if __name__ == "__main__":
    print(*(f"{name}=={oldest}" for name, oldest in lower_bounds().items()), sep="\n")
