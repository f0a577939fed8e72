"""Tables say what the results say, in the terminal and in Markdown alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from prismquant.evaluate.figures import Deviation, Fidelity, Outcome, summarize
from prismquant.report.tables import (
    Variant,
    as_text,
    comparison_markdown,
    comparison_table,
    detail_markdown,
    detail_table,
    format_bytes,
    format_figure,
    format_share,
    markdown_table,
    reference_variant,
    rich_table,
    variant,
)

if TYPE_CHECKING:
    from rich.table import Table


def outcome(number: int, kind: str, right: bool, compared: bool = True) -> Outcome:
    parts = {"answer": Deviation(2, 0.02 * number, 2), "text": Deviation(4, 0.1, 3)}
    if kind != "text":
        parts["vision"] = Deviation(9, 0.3, 9)
    return Outcome(
        id=str(number),
        kind=kind,
        type="count" if number % 2 else "",
        answer_tokens=2,
        nll=0.5,
        exact=right,
        generated=None,
        reference_nll=0.25 if compared else None,
        reference_exact=True if compared else None,
        reference_generated=None,
        deviations=parts if compared else {},
    )


@pytest.fixture
def result() -> Fidelity:
    return summarize(
        [outcome(0, "text", True), outcome(1, "image", False), outcome(2, "video", True)]
    )


def shown(table: Table) -> str:
    console = Console(width=200, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def cells(markdown: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in markdown.strip().split("\n")]
    return [[cell.strip() for cell in line] for line in lines]


def test_a_comparison_has_a_row_for_each_variant(result: Fidelity) -> None:
    plain = result.to_dict()
    rows = [
        reference_variant("float", plain, size=5 * 2**20),
        variant("RTN W4", plain, size=2**20),
    ]
    header, rule, first, second = cells(comparison_markdown(rows))
    assert header == [
        *("variant", "exact match", "text", "image", "video"),
        *("NLL / token", "KL / token", "top-1", "size"),
    ]
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert first[:6] == ["float", "100.0 %", "100.0 %", "100.0 %", "100.0 %", "0.125"]
    assert first[6:] == ["-", "-", "5 MiB"]
    assert second[:6] == ["RTN W4", "66.7 %", "100.0 %", "0.0 %", "100.0 %", "0.250"]
    assert second[6].startswith("0.0100 ± ")
    assert second[7:] == ["100.0 %", "1 MiB"]


def test_the_terminal_says_what_markdown_says(result: Fidelity) -> None:
    rows = [variant("GPTQ [all] W4", result.to_dict(), size=12345)]
    text = shown(comparison_table(rows, title="Variants"))
    for cell in cells(comparison_markdown(rows))[2]:
        assert cell in text
    assert "Variants" in text
    details = shown(detail_table(result.to_dict()))
    for line in cells(detail_markdown(result.to_dict()))[2:]:
        assert all(cell in details for cell in line)


def test_perplexity_is_of_running_text_and_has_two_decimals() -> None:
    """Of all tokens of all windows, not the mean of the windows' own."""

    def window(number: int, tokens: int, nll: float, other: float, running: bool = True) -> Outcome:
        kinds = (str(number), "text", "", tokens, nll)
        moved = {"answer": Deviation(tokens, 1.0, tokens)}
        return Outcome(*kinds, None, None, other, None, None, moved, running=running)

    windows = [window(1, 10, 20.0, 10.0), window(2, 30, 40.0, 30.0)]
    chat = window(3, 5, 100.0, 100.0, running=False)
    result = summarize([*windows, chat])
    assert result.overall.perplexity == pytest.approx(math.exp(60 / 40))
    assert result.overall.reference_perplexity == pytest.approx(math.e)
    plain = result.to_dict()
    assert Fidelity.from_dict(plain).overall == result.overall
    told = comparison_markdown([reference_variant("float", plain), variant("int4", plain)])
    assert [line.split("|")[2].strip() for line in told.splitlines()] == [
        *("perplexity", "---------:"),
        *("2.72", "4.48"),
    ]
    alone = cells(detail_markdown(summarize(windows).to_dict()))
    assert alone[0] == ["samples of", "number", "NLL / token", "KL, tokens", "top-1"]
    assert cells(detail_markdown(plain))[0][2:] == [
        *("exact match", "reference", "NLL / token", "KL, answers", "top-1"),
    ]
    assert summarize([window(1, 1, 1e6, 1.0)]).overall.perplexity is None
    assert summarize([chat]).overall.perplexity is None


def test_columns_that_nothing_fills_are_left_out() -> None:
    header, _, row = cells(comparison_markdown([Variant("only", exact_match=0.5)]))
    assert (header, row) == (["variant", "exact match"], ["only", "50.0 %"])


def test_details_keep_kinds_types_and_token_classes_apart(result: Fidelity) -> None:
    header, _, *rows = cells(detail_markdown(result.to_dict()))
    assert [row[0] for row in rows] == ["all", "text", "image", "video", "count"]
    assert header.count("top-1") == 3
    by_name = {row[0]: row for row in rows}
    vision = header.index("KL, vision")
    assert by_name["text"][vision] == "-"
    assert by_name["image"][vision] == "0.0333"
    assert by_name["all"][1] == "3"
    assert by_name["count"][1:3] == ["1", "0.0 %"]


def test_details_without_a_reference_speak_of_answers_only() -> None:
    alone = summarize([outcome(0, "text", True, compared=False)])
    header = cells(detail_markdown(alone.to_dict()))[0]
    assert header == ["samples of", "number", "exact match", "NLL / token"]
    row = variant("float", alone.to_dict())
    assert (row.kl, row.top1) == (None, None)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, None, "-"),
        (None, 0.1, "-"),
        (0.0, None, "0"),
        (0.012345, None, "0.0123"),
        (0.012345, 0.000444, "0.0123 ± 0.0004"),
        (0.012345, 2.1e-6, "0.0123 ± 2e-06"),
        (0.012345, 0.0, "0.0123 ± 0.0000"),
        (1.23456e-7, None, "1.23e-07"),
        (1.23456e-7, 2e-9, "1.23e-07 ± 2.00e-09"),
        (12.345, None, "12.3"),
        (0.99999, None, "1.00"),
        (1234.5, None, "1234"),
        (98765.0, None, "9.88e+04"),
    ],
)
def test_figures_have_three_digits(value: float | None, error: float | None, text: str) -> None:
    assert format_figure(value, error) == text


@given(st.floats(1e-12, 1e12))
def test_figures_are_off_by_half_of_their_last_digit_at_most(value: float) -> None:
    assert math.isclose(float(format_figure(value)), value, rel_tol=0.0051)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (2_097_152_000, "1.95 GiB"),
        (7 * 2**50, "7.17e+03 TiB"),
    ],
)
def test_sizes_are_in_binary_units(size: int | None, text: str) -> None:
    assert format_bytes(size) == text


def test_shares_are_percent() -> None:
    assert [format_share(value) for value in (None, 0.0, 0.91349)] == ["-", "0.0 %", "91.3 %"]


@given(st.lists(st.lists(st.text("ab|[]\\ ", max_size=5), min_size=2, max_size=2), max_size=4))
def test_markdown_columns_are_aligned(rows: list[list[Any]]) -> None:
    lines = markdown_table(["x", "y"], rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == len(rows) + 2


@given(
    letters=st.text(st.sampled_from("ab[]/\\:\x1b\x07\u202e\ud800\x9b"), min_size=1, max_size=12),
    tag=st.sampled_from(["", ":warning:", "[/red]", "[bold]x[/bold]"]),
)
def test_text_is_shown_as_it_is(letters: str, tag: str) -> None:
    """No markup, no emoji, and nothing that a terminal or an encoding would act on."""
    text = f"{letters}{tag}"
    plain = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)
    assert as_text(text).plain == plain
    assert shown(rich_table(["a"], [[text]], title=text)).count(plain) >= 2
