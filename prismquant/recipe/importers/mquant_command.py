"""The command of MQuant within a text: a line of arguments, a whole command, or a shell script."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from prismquant.recipe.importers.ledger import Ledger
from prismquant.recipe.importers.mquant_flags import FLAGS, VALUES

_STARTS = re.compile(
    r"(?:(?:export\s+)?[A-Za-z_]\w*=\S*\s+|(?:nohup|time|exec|env|srun)\s+)*"
    r"(?:--|(?:\S*/)?python[\d.]*\s|torchrun\s|accelerate\s|deepspeed\s|\S+\.py\s)"
)
_FLAG = re.compile(r"(?<!\S)--([A-Za-z0-9_]+)")
# Redirections, what ends a command, and words with their quotes.
_PIECE = re.compile(
    r"(?P<redirected>\d?(?:&>>?|>>?&?|<)\s*[^\s|&;<>]+)"
    r"|(?P<end>\|\|?|&&?|;)"
    r"|(?P<word>(?:\"(?:\\.|[^\"\\])*\"|'[^']*'|\\.|[^\s\"'|&;<>\\])+)"
)
_SHELL = "only the command with the flags is read"


@dataclass(frozen=True)
class _Line:
    """A line of a script, continued ones joined.

    Attributes:
        number: Of its first line, from 1.
        text: Without the space around it.
    """

    number: int
    text: str

    @property
    def is_command(self) -> bool:
        """Whether it calls the tool with a flag that is known."""
        return bool(_STARTS.match(self.text)) and bool({*_FLAG.findall(self.text)} & FLAGS.keys())


def holds_command(text: str) -> bool:
    """Whether a text, or a line of it, is a command with flags of the tool."""
    return any(line.is_command for line in _lines(text))


def flags_in(text: str, ledger: Ledger) -> dict[str, Any]:
    """Flags of the one command in a text, each with its value.

    What stands around the command is noted as dropped: other lines, but for comments; the launcher
    with its own flags; redirections, and what follows in a pipe.

    Args:
        text: That :func:`holds_command`.
        ledger: Where it is noted what is wrong or dropped.
    """
    lines = _lines(text)
    commands = [line for line in lines if line.is_command]
    if len(commands) != 1:
        which = ", ".join(str(line.number) for line in commands)
        ledger.wrong("", f"it holds {len(commands)} commands (lines {which}): give one of them")
        return {}
    for line in lines:
        if line is not commands[0]:
            ledger.dropped(f"line {line.number}", line.text, _SHELL)
    try:
        shlex.split(commands[0].text)
    except ValueError as error:
        ledger.wrong("", f"the quotes do not match: {error}")
        return {}
    return _flags(_words(commands[0].text, ledger), ledger)


def _lines(text: str) -> list[_Line]:
    """Lines of a text that say anything; a backslash at its end continues one."""
    found: list[_Line] = []
    held, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        first = first if held else number
        if line.endswith("\\"):
            held += f"{line[:-1]} "
            continue
        found.append(_Line(first, (held + line).strip()))
        held = ""
    found.append(_Line(first, held.strip()))
    return [line for line in found if line.text and not line.text.startswith("#")]


def _words(command: str, ledger: Ledger) -> list[str]:
    """Words of a command after its script, without what the shell alone reads."""
    words: list[str] = []
    for piece in _PIECE.finditer(command):
        if piece.lastgroup == "end":
            ledger.dropped("", command[piece.start() :], _SHELL)
            break
        if piece.lastgroup == "redirected":
            ledger.dropped("", piece.group(), _SHELL)
        elif piece.group().startswith("#"):
            break
        else:
            words += shlex.split(piece.group())
    script = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
    launched = [] if script is None else words[:script]
    if any(word.startswith("--") and word[2:].partition("=")[0] in FLAGS for word in launched):
        launched = []
    if any(word.startswith("-") for word in launched):
        why = "how a script is launched is no part of a recipe"
        ledger.dropped("", shlex.join(launched), why)
    words = words[len(launched) :]
    while words and not words[0].startswith("--"):
        words.pop(0)
    return words


def _flags(words: list[str], ledger: Ledger) -> dict[str, Any]:
    """Flags with their values."""
    found: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            ledger.wrong("", f"{word!r} belongs to no flag")
        elif name in found:
            ledger.wrong(name, "it is given twice")
        elif equals and name in FLAGS and name not in (*VALUES, "skip_names"):
            ledger.wrong(name, "it takes no value")
        elif equals:
            found[name] = _typed(name, value)
        elif name == "skip_names":
            found[name] = []
            while words and not words[0].startswith("--"):
                found[name].append(words.pop(0))
            if not found[name]:
                ledger.wrong(name, "it needs parts of names")
        elif VALUES.get(name) and words and not words[0].startswith("--"):
            found[name] = _typed(name, words.pop(0))
        else:
            found[name] = True
    return found


def _typed(name: str, value: str) -> Any:
    """A value as the flag's type has it; text that is none stays text, and is refused later."""
    for kind in (int, float):
        if VALUES.get(name) in (kind, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value
