"""YAML as recipes use it: mappings, lists, text, numbers, true and false.

What else YAML has is refused where it stands: aliases, which can make a small file as large as they
like; tags, which ask for objects; keys twice in one mapping, of which one would win unseen. Dates
and merge keys (``<<``) are text like any other. Size, depth and number of values have bounds, so
that no file takes more than a moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

# A rule for every layer of the largest models has a tenth of these.
MAX_BYTES = 1 << 20
_MAX_VALUES = 50_000
_MAX_DEPTH = 20
_MAX_INTEGER = 2**63 - 1
_PREFIX = "tag:yaml.org,2002:"
# Whatever a word looks like, it is text or one of these.
_KINDS = ("null", "bool", "int", "float")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# The grammar of YAML 1.1 takes a number such as 1e-3 for text.
_EXPONENT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+")


def read_yaml(text: str) -> Any:
    """The value of a plain YAML text.

    Raises:
        ValueError: It is not plain YAML; the message says why, and in which line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{error.problem}{line}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def write_yaml(value: Any) -> str:
    """The value as YAML that :func:`read_yaml` takes, its keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def yaml_comment(lines: Iterable[str]) -> str:
    """Lines as a comment above a YAML text; what could end one early is a blank in it."""
    written = (f"# {_CONTROL.sub(' ', line)}" for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in written)


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refused("aliases (& and *) are not read: write the value out", event)
        if getattr(event, "tag", None) is not None:
            raise _refused("tags (!) are not read: write plain values", event)
        self._values += 1
        self._depth += 1
        if self._values > _MAX_VALUES:
            raise _refused(f"there are more than {_MAX_VALUES} values", event)
        if self._depth > _MAX_DEPTH:
            raise _refused(f"it is nested more than {_MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for place, _ in node.value:
            if not isinstance(place, yaml.ScalarNode):
                raise _refused("a key is a word", place)
            key = self.construct_object(place)
            if key in keys:
                raise _refused(f"key {key!r} is there twice", place)
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A number that 64 bits can hold."""
        integer = node.tag == f"{_PREFIX}int"
        try:
            value = self.construct_yaml_int(node) if integer else self.construct_yaml_float(node)
        except ValueError as error:
            raise _refused("it is no number", node) from error
        if integer and abs(value) > _MAX_INTEGER:
            raise _refused("it is too large a number", node)
        return value


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refused(problem: str, part: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=part.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, words) for tag, words in known if tag.removeprefix(_PREFIX) in _KINDS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(f"{_PREFIX}float", _EXPONENT, list("-+0123456789"))
for _number in ("int", "float"):
    _Loader.add_constructor(f"{_PREFIX}{_number}", _Loader.construct_number)
