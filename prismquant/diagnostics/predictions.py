"""Losses that an analysis predicted of the layers of a run, as its record keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prismquant.arguments import EXACT


@dataclass(frozen=True)
class UnitPrediction:
    """Prediction of a unit of choice: layers that share a format.

    Attributes:
        unit: Its name.
        format: Name of the format that the recipe gives it.
        losses: Loss of the model, by class of token, that the format adds in this unit.
        layers: Loss of each of its layers as the solver gave it in the analysis: what ``loss`` of
            the layer's own record is in the run.
    """

    __pydantic_config__ = EXACT

    unit: str
    format: str
    losses: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictions:
    """Predictions of a run whose recipe a search has found.

    Attributes:
        file: The sensitivity.
        sha256: Its checksum.
        method: Method of the analysis.
        in_nats: Whether losses of the model are KL divergences in nats per token of the class;
            else only their order counts.
        units: Units that the run quantizes.
        model: Folder or name of the model that was analyzed.
        same_files: Whether the files of that model hold the same as those of the run's; None: it is
            not known.
        same_samples: Whether the run has the samples of the analysis; None: it is not known, or
            the run needs no samples.
    """

    __pydantic_config__ = EXACT

    file: str
    sha256: str
    method: str
    in_nats: bool
    units: tuple[UnitPrediction, ...] = ()
    model: str = ""
    same_files: bool | None = None
    same_samples: bool | None = None
