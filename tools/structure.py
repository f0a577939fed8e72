"""Measures of how the package is built: sizes, imports, names, and how much code one run passes.

    python tools/structure.py                 one table
    python tools/structure.py --found         with what was counted, where that is a list
    python tools/structure.py --json          the same for programs
    python tools/structure.py --root FOLDER   of another source tree

Sizes, names and docstrings come from the syntax tree, imports from grimp (import-linter's graph);
what ``load`` imports and what a run enters is seen in fresh processes (``structure_probes.py``).
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grimp

PACKAGE = "prismquant"
ROOT = Path(__file__).resolve().parent.parent
PROBES = Path(__file__).with_name("structure_probes.py")
# Numeric kernels take many arrays: a compiled function cannot take an object.
LARGE_ALLOWED = "kernels"
# What loading a checkpoint has no need of.
NOT_FOR_LOADING = {"engine", "plan", "recipe", "data"}

MAX_FILE_LINES = 399
MAX_BODY_LINES = 59
MAX_PARAMETERS = 10
# Such a first line is a fragment: it needs the signature to be understood.
FRAGMENT = re.compile(r"(What|Which|Of|How|Where|Why|Who)\b")

Function = ast.FunctionDef | ast.AsyncFunctionDef
# Module -> the modules that it imports.
Arrows = Mapping[str, set[str]]


@dataclass(frozen=True)
class Measure:
    """A number, and what was counted where that is a list."""

    name: str
    value: int
    found: tuple[str, ...] = ()


def counted(name: str, found: Sequence[str]) -> Measure:
    """A measure whose number is the length of a list."""
    return Measure(name, len(found), tuple(sorted(found)))


@dataclass(frozen=True)
class SourceFile:
    """A file of the package: its path within it, and its contents."""

    path: str
    lines: int
    tree: ast.Module

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[Any]:
        """All nodes of the tree of these kinds."""
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def place(self, node: ast.stmt) -> str:
        """How an editor finds a node."""
        return f"{self.path}:{node.lineno}"


def source_files(root: Path) -> list[SourceFile]:
    """All Python files of the package."""
    package, files = root / PACKAGE, []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(package).as_posix()
        files.append(SourceFile(name, len(text.splitlines()), ast.parse(text)))
    return files


def body_lines(function: Function) -> int:
    """Lines of a function without its signature and docstring."""
    first = 1 if ast.get_docstring(function, clean=False) is not None else 0
    rest = function.body[first:]
    return (rest[-1].end_lineno or 0) - rest[0].lineno + 1 if rest else 0


def parameters(function: Function) -> int:
    """Number of parameters, without ``self`` and ``cls``."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    own = names[:1] in (["self"], ["cls"])
    return len(names) - own + len(given.kwonlyargs) + bool(given.vararg) + bool(given.kwarg)


def size_measures(files: list[SourceFile]) -> Iterator[Measure]:
    """Files, functions and docstrings."""
    lines = [file.lines for file in files]
    largest = max(files, key=lambda file: file.lines)
    functions = [
        (f, node) for f in files for node in f.nodes(ast.FunctionDef, ast.AsyncFunctionDef)
    ]
    yield Measure("modules", len(files))
    yield Measure("lines in all", sum(lines))
    yield Measure("lines of the median file", int(statistics.median(lines)))
    yield Measure("lines of the largest file", largest.lines, (largest.path,))
    long = [f"{file.path}: {file.lines}" for file in files if file.lines > MAX_FILE_LINES]
    yield counted(f"files over {MAX_FILE_LINES} lines", long)
    outside = [(f, node) for f, node in functions if not f.path.startswith(LARGE_ALLOWED)]
    bodies = [(file.place(node), node.name, body_lines(node)) for file, node in outside]
    long = [f"{place} {name}: {count}" for place, name, count in bodies if count > MAX_BODY_LINES]
    yield counted(f"function bodies over {MAX_BODY_LINES} lines", long)
    wide = [
        f"{file.place(node)} {node.name}: {parameters(node)}"
        for file, node in outside
        if parameters(node) > MAX_PARAMETERS
    ]
    yield counted(f"functions over {MAX_PARAMETERS} parameters", wide)
    yield counted("docstrings that begin with a fragment", list(fragments(files)))


def fragments(files: list[SourceFile]) -> Iterator[str]:
    """Docstrings whose first line does not stand alone."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files:
        for node in file.nodes(*kinds):
            text = ast.get_docstring(node)
            if text and FRAGMENT.match(text):
                line = getattr(node, "lineno", 1)
                yield f"{file.path}:{line} {text.splitlines()[0]}"


def name_measures(files: list[SourceFile]) -> Iterator[Measure]:
    """Names of classes and files."""
    classes = Counter(node.name for file in files for node in file.nodes(ast.ClassDef))
    names = Counter(Path(file.path).stem for file in files)
    del names["__init__"]
    yield Measure("classes", classes.total())
    yield counted("class names used twice", [name for name, uses in classes.items() if uses > 1])
    yield counted("file names used twice", [name for name, uses in names.items() if uses > 1])


def circles(arrows: Arrows) -> list[str]:
    """Groups of nodes each of which reaches all others of its group."""
    reached = {node: _reached(arrows, node) for node in arrows}
    found = {
        frozenset(other for other in reached[node] if node in reached[other])
        for node in arrows
        if node in reached[node]
    }
    return [" ".join(sorted(circle)) for circle in found]


def _reached(arrows: Arrows, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = arrows[waiting.pop()] - seen
        seen |= fresh
        waiting += fresh
    return seen


def folder_circles(arrows: Arrows, folder: str = PACKAGE) -> list[str]:
    """Circles among the members of each folder, where folders among them count as one node each.

    Circles among files alone are left to :func:`circles`.
    """
    depth = folder.count(".") + 2
    inside = {module for module in arrows if module.startswith(f"{folder}.")}
    member = {module: ".".join(module.split(".")[:depth]) for module in inside}
    folders = {member[module] for module in inside if module != member[module]}
    merged: dict[str, set[str]] = {name: set() for name in member.values()}
    for module in inside:
        targets = {member[imported] for imported in arrows[module] & inside}
        merged[member[module]] |= targets - {member[module]}
    here = [circle for circle in circles(merged) if folders & set(circle.split())]
    return here + [circle for name in folders for circle in folder_circles(arrows, name)]


def layer_ranks(root: Path) -> dict[str, int]:
    """Part of the package -> its height in the contract of layers; the package itself is on top."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    ranks = {PACKAGE: len(layers) + 1}
    for height, line in enumerate(reversed(layers)):
        ranks |= {f"{PACKAGE}.{name.strip(' ()')}": height for name in re.split("[|:]", line)}
    return ranks


def upward_imports(arrows: Arrows, ranks: dict[str, int]) -> Iterator[str]:
    """Imports that go up, or sideways between parts of one layer."""
    for importer, targets in arrows.items():
        for imported in targets:
            low, high = (".".join(name.split(".")[:2]) for name in (importer, imported))
            if low != high and ranks[low] <= ranks[high]:
                yield f"{importer} -> {imported}"


def import_measures(root: Path) -> Iterator[Measure]:
    """Circles and upward arrows; imports for type checkers count as others do."""
    sys.path.insert(0, str(root))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    arrows = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    yield counted("imports against the layers", list(upward_imports(arrows, layer_ranks(root))))
    # Imports of the package itself were counted just now; they would close one great circle.
    arrows = {name: targets - {PACKAGE} for name, targets in arrows.items()}
    yield counted("import circles of modules", circles(arrows))
    yield counted("import circles of folders", folder_circles(arrows))


def in_fresh_process(root: Path, probe: str, folder: Path) -> dict[str, list[str]]:
    """What a probe of ``structure_probes.py`` finds in the package of a source tree."""
    tests = [path.parent for path in (root / "tests").rglob("tiny_vlm.py")]
    settings = {"PYTHONPATH": os.pathsep.join(map(str, [root, *tests])), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROBES), probe, str(folder)]
    done = subprocess.run(
        command, env=os.environ | settings, cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the probe {probe!r} failed:\n{done.stderr}")
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def load_measures(root: Path, checkpoint: Path) -> Iterator[Measure]:
    """What ``load`` of a quantized checkpoint imports."""
    modules = in_fresh_process(root, "load", checkpoint)["modules"]
    needless = [name for name in modules if set(name.split(".")[1:2]) & NOT_FOR_LOADING]
    yield counted("modules imported by load", modules)
    yield counted("of these, modules that load has no need of", needless)


def path_measures(root: Path, scratch: Path) -> Iterator[Measure]:
    """Code that a run passes; leaves its checkpoint in ``scratch/out``."""
    for path, functions in in_fresh_process(root, "quantize", scratch).items():
        yield counted(f"functions entered by one {path}", functions)
        files = {function.split(":")[0] for function in functions}
        yield counted(f"files entered by one {path}", list(files))


def all_measures(root: Path) -> list[Measure]:
    """Every measure of a source tree."""
    files = source_files(root)
    measures = [*size_measures(files), *name_measures(files), *import_measures(root)]
    with tempfile.TemporaryDirectory() as scratch:
        measures += path_measures(root, Path(scratch))
        measures += load_measures(root, Path(scratch) / "out")
    return measures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="measures of how the package is built")
    parser.add_argument("--root", type=Path, default=ROOT, help="a source tree")
    parser.add_argument("--found", action="store_true", help="list what was counted")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    measures = all_measures(options.root.resolve())
    if options.json:
        print(
            json.dumps({m.name: {"value": m.value, "found": m.found} for m in measures}, indent=1)
        )
        return
    for measure in measures:
        print(f"{measure.name:44} {measure.value:6}")
        if options.found:
            print(*(f"    {line}" for line in measure.found), sep="\n")


if __name__ == "__main__":
    main()
