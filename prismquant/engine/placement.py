"""Placement of a walk: device, precision, and where hidden states wait."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from prismquant.runtime.mixed import Precision

Store = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Placement:
    """Device and precision of a walk, and the place where hidden states wait between units.

    Attributes:
        device: Where units run.
        precision: In which dtypes they run; statistics are float32 in any case.
        states: Where hidden states wait: on the device, in the host's memory, or in files.
        paused: Passes halt at each stage and go on; else they start from the beginning.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = field(default_factory=Precision)
    states: Store = "device"
    paused: bool = True

    @property
    def on_host(self) -> bool:
        """Whether the device's memory is that of the host."""
        return self.device.type == "cpu"

    def describe(self) -> str:
        """E.g. ``passes halted, hidden states in memory``."""
        passes = "halted" if self.paused else "repeated"
        device = "in memory" if self.on_host else "on the device"
        where = {"device": device, "host": "in the host's memory", "disk": "on disk"}[self.states]
        return f"passes {passes}, hidden states {where}"


def placements(device: torch.device, precision: Precision) -> tuple[Placement, ...]:
    """The placements that a device offers, fastest first; the last one takes least memory.

    Hidden states leave a device of its own before passes are repeated: a copy costs less than a
    forward pass. On a CPU there is no other memory to go to but the disk.
    """
    ladder: tuple[tuple[Store, bool], ...]
    if device.type == "cpu":
        ladder = (("device", True), ("device", False), ("disk", False))
    else:
        ladder = (("device", True), ("host", True), ("host", False), ("disk", False))
    return tuple(Placement(device, precision, states, paused) for states, paused in ladder)
