"""Table of the choice among a recipe's alternatives."""

from __future__ import annotations

from rich.table import Table

from prismquant.report.tables import format_figure, rich_table
from prismquant.run.method_choice import MethodChoice


def choice_table(choice: MethodChoice) -> Table:
    """One row for each trial: its round, samples, held-out loss, divergences, and what became."""
    headers = ["alternative", "round", "samples", "held-out loss", "answers", "text", "s", ""]
    last = max(trial.round for trial in choice.trials)
    rows = []
    for trial in choice.trials:
        kl = trial.kl or {}
        won = trial.name == choice.chosen and trial.round == last
        rows.append(
            [
                trial.name,
                str(trial.round + 1),
                str(trial.samples),
                format_figure(trial.loss, trial.error),
                format_figure(kl.get("answer")),
                format_figure(kl.get("text")),
                f"{trial.seconds:.0f}",
                trial.failure or ("chosen" if won else ""),
            ]
        )
    title = f"{choice.recipe}: {choice.chosen} was chosen, {choice.why}"
    return rich_table(headers, rows, title=title)
