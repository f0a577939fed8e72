"""A model without memory for its weights, built from its configuration alone.

It has every module, every shape and the buffers that are computed. Many threads may build models at
one time: nothing that is shared, such as torch's functions and defaults, is changed meanwhile.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prismquant.errors import ModelError
from prismquant.models.config import brief, import_transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from prismquant.models.arch import ArchSpec


def empty_model(config: Any, arch: ArchSpec) -> nn.Module:
    """Build the model with parameters on the meta device and real buffers.

    Args:
        config: Native config, as :func:`~prismquant.models.config.native_config` returns it; it is
            not changed. The implementation of attention that it asks for is not obeyed, as it may
            be code that is fetched from somewhere: transformers chooses among its own.
        arch: The architecture.

    Returns:
        The model in eval mode, without gradients or cache.

    Raises:
        ModelError: The config contradicts itself.
    """
    transformers = import_transformers()
    config = copy.deepcopy(config)
    parts = [(part, part.dtype) for part in _config_parts(config)]
    try:
        for part, _ in parts:
            # A part with a dtype would change torch's default, in all threads, while it is built.
            part.dtype = None
            part._attn_implementation = None
            part._experts_implementation = None
        with _OnMeta():
            model: nn.Module = getattr(transformers, arch.hf_class)(config)
        for part, dtype in parts:
            part.dtype = dtype
        for owner, module in _with_owners(model):
            _set_dtype(module, owner.config.dtype)
            _fill_buffers(module, owner)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"transformers cannot build this {arch.title}: {brief(error)}",
            remedy="restore config.json from the original checkpoint",
        ) from error
    model.eval()
    model.requires_grad_(False)
    for module in model.modules():
        inner = getattr(module, "config", None)
        if inner is not None and hasattr(inner, "use_cache"):
            inner.use_cache = False
    return model


class _OnMeta(TorchFunctionMode):
    """Tensors that are made without a device take no memory: in this thread, and in no other.

    ``torch.device("meta")`` as a context, and accelerate's ``init_empty_weights``, change the whole
    process for a while.
    """

    _MAKERS = frozenset(
        [
            *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.tensor),
            *(torch.rand, torch.randn, torch.randint, torch.randperm),
            *(torch.arange, torch.linspace, torch.logspace),
        ]
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._MAKERS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _config_parts(config: Any) -> Iterator[Any]:
    """A config and the configs inside it."""
    yield config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _config_parts(part)


def _with_owners(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """Each module, with the nearest model of transformers that it is, or is part of."""
    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = hasattr(module, "_init_weights")
        owners[name] = module if own else owners[name.rpartition(".")[0]]
        yield owners[name], module


def _set_dtype(module: nn.Module, dtype: Any) -> None:
    """Give a module's own parameters the dtype of its part of the config."""
    known = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype if known else torch.float32)


@torch.no_grad()
def _fill_buffers(module: nn.Module, owner: Any) -> None:
    """Compute a module's own buffers, as transformers does when it has loaded a model on meta."""
    empty = [leaf for leaf, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
    for leaf in empty:
        buffer = module.get_buffer(leaf)
        module._buffers[leaf] = torch.full_like(buffer, _unset(buffer.dtype), device="cpu")
    if empty:
        owner._init_weights(module)
    for leaf in module._non_persistent_buffers_set.intersection(empty):
        buffer = module.get_buffer(leaf)
        left = buffer.isnan() if buffer.is_floating_point() else buffer == _unset(buffer.dtype)
        if buffer.dtype is not torch.bool and left.any():
            raise ModelError(
                f"{type(module).__name__} does not say how its buffer {leaf!r} is computed",
                remedy="use a transformers version in which it does",
            )


def _unset(dtype: torch.dtype) -> float:
    """A value that no computed buffer has."""
    if dtype.is_floating_point:
        return float("nan")
    return 0 if dtype is torch.bool else torch.iinfo(dtype).min
