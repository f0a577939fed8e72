"""The name of MQuant's package: only where it is asked for, and never in the real one's place."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import pytest

from prismquant import compat
from prismquant.compat import mquant
from prismquant.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TWO = ("fake_quant.gptq.qwen2vl_gptq_plus", "fake_quant.gptq.videollama3_gptq_plus")


@pytest.fixture(autouse=True)
def _uninstalled() -> Iterator[None]:
    compat.uninstall_fake_quant()
    yield
    compat.uninstall_fake_quant()


def test_scripts_import_the_functions_by_their_paths() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fake_quant")
    compat.install_fake_quant()
    compat.install_fake_quant()
    qwen, llama = (importlib.import_module(name) for name in TWO)
    assert qwen.qwen2vl_rtn_gptq_fwrd_plus is mquant.qwen2vl_rtn_gptq_fwrd_plus
    assert llama.videollama3_llm_rtn is mquant.videollama3_llm_rtn
    gptq = importlib.import_module("fake_quant").gptq
    assert gptq.videollama3_rtn_gptq_fwrd_plus is mquant.videollama3_rtn_gptq_fwrd_plus
    compat.uninstall_fake_quant()
    assert not [name for name in sys.modules if name.startswith("fake_quant")]


def test_other_parts_of_the_package_say_where_they_are() -> None:
    compat.install_fake_quant()
    scope: dict[str, object] = {}
    with pytest.raises(ImportError, match=r"has no quant_utils, only gptq; .* docs/compat.md"):
        exec("from fake_quant import quant_utils", scope)
    with pytest.raises(ImportError, match="has no internvl_rtn_gptq_fwrd_plus"):
        exec("from fake_quant.gptq import internvl_rtn_gptq_fwrd_plus", scope)
    assert not hasattr(sys.modules["fake_quant"], "__file__")


def test_the_real_package_is_never_shadowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_quant").mkdir()
    (tmp_path / "fake_quant" / "__init__.py").write_text("REAL = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ArgumentError, match="is not shadowed"):
        compat.install_fake_quant()
    assert importlib.import_module("fake_quant").REAL
    with pytest.raises(ArgumentError, match="is not shadowed") as found:
        compat.install_fake_quant()
    assert str(tmp_path) in str(found.value.where)
    compat.uninstall_fake_quant()
    assert sys.modules.pop("fake_quant").REAL
