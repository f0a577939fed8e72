"""A drafted architecture file, tried as `arch check` tries it, so that a wrong one is an error."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from prismquant.arguments import as_path
from prismquant.errors import ModelError
from prismquant.families.check_family import check_family
from prismquant.storage import write_text

__all__ = ["require_sound_draft"]

_SHOWN = 3


def require_sound_draft(model: Path | str, text: str) -> None:
    """Try each claim of a draft on a small random model of the same configuration.

    Args:
        model: Folder with config.json and the files of the processor, of which the draft is.
        text: The draft, as `draft_family` returns it.

    Raises:
        ModelError: Claims of the draft are wrong, or it does not fit the model at all.
        DataError: The processor cannot be loaded.
    """
    folder = as_path(model, "model")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "draft.toml"
        write_text(file, text)
        try:
            claims = check_family(folder, file).claims
        except ModelError as error:
            raise _unsound([error.what], folder, error.findings) from error
    wrong = [f"{claim.what}: {claim.said}" for claim in claims if claim.holds is False]
    if wrong:
        raise _unsound(wrong, folder)


def _unsound(wrong: list[str], folder: Path, findings: Iterable[str] = ()) -> ModelError:
    """The error that tells what a person must mend in a draft."""
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return ModelError(
        f"the draft does not hold: {'; '.join(wrong[:_SHOWN])}{more}",
        where=str(folder),
        remedy="mend the draft by hand (docs/families.md), then: prismquant arch check MODEL "
        "--arch FILE; nothing should be quantized by it before",
        findings=findings,
    )
