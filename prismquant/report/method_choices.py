"""Table of the choice among a recipe's alternatives."""

from __future__ import annotations

from rich.table import Table

from prismquant.report.tables import NOTHING, format_figure, rich_table
from prismquant.run.method_choice import WHOLE, MethodChoice


def choice_table(choice: MethodChoice) -> Table:
    """One row for each trial: its round, samples, held-out loss, divergences, and what became."""
    headers = ["alternative", "round", "samples", "held-out loss", "answers", "text", "s", ""]
    rows = []
    for trial in choice.trials:
        kl, tried = trial.kl or {}, trial.samples > 0
        last = max(one.round for one in choice.trials if one.part == trial.part)
        chosen = choice.told if trial.part == WHOLE else choice.chosen.get(trial.part)
        won = chosen == trial.name and trial.round == last
        rows.append(
            [
                trial.name if trial.part == WHOLE else f"{trial.part}: {trial.name}",
                str(trial.round + 1) if tried else "not tried",
                str(trial.samples) if tried else NOTHING,
                format_figure(trial.loss, trial.error),
                format_figure(kl.get("answer")),
                format_figure(kl.get("text")),
                f"{trial.seconds:.0f}" if tried else NOTHING,
                trial.told_failure or ("chosen" if won else ""),
            ]
        )
    title = f"{choice.recipe}: {choice.told} was chosen, {'; '.join(choice.why.values())}"
    return rich_table(headers, rows, title=title)
