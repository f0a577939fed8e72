"""A dataset as VLMEvalKit has it, of the samples of a calibration file."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class PromptDataset:
    """Rows of a JSONL file, and prompts of their questions.

    Args:
        path: The file, with paths that start at its folder.
    """

    def __init__(self, path: Path) -> None:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.folder = path.parent
        self.data = SimpleNamespace(iloc=rows)

    def build_prompt(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Items with type and value."""
        content = row["messages"][0]["content"]
        if isinstance(content, str):
            return [{"type": "text", "value": content}]
        return [{"type": item["type"], "value": self._value(item)} for item in content]

    def _value(self, item: dict[str, Any]) -> Any:
        shown = item[item["type"]]
        if item["type"] == "text":
            return shown
        if isinstance(shown, list):
            return [str(self.folder / name) for name in shown]
        return str(self.folder / shown)


def questions_only(path: Path, out: Path) -> Path:
    """Write the questions of a calibration file, without their answers, with paths of files."""
    dataset = PromptDataset(path)
    rows = []
    for row in dataset.data.iloc:
        items = [
            {"type": item["type"], item["type"]: item["value"]}
            for item in dataset.build_prompt(row)
        ]
        rows.append({"id": row["id"], "messages": [{"role": "user", "content": items}]})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out
