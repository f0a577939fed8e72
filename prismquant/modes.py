"""Torch as it is by default, whatever the caller has switched on around a call.

Gradients, inference mode, autocast and the default device belong to a thread, so they are set for
the length of a call and nobody else notices. The default dtype belongs to the whole process: other
threads would notice, so another one than float32 is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from prismquant.errors import PrismQuantError

_AUTOCAST = ("cpu", "cuda")


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
    """Within the block, or the function that it decorates, this thread has torch's default modes.

    Raises:
        PrismQuantError: The default dtype is not float32.
    """
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        raise PrismQuantError(
            f"torch's default dtype is {dtype}, in which models would be built and sums formed",
            remedy="call torch.set_default_dtype(torch.float32) before; the argument `dtype` says "
            "in what a model computes",
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Entered only where it changes something: it slows every call of torch.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
