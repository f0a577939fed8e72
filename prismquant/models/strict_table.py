"""A TOML table that is read strictly: every key is asked for once, with its type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prismquant.errors import ModelError, suggest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class StrictTable:
    """A TOML table that knows where it is and which of its keys were read."""

    def __init__(self, data: Mapping[str, Any], file: str, path: str) -> None:
        self._data = data
        self._file = file
        self._path = path
        self._read: set[str] = set()

    def called(self, what: str) -> StrictTable:
        """The same table, whose errors also say what it is made of."""
        table = StrictTable(self._data, f"{self._file} ({what})", self._path)
        table._read = self._read
        return table

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str):
            raise self._mistyped(key, "a string", value)
        return value

    def maybe_text(self, key: str) -> str | None:
        self._read.add(key)
        return self.text(key) if key in self._data else None

    def number(self, key: str, default: int | None = None) -> int:
        if key not in self._data and default is not None:
            self._read.add(key)
            return default
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._mistyped(key, "a whole number", value)
        return value

    def flag(self, key: str) -> bool:
        """A key that is true, or absent."""
        if key not in self._data:
            self._read.add(key)
            return False
        value = self._take(key)
        if value is not True:
            raise self._mistyped(key, "true, or left out", value)
        return True

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        if key not in self._data and default is not None:
            self._read.add(key)
            return default
        value = self._take(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._mistyped(key, "a list of strings", value)
        return tuple(value)

    def groups(self, key: str) -> tuple[tuple[str, ...], ...]:
        value = self._take(key)
        ok = isinstance(value, list) and all(
            isinstance(group, list) and all(isinstance(item, str) for item in group)
            for group in value
        )
        if not ok:
            raise self._mistyped(key, "a list of lists of strings", value)
        return tuple(tuple(group) for group in value)

    def pairs(self, key: str) -> tuple[tuple[str, str], ...]:
        """A list of lists of two strings."""
        groups = self.groups(key)
        for group in groups:
            if len(group) != 2:
                raise self._mistyped(key, "a list of pairs of strings", list(group))
        return tuple((first, second) for first, second in groups)

    def lists(self, key: str) -> dict[str, tuple[str, ...]]:
        """A table whose values are strings, or lists of them."""
        table = self.table(key)
        if table is None:
            return {}
        result = {
            name: (value,) if isinstance(value, str) else table.texts(name)
            for name, value in table._data.items()
        }
        table._read.update(result)
        return result

    def strings(self, key: str) -> dict[str, str]:
        table = self.table(key)
        if table is None:
            return {}
        result = {name: table.text(name) for name in table._data}
        table.finish()
        return result

    def table(self, key: str) -> StrictTable | None:
        self._read.add(key)
        if key not in self._data:
            return None
        value = self._take(key)
        if not isinstance(value, dict):
            raise self._mistyped(key, "a table", value)
        return StrictTable(value, self._file, f"{self._path}{key}.")

    def tables(self, key: str) -> Iterator[StrictTable]:
        value = self._data.get(key, [])
        self._read.add(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._mistyped(key, "a list of tables", value)
        return (
            StrictTable(item, self._file, f"{self._path}{key}[{index}].")
            for index, item in enumerate(value)
        )

    def children(self) -> Iterator[tuple[str, StrictTable]]:
        """All members, each of which must be a table."""
        for key in self._data:
            table = self.table(key)
            if table is not None:
                yield key, table

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self._data:
            if key not in self._read:
                raise ModelError(
                    f"unknown key {self._path + key!r}",
                    where=self._file,
                    remedy=suggest(key, self._read),
                )

    def wrong(self, message: str) -> ModelError:
        return ModelError(f"{self._path.rstrip('.') or 'file'}: {message}", where=self._file)

    def _take(self, key: str) -> Any:
        self._read.add(key)
        if key not in self._data:
            raise ModelError(
                f"key {self._path + key!r} is missing",
                where=self._file,
                remedy=f"add it; present here: {', '.join(sorted(self._data)) or 'nothing'}",
            )
        return self._data[key]

    def _mistyped(self, key: str, expected: str, value: Any) -> ModelError:
        return ModelError(
            f"key {self._path + key!r} must be {expected}, not {value!r}", where=self._file
        )
