"""What the documents name exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="runs in the source tree only")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_source_files_are_where_they_are_said_to_be(page: Path) -> None:
    """Paths of Python files, from the root or within the package; changes speak of the past."""
    if page.stem == "CHANGELOG":
        pytest.skip("names files of their time")
    named = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.py)", page.read_text(encoding="utf-8"))
    places = (ROOT, ROOT / "prismquant", ROOT / "prismquant" / "algorithms")
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_every_stop_of_the_walks_is_a_name_in_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = page[page.index("## Three walks") : page.index("## The walk")]
    stops = re.findall(r"`([a-z_]+(?:/[a-z_]+)*)\.([A-Za-z_.]+)`", walks)
    assert len(stops) > 25
    for path, names in stops:
        found = importlib.import_module(f"prismquant.{path.replace('/', '.')}")
        for name in names.split("."):
            found = getattr(found, name)
    for walk in walks.split("\n**")[1:]:
        assert 1 <= len(re.findall(r"^\d+\. ", walk, flags=re.M)) <= 10
