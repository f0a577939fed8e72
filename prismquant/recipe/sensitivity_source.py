"""The file of a sensitivity that a recipe was found by."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from prismquant.recipe.match import Strict


class SensitivitySource(Strict):
    """Name and checksum of a file, by which it is known wherever it lies.

    Attributes:
        file: Its path when the recipe was written.
        sha256: Its checksum, in hexadecimal.
    """

    file: Annotated[str, Field(min_length=1, max_length=4096)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
