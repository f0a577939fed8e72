"""Files that hold a recipe, of this or another tool: YAML, JSON, one Python literal, or a command.

A Python file is parsed, never run: it holds one literal, or one assignment of one, beside comments
and a text at the top.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prismquant.errors import RecipeError
from prismquant.opening import parse_json, read_bounded
from prismquant.recipe.plain_yaml import MAX_BYTES, read_yaml

_SCRIPT = re.compile(r"#!.*\b(ba|z|da)?sh\b")
_LITERAL = "a single literal, or a single assignment of one"


def read_recipe_file(path: Path) -> Any:
    """The value in a recipe's file.

    Args:
        path: ``.json`` and ``.py`` are read as such; shell scripts (``.sh``, or any that begins as
            one) and command lines are their text; all else is YAML.

    Raises:
        RecipeError: The file cannot be read, is too large, or is not of its kind.
    """
    readers: dict[str, tuple[str, Callable[[str], Any]]] = {
        ".json": ("JSON", parse_json),
        ".py": ("Python", _read_literal),
        ".sh": ("text", str),
        ".bash": ("text", str),
    }
    kind, reader = readers.get(path.suffix.lower(), ("YAML", _read_yaml_or_text))
    try:
        return reader(read_bounded(path, MAX_BYTES).decode("utf-8"))
    except OSError as error:
        raise RecipeError(
            f"the recipe cannot be read: {error.strerror}", where=str(path)
        ) from error
    except ValueError as error:
        raise RecipeError(f"not valid {kind}: {error}", where=str(path)) from error


def _read_yaml_or_text(text: str) -> Any:
    """The value in YAML; a text with flags, or a shell script, as it stands."""
    if _SCRIPT.match(text):
        return text
    value = read_yaml(text)
    # YAML would join the lines of a command.
    return text if isinstance(value, str) and "--" in value else value


def _read_literal(text: str) -> Any:
    """The literal in a Python file.

    Raises:
        ValueError: There is none, or more than that.
    """
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"{error.msg}, line {error.lineno}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply") from error
    if len(body) > 1 and _value(body[0]) is not None and _is_text(_value(body[0])):
        body = body[1:]
    value = _value(body[0]) if len(body) == 1 else None
    if value is None:
        line = body[min(1, len(body) - 1)].lineno if body else 1
        raise ValueError(f"only {_LITERAL} is read, line {line}; nothing is ever run")
    _refuse_double_keys(value)
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"only {_LITERAL} is read, line {value.lineno}: it has names or calls in it, "
            "and nothing is ever run"
        ) from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("it is nested too deeply") from error


def _value(statement: ast.stmt) -> ast.expr | None:
    """The expression of a statement that is one, or that assigns one to a name."""
    if isinstance(statement, ast.Assign):
        names = [target for target in statement.targets if isinstance(target, ast.Name)]
        return statement.value if len(names) == len(statement.targets) == 1 else None
    if isinstance(statement, ast.AnnAssign):
        return statement.value
    return statement.value if isinstance(statement, ast.Expr) else None


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _refuse_double_keys(value: ast.expr) -> None:
    for node in ast.walk(value):
        if isinstance(node, ast.Dict):
            keys = [ast.dump(key) for key in node.keys if key is not None]
            if len(set(keys)) < len(keys):
                raise ValueError(f"a dictionary has a key twice, line {node.lineno}")
