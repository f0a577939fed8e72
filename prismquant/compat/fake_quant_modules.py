"""MQuant's package name, for scripts that import its entry points by their paths.

    from prismquant.compat import install_fake_quant

    install_fake_quant()
    from fake_quant.gptq.qwen2vl_gptq_plus import qwen2vl_rtn_gptq_fwrd_plus

Nothing is registered unless this is called, and never in the place of the real package.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from prismquant.compat.mquant.families import QWEN2_VL, VIDEOLLAMA3
from prismquant.errors import ArgumentError

_PACKAGE = "fake_quant"
_FILES = {"qwen2vl_gptq_plus": QWEN2_VL.entry, "videollama3_gptq_plus": VIDEOLLAMA3.entry}


class _StandIn(ModuleType):
    """A package that has the entry points of a few files, and says where the others are."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = sorted(key for key in vars(self) if not key.startswith("_"))
        raise ImportError(
            f"{self.__name__} of prismquant.compat has no {name}, only {', '.join(known)}; "
            "rotation, activations and their calibration are part of .._rtn_gptq_fwrd_plus here: "
            "see docs/compat.md"
        )


def install_fake_quant() -> None:
    """Register ``fake_quant.gptq`` with ``qwen2vl_gptq_plus`` and ``videollama3_gptq_plus``.

    A second call does nothing.

    Raises:
        ArgumentError: MQuant itself can be imported: its modules are never shadowed.
    """
    there = sys.modules.get(_PACKAGE)
    if isinstance(there, _StandIn):
        return
    if there is not None or importlib.util.find_spec(_PACKAGE) is not None:
        raise ArgumentError(
            "a package fake_quant can be imported already, and is not shadowed",
            where=_origin(there),
            remedy="import from prismquant.compat.mquant, or take MQuant out of sys.path",
        )
    package, gptq = _StandIn(_PACKAGE), _StandIn(f"{_PACKAGE}.gptq")
    for module in (package, gptq):
        module.__path__ = []
        sys.modules[module.__name__] = module
    package.gptq = gptq  # type: ignore[attr-defined]
    for name, entry in _FILES.items():
        own = importlib.import_module(f"prismquant.compat.mquant.{name}")
        sys.modules[f"{gptq.__name__}.{name}"] = own
        setattr(gptq, name, own)
        # Drivers call it by the folder above.
        setattr(gptq, entry, getattr(own, entry))


def uninstall_fake_quant() -> None:
    """Take the modules out again that :func:`install_fake_quant` has registered, if it has."""
    if not isinstance(sys.modules.get(_PACKAGE), _StandIn):
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]


def _origin(module: ModuleType | None) -> str:
    found = None if module is not None else importlib.util.find_spec(_PACKAGE)
    return str(getattr(module, "__file__", None) or (found and found.origin) or _PACKAGE)
