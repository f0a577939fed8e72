"""Entry points of other tools, by their names and with their arguments.

Scripts that call them keep their lines; the work is done by the engine, and nothing is computed in
two ways. :mod:`prismquant.compat.mquant` has those of MQuant and of its VideoLLaMA3 fork.
"""

from __future__ import annotations

from prismquant.compat.fake_quant_modules import install_fake_quant, uninstall_fake_quant

__all__ = ["install_fake_quant", "uninstall_fake_quant"]
