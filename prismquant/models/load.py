"""Models without memory for their weights, and weights into them: a piece at a time or all at once.

A model starts empty, built from its configuration alone: it has every module, every shape and the
buffers that are computed, and parameters without memory. Many threads may build models at one time:
nothing that is shared, such as torch's functions and defaults, is changed meanwhile.

:func:`materialize` fills one module from the shards and reads only that module's tensors;
:func:`release` gives the memory back. Every layout, also the remote-code one, runs in the native
transformers class. Nothing here reads a pickle.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prismquant.errors import ModelError, brief
from prismquant.models.config import import_transformers
from prismquant.shards import ShardReader

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from prismquant.models.arch import ArchSpec
    from prismquant.models.names import NameMap


# ------------------------------------------------------------------------------------- empty models


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
    kind = _model_class(arch)
    config = copy.deepcopy(config)
    parts = [(part, part.dtype) for part in _config_parts(config)]
    try:
        for part, _ in parts:
            # A part with a dtype would change torch's default, in all threads, while it is built.
            part.dtype = None
            part._attn_implementation = None
            # Fused products of all experts pass by every layer of one.
            part._experts_implementation = "eager"
        with _OnMeta():
            model: nn.Module = kind(config)
            if arch.experts:
                from prismquant.models.experts import split_experts  # of few models

                split_experts(model, arch.experts)
        if arch.forgotten_outputs:
            from prismquant.models.forgotten_outputs import supply_outputs  # of few models

            supply_outputs(model, arch)
        for part, dtype in parts:
            part.dtype = dtype
        for owner, own_dtype, module in _with_owners(model):
            _set_dtype(module, own_dtype)
            if module._buffers:
                _fill_buffers(module, owner)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"transformers cannot build this {arch.title}: {brief(error)}",
            remedy="restore config.json from the original checkpoint; or, if the architecture file "
            f"is your own, correct hf_class in {arch.name}.toml",
        ) from error
    model.eval()
    model.requires_grad_(False)
    for module in model.modules():
        # Of tens of thousands of modules, few have one; asking the others for it takes a while.
        inner = vars(module).get("config")
        if inner is not None and hasattr(inner, "use_cache"):
            inner.use_cache = False
    return model


def _model_class(arch: ArchSpec) -> Any:
    """The class of transformers that runs a family: an architecture file may be a stranger's."""
    transformers = import_transformers()
    kind = getattr(transformers, arch.hf_class, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise ModelError(
            f"hf_class is {arch.hf_class!r}, which is no model of transformers "
            f"{transformers.__version__}",
            where=f"{arch.name}.toml",
            remedy="correct it, or install a release of transformers that has the model",
        )
    return kind


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


def _with_owners(model: nn.Module) -> Iterator[tuple[Any, torch.dtype, nn.Module]]:
    """Each module, with the nearest model of transformers that it is, or is part of.

    Between them is the dtype of that model's part of the config.
    """
    owners: dict[str, tuple[Any, torch.dtype]] = {}
    for name, module in model.named_modules():
        if hasattr(type(module), "_init_weights"):
            said = cast("Any", module).config.dtype
            known = isinstance(said, torch.dtype) and said.is_floating_point
            owners[name] = (module, said if known else torch.float32)
        else:
            owners[name] = owners[name.rpartition(".")[0]]
        yield *owners[name], module


def _set_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module's own parameters the dtype of its part of the config."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


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
        counts = not (buffer.is_floating_point() or buffer.is_complex())
        left = buffer == _unset(buffer.dtype) if counts else buffer.isnan()
        if buffer.dtype is not torch.bool and left.any():
            raise ModelError(
                f"{type(module).__name__} does not say how its buffer {leaf!r} is computed",
                remedy="use a transformers version in which it does",
            )


def _unset(dtype: torch.dtype) -> float:
    """A value that no computed buffer has."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype is torch.bool else torch.iinfo(dtype).min


# ------------------------------------------------------------------------------------------ weights


def materialize(
    model: nn.Module,
    prefix: str,
    reader: ShardReader,
    names: NameMap,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    *,
    own: bool = False,
) -> None:
    """Fill all parameters and buffers below a module path.

    Tied weights share memory when both ends are filled. Buffers that are not stored, such as rotary
    frequencies, are moved to the device and keep their dtype.

    Args:
        model: From :func:`empty_model`.
        prefix: Module path; empty for the whole model.
        reader: The checkpoint.
        names: Its names.
        device: Where the tensors go.
        dtype: Floating dtype of the parameters; None keeps the dtype on disk.
        own: Fill only what the module itself holds, not what lies in modules below it.

    Raises:
        ModelError: The path does not exist, or a tensor has another shape than its parameter.
        StorageError: A tensor is missing or unreadable.
    """
    # With its index, so that tied ends on one device are recognized as such.
    device = torch.empty(0, device=device).device
    for path, module in _below(model, prefix)[: 1 if own else None]:
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{leaf}" if path else leaf
            shared = _tied_tensor(model, full, reader, names, device, dtype)
            value = shared if shared is not None else _read(full, reader, names, device, dtype)
            if value.shape != parameter.shape:
                raise ModelError(
                    f"{full}: shape {tuple(value.shape)} on disk, not {tuple(parameter.shape)}",
                    where=str(reader.folder),
                )
            module._parameters[leaf] = (
                value
                if isinstance(value, nn.Parameter)
                else nn.Parameter(value, requires_grad=False)
            )
        for leaf, buffer in module._buffers.items():
            if buffer is None:
                continue
            full = f"{path}.{leaf}" if path else leaf
            if leaf in module._non_persistent_buffers_set:
                module._buffers[leaf] = buffer.to(device)
            else:
                module._buffers[leaf] = _read(full, reader, names, device, dtype)


def release(model: nn.Module, prefix: str, *, own: bool = False) -> None:
    """Turn the parameters below a module path back into shapes without memory.

    Args:
        model: From :func:`empty_model`.
        prefix: Module path; empty for the whole model.
        own: Only what the module itself holds.

    Raises:
        ModelError: The path does not exist.
    """
    for _, module in _below(model, prefix)[: 1 if own else None]:
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _below(model: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    try:
        top = model.get_submodule(prefix)
    except AttributeError as error:
        raise ModelError(f"the model has no module {prefix!r}") from error
    return [
        (f"{prefix}.{path}" if prefix and path else prefix or path, module)
        for path, module in top.named_modules()
    ]


def _read(
    name: str,
    reader: ShardReader,
    names: NameMap,
    device: torch.device,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    tensor = reader.read(names.to_disk(name))
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.to(device)


def _tied_tensor(
    model: nn.Module,
    name: str,
    reader: ShardReader,
    names: NameMap,
    device: torch.device,
    dtype: torch.dtype | None,
) -> torch.Tensor | None:
    """The tensor of the other end of a tie, or None when the name is not tied or must be read."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return None
    pairs: dict[str, str] = getattr(model, "_tied_weights_keys", None) or {}
    partner = pairs.get(name) or next((t for t, s in pairs.items() if s == name), None)
    if partner is None:
        return None
    stored = name if names.to_disk(name) in reader.names else partner
    if stored == name and names.to_disk(partner) in reader.names:
        return None  # both are stored: two weights, whatever the config says
    owner, _, leaf = partner.rpartition(".")
    other = model.get_submodule(owner)._parameters[leaf]
    wanted = dtype or reader.info(names.to_disk(stored)).dtype
    if other is not None and other.device == device and other.dtype == wanted:
        return other
    return _read(stored, reader, names, device, dtype)
