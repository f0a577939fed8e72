"""Standing between a model's projections and its attention.

The attention modules of transformers look up the function that computes attention in a table, by
the name in their configuration, and give it keys after the rotary embedding and values. One more
entry of that table hands both to the module's own hook and then calls the function that the module
used before. A hooked module gets a configuration of its own with that entry's name; the masks,
which the model makes by the configuration of the whole, stay those of the function used before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from prismquant.errors import ModelError
from prismquant.formats.kv_formats import KVCacheSpec
from prismquant.formats.quantized_layer import KVScales
from prismquant.models.config import import_transformers
from prismquant.runtime.kv_cache import KVHook, KVQuantizer

# Name of the entry in the table of attention functions.
ENTRY = "prismquant_kv"
_HOOK, _CONFIG = "kv_hook", "config_before_hook"


def hook_attention(attention: nn.Module, hook: KVHook) -> None:
    """Let a hook decide which keys and values an attention module sees; in place.

    Args:
        attention: An attention module of a language model in transformers.
        hook: Takes the place of any earlier one.

    Raises:
        ModelError: The module does not choose its attention function by name.
    """
    if hooked(attention) is None:
        config: Any = getattr(attention, "config", None)
        if getattr(config, "_attn_implementation", None) is None:
            raise ModelError(
                f"{type(attention).__name__} does not choose its attention function by name",
                remedy="use a transformers version in which it does: 5.15 or newer",
            )
        _attention_functions().register(ENTRY, _attend)
        own = copy.copy(config)
        own._attn_implementation = ENTRY
        setattr(attention, _CONFIG, config)
        attention.config = own
    setattr(attention, _HOOK, hook)


def quantize_cache(model: nn.Module, attention: str, spec: KVCacheSpec, scales: KVScales) -> None:
    """Put a quantizer before the attention module called ``attention`` in ``model``, in place."""
    hook_attention(model.get_submodule(attention), KVQuantizer(spec, scales.key, scales.value))


def unhook_attention(model: nn.Module) -> None:
    """Give every attention module below ``model`` its own way back."""
    for module in model.modules():
        if hooked(module) is not None:
            module.config = getattr(module, _CONFIG)
            delattr(module, _CONFIG)
            delattr(module, _HOOK)


def hooked(attention: nn.Module) -> KVHook | None:
    """The hook of a module, or None."""
    hook = getattr(attention, _HOOK, None)
    return hook if isinstance(hook, KVHook) else None


@contextlib.contextmanager
def attention_hooked(attention: nn.Module, hook: KVHook) -> Iterator[None]:
    """Within the block, an attention module has this hook in place of its own, if it has one."""
    before = hooked(attention)
    hook_attention(attention, hook)
    try:
        yield
    finally:
        if before is None:
            unhook_attention(attention)
        else:
            hook_attention(attention, before)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The entry of the table of attention functions."""
    hook = hooked(module)
    if hook is None:
        raise ModelError(f"{type(module).__name__} has no hook before its attention")
    return _own_function(module)(module, query, *hook(key, value), *args, **kwargs)


def _own_function(module: nn.Module) -> Any:
    """Function that the module would have called: a table's entry, or its file's plain one."""
    plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    implementation = getattr(module, _CONFIG)._attn_implementation
    return _attention_functions().get_interface(implementation, plain)


@functools.cache
def _attention_functions() -> Any:
    import_transformers()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS
