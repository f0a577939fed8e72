"""Imports of ModelOpt's recipe files: ``imports`` names parts, ``$import`` puts one in its place.

    imports: {base: configs/ptq/units/base_disable_all, fp8: configs/numerics/fp8}
    quant_cfg:
      - $import: base
      - {quantizer_name: "*weight_quantizer", cfg: {$import: fp8}}

As there, a part is one that the tool brings along, or a YAML file, here by its path from the
recipe's folder or from one above it. A list in the place of an entry is spliced, a mapping is an
entry; within a mapping the keys beside ``$import`` count more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismquant.errors import nearest, suggest
from prismquant.opening import read_bounded
from prismquant.recipe.importers.ledger import Ledger, in_quotes, joined, quoted
from prismquant.recipe.importers.modelopt_units import UNITS
from prismquant.recipe.plain_yaml import MAX_BYTES, read_yaml

IMPORT = "$import"


class ImportedEntries(list[Any]):
    """Entries that stand in the place of one, so that those after it keep their places."""


_IMPORTS = "imports"
_ENDINGS = (".yaml", ".yml")
# Files that import files, and parts within parts.
_DEEPEST = 8
_MOST_PARTS = 100
_MOST_VALUES = 50_000


def with_imports(ledger: Ledger, content: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """A content with every import in its place.

    Args:
        ledger: Where imports are noted, and what is wrong with them.
        content: Of a recipe's file.
        source: Name of the file, beside which others may lie.
    """
    file = Path(source)
    folders = tuple(file.resolve().parents[:_DEEPEST]) if file.is_file() else ()
    found = _Importer(ledger, folders).resolved(content, "", 0)
    return found if isinstance(found, Mapping) else {}


@dataclass
class _Importer:
    """Resolution of one recipe's imports.

    Attributes:
        ledger: As of :func:`with_imports`.
        folders: From which paths of files lead, the recipe's own first; none for a mere content.
        left: Values that may still be put in, so that parts within parts have a bound.
    """

    ledger: Ledger
    folders: tuple[Path, ...]
    left: int = _MOST_VALUES

    def resolved(self, content: Any, place: str, depth: int) -> Any:
        """A content with its own imports, which are taken out of it, put in their places."""
        parts: Mapping[str, Any] = {}
        if isinstance(content, Mapping) and _IMPORTS in content:
            parts = self._parts(content[_IMPORTS], joined(place, _IMPORTS), depth)
            content = {key: one for key, one in content.items() if key != _IMPORTS}
        return self._put(content, parts, place)

    def _parts(self, named: Any, place: str, depth: int) -> dict[str, Any]:
        listed = self.ledger.mapping(place, {} if named is None else named)
        if depth >= _DEEPEST or len(listed) > _MOST_PARTS:
            self.ledger.wrong(place, "too many parts, or parts of parts")
            return {}
        found: dict[str, Any] = {}
        for name, path in listed.items():
            where = joined(place, name)
            if not isinstance(path, str) or not path:
                self.ledger.wrong(where, f"a path, not {quoted(path)}")
                found[name] = None
                continue
            found[name] = self._part(path, where, depth)
            self.ledger.honoured(where, path, "its entries, where $import names it")
        return found

    def _part(self, path: str, place: str, depth: int) -> Any:
        """The part at a path, its own imports put in; None where there is none."""
        name = path
        for ending in _ENDINGS:
            name = name.removesuffix(ending)
        if name in UNITS:
            return UNITS[name]
        file = self._file(path)
        if file is None:
            what = f"ModelOpt has no part {in_quotes(path)}, and no such YAML file lies here"
            self.ledger.wrong(place, "; ".join(filter(None, (what, nearest(name, list(UNITS))))))
            return None
        try:
            head, body = _read_part(file)
        except (OSError, ValueError) as error:
            self.ledger.wrong(place, f"{path} cannot be read: {error}")
            return None
        if isinstance(body, list):
            imports = self.ledger.mapping(path, head).get(_IMPORTS)
            parts = self._parts(imports, joined(path, _IMPORTS), depth + 1)
            return self._put(body, parts, path)
        return self.resolved(head | body if isinstance(body, Mapping) else body, path, depth + 1)

    def _file(self, path: str) -> Path | None:
        """A YAML file at a path that leads from the recipe's folder, or from one above it, down."""
        relative = Path(path)
        if relative.is_absolute() or ".." in relative.parts or "\0" in path:
            return None
        names = [path] if path.endswith(_ENDINGS) else [f"{path}{ending}" for ending in _ENDINGS]
        files = (folder / name for folder in self.folders for name in names)
        return next((file for file in files if file.is_file()), None)

    def _put(self, value: Any, parts: Mapping[str, Any], place: str) -> Any:
        self.left -= 1
        if self.left < 0:
            if self.left == -1:
                self.ledger.wrong(place, f"imports come to more than {_MOST_VALUES} values")
            return None
        if isinstance(value, list | tuple):
            found = self._put_list(value, parts, place)
            return ImportedEntries(found) if isinstance(value, ImportedEntries) else found
        if not isinstance(value, Mapping):
            return value
        if IMPORT in value:
            return self._put_mapping(value, parts, place)
        return {key: self._put(one, parts, joined(place, str(key))) for key, one in value.items()}

    def _put_list(self, value: Any, parts: Mapping[str, Any], place: str) -> list[Any]:
        found: list[Any] = []
        for number, one in enumerate(value):
            where = f"{place}[{number}]"
            if isinstance(one, Mapping) and one.keys() == {IMPORT}:
                found += _spliced(self._put(self._named(one[IMPORT], parts, where), {}, where))
            else:
                found.append(self._put(one, parts, where))
        return found

    def _put_mapping(
        self, value: Mapping[str, Any], parts: Mapping[str, Any], place: str
    ) -> dict[str, Any]:
        names = value[IMPORT]
        merged: dict[str, Any] = {}
        for name in names if isinstance(names, list | tuple) else [names]:
            part = self._named(name, parts, place)
            if part is None:
                continue
            if isinstance(part, Mapping):
                merged |= part
            else:
                what = f"{in_quotes(name)} is a list, and here stands a mapping"
                self.ledger.wrong(joined(place, IMPORT), what)
        merged |= {key: one for key, one in value.items() if key != IMPORT}
        if IMPORT in merged:
            self.ledger.wrong(joined(place, IMPORT), "a part that is imported imports nothing here")
            del merged[IMPORT]
        return {key: self._put(one, parts, joined(place, str(key))) for key, one in merged.items()}

    def _named(self, name: Any, parts: Mapping[str, Any], place: str) -> Any:
        """The part that was imported under a name; None where there is none, which is noted."""
        if isinstance(name, str) and name in parts:
            return parts[name]
        what = f"nothing is imported as {in_quotes(name)}; {suggest(str(name), parts)}"
        if not parts:
            what = f"nothing is imported as {in_quotes(name)}: `imports` at the top names parts"
        self.ledger.wrong(joined(place, IMPORT), what)
        return None


def _spliced(part: Any) -> list[Any]:
    """Elements in the place of one: entries together, words one by one."""
    if isinstance(part, list) and all(isinstance(one, Mapping | ImportedEntries) for one in part):
        return [ImportedEntries(part)]
    return part if isinstance(part, list) else [] if part is None else [part]


def _read_part(file: Path) -> tuple[Any, Any]:
    """The document before the content of a part's file, which may name imports, and the content.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no YAML, or has more documents than that.
    """
    text = read_bounded(file, MAX_BYTES).decode("utf-8")
    head, body = [{}, *(read_yaml(one) for one in _documents(text))][-2:]
    if not isinstance(head, Mapping):
        raise ValueError("the document before its content is no mapping")
    return head, body


def _documents(text: str) -> list[str]:
    """Texts of the documents of a YAML file: one or two."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.rstrip() == "---":
            found.append([])
        else:
            found[-1].append(line)
    full = [one for one in found if any(line.split("#")[0].strip() for line in one)]
    if not 1 <= len(full) <= 2:
        raise ValueError("one document, or two of which the first has the imports")
    return ["\n".join(one) for one in full]
