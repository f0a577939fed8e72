"""The page about migrating is what the importers know today."""

from __future__ import annotations

from pathlib import Path

import pytest

from prismquant.recipe.importers.known_dialects import DIALECTS

migrating = pytest.importorskip("tools.migrating_page", reason="runs in the source tree only")


def test_the_page_is_fresh() -> None:
    written = migrating.PAGE.read_text(encoding="utf-8")
    assert written == migrating.page(), "run python tools/migrating_page.py"


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_setting_of_every_dialect_is_on_it(dialect: migrating.Dialect) -> None:
    section = migrating.section(dialect)
    assert dialect.tables
    for table in dialect.tables.values():
        for setting in table:
            assert f"`{setting.name}`" in section
            assert setting.difference or not setting.idle
    names = [setting.name for table in dialect.tables.values() for setting in table]
    assert all(names)


def test_a_stale_page_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")
    monkeypatch.setattr(migrating, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["x", "--check"])
    with pytest.raises(SystemExit) as left:
        migrating.main()
    assert left.value.code is True
    monkeypatch.setattr("sys.argv", ["x"])
    migrating.main()
    assert page.read_text() == migrating.page()
