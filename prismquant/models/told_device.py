"""Models that say they are on the device where they run, not on that of their first parameter.

Code of transformers asks a model for its device, to bring a tensor there. That is the device of the
first parameter, which has no memory yet where a model is run piece by piece.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["tell_device"]


def tell_device(model: nn.Module, device: torch.device) -> None:
    """Let a model, and the models in it, say that they are on a device.

    Args:
        model: It is changed.
        device: Where it runs.
    """
    for module in model.modules():
        kind = type(module)
        if isinstance(getattr(kind, "device", None), property):
            module.__class__ = _told(kind, device)


def _told(kind: type[nn.Module], device: torch.device) -> type[nn.Module]:
    """The same class by its name, whose device is known; transformers looks classes up by name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**names, "device": property(lambda _: device)})
