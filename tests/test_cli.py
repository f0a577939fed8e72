"""The command line: what it prints, where, and with which status it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import prismquant as pq
from prismquant import api, cli
from prismquant.recipe.presets import PRESETS
from prismquant.storage import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """``run(*arguments)``: exit status, stdout and stderr of the real entry point."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prismquant", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        code = left.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return call


def one_object(text: str) -> Any:
    """The single JSON object that stdout must be: strict JSON, one line, nothing around it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert text.endswith("\n")
    assert text.count("\n") == 1
    return json.loads(text, parse_constant=refuse)


def first_column(table: str) -> set[str]:
    """Names in a table's first column, those that are folded over two lines put together."""
    names: list[str] = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and (cells[1] or cells[4]):
            names.append(cells[0])
        elif cells and names:
            names[-1] += cells[0]
    return set(names)


# Help and usage


def test_help_names_every_command(run: Cli) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in ("demo", "inspect", "quantize", "eval", "recipe"):
        assert re.search(rf"\b{command}\b", out)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["inspect"], ["--recipe", "--json"]),
        (
            ["quantize"],
            ["--recipe", "--out", "--calib", "--device", "--resume", "--json", "--solver"],
        ),
        (["eval"], ["--data", "--reference", "--out", "--limit", "--json"]),
        (["demo"], ["--out", "--json"]),
        (["recipe"], ["list", "show", "validate"]),
    ],
)
def test_every_command_has_help(run: Cli, command: list[str], options: list[str]) -> None:
    status, out, _ = run(*command, "--help")
    assert status == 0
    assert all(option in out for option in options)


def test_the_version_is_printed_alone(run: Cli) -> None:
    assert run("--version") == (0, f"{pq.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect"], "model"),
        (["inspect", "a", "--bogus"], "--bogus"),
        (["inspect", "a", "b"], "b"),
        (["quantize", "a"], "--recipe"),
        (["quantize", "a", "--recipe", "w4a16"], "--out"),
        (["quantize", "a", "--recipe", "w4a16", "--out", "o", "--samples", "0"], "--samples"),
        (["quantize", "a", "--recipe", "w4a16", "--out", "o", "--batch-size", "x"], "--batch-size"),
        (["eval", "a"], "--data"),
        (["recipe", "show"], "recipe"),
        (["bogus"], "bogus"),
        (["recipe", "bogus"], "bogus"),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2_and_says_what(run: Cli, arguments: list[str], said: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert said in err.lower()
    assert "Usage" in err
    assert "Traceback" not in err
    assert out == ""


def test_no_command_at_all_shows_the_help(run: Cli) -> None:
    status, out, err = run()
    assert status == 2
    assert "quantize" in out + err


# Failures


def test_a_failure_ends_with_1_and_says_what_where_and_the_remedy(
    run: Cli, tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    (tmp_path / "bad.yaml").write_text("rules: [{weigths: int4-g128}]")
    status, out, err = run("inspect", tiny("qwen2_vl"), "--recipe", tmp_path / "bad.yaml")
    assert status == 1
    assert out == ""
    assert err.startswith("error: the recipe is not valid:")
    assert "rules[0].weigths: unknown key; did you mean 'weights'?" in err
    assert f"where: {tmp_path / 'bad.yaml'}\n" in err
    status, out, err = run("inspect", tmp_path / "nowhere", "--json")
    assert (status, out) == (1, "")
    assert "there is no model folder" in err
    assert "remedy: give a folder with config.json" in err
    assert "Traceback" not in err


def test_brackets_in_a_message_are_printed_as_they_are(run: Cli) -> None:
    """They are no markup."""
    status, _, err = run("recipe", "show", "[bold]w4a16[/]")
    assert status == 1
    assert "'[bold]w4a16[/]'" in err


def test_brackets_in_paths_and_names_are_printed_as_they_are(
    run: Cli, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run must not end with a crash because of the name of its result, or of its recipe."""
    monkeypatch.chdir(tmp_path)
    rules = [{"match": {"modality": "llm"}, "weights": "int8-channel", "solver": "rtn"}]
    (tmp_path / "[r].yaml").write_text(json.dumps({"name": "[/x]", "rules": rules}))
    given = tiny("qwen2_vl"), "--recipe", "[r].yaml"
    status, out, _ = run("inspect", *given)
    assert (status, "recipe [/x]" in out) == (0, True)
    status, _, err = run("quantize", *given, "--out", "[/red]:x:", "--threads", 1)
    assert (status, "recipe [/x]:" in err, "written: [/red]:x:\n" in err) == (0, True, True)
    status, out, _ = run("check", "[/red]:x:")
    assert (status, out.count("[/red]:x:")) == (0, 2)
    status, _, err = run("export", "[/red]:x:", "--format", "dense", "--out", "[b]e[/]")
    assert (status, "written: [b]e[/] (dense" in err) == (0, True)
    status, _, err = run("quantize", *given, "--out", "[/red]:x:")
    assert (status, "where: [/red]:x:\n" in err) == (1, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, EOFError])
def test_an_interruption_says_how_to_go_on(
    run: Cli, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "quantize", stop)
    status, out, err = run("quantize", "a", "--recipe", "w4a16", "--out", "o")
    assert (status, out) == (1, "")
    assert "--resume" in err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts something in the background lets it ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_became_another_error_is_one(
    run: Cli, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """C code that calls Python may raise an error of its own for what a handler has raised."""

    def stop(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(api, "quantize", stop)
    before = signal.getsignal(number)
    status, out, err = run("quantize", "a", "--recipe", "w4a16", "--out", "o")
    assert (status, out) == (1, "")
    assert "--resume" in err
    assert signal.getsignal(number) is before


def test_a_defect_of_our_own_is_not_hidden(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only errors raised on purpose become messages; anything else keeps its traceback."""

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(api, "inspect", fail)
    with pytest.raises(ZeroDivisionError):
        run("inspect", "a")


# Commands


def test_inspect_prints_every_layer_and_the_totals(run: Cli, tiny: Callable[..., Path]) -> None:
    status, out, _ = run("inspect", tiny("qwen2_vl"), "--recipe", "w4a16-all")
    assert status == 0
    shown = first_column(out)
    for row in pq.inspect(tiny("qwen2_vl"), "w4a16-all").rows:
        # Blocks that are alike are one line.
        assert {row.site.name, re.sub(r"\.\d+\.", ".*.", row.site.name, count=1)} & shown
    assert "int4 g128 sym" in out
    assert "dequantized" in out
    assert "weights on disk" in out
    assert re.search(r"vision\s.*\sllm\s", out, re.DOTALL)


def test_inspect_json_is_the_plan(run: Cli, tiny: Callable[..., Path]) -> None:
    status, out, _ = run("inspect", tiny("qwen2_vl"), "--recipe", "w8a8-static", "--json")
    assert status == 0
    plan = pq.inspect(tiny("qwen2_vl"), "w8a8-static")
    assert one_object(out) == json.loads(json.dumps(plan.to_dict()))


def test_quantize_then_eval(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """The main job, with one JSON object on stdout and all else on stderr."""
    model, out = tiny("qwen2_vl"), tmp_path / "out"
    given = ["quantize", model, "--recipe", "w4a16", "--calib", calibration_file]
    options = ["--samples", 3, "--batch-size", 2, "--solver", "rtn"]
    status, printed, err = run(*given, "--out", out, *options, "--json")
    assert status == 0
    said = one_object(printed)
    assert said["out"] == str(out)
    assert said["record"] == read_json(out / "prismquant" / "record.json")
    assert said["record"]["finished"] is True
    assert "model.language_model.layers.0: 7 layers, loss" in err
    recipe = pq.load_recipe(out / "prismquant" / "recipe.yaml")
    assert recipe.name == "w4a16-rtn"
    assert (recipe.calibration.samples, recipe.calibration.batch_size) == (3, 2)
    assert {layer["solver"] for step in said["record"]["steps"] for layer in step["layers"]} == {
        "rtn"
    }

    status, _, err = run(*given, "--out", out)
    assert status == 1
    assert "not empty" in err
    status, printed, err = run(*given, "--out", out, *options, "--resume")
    assert (status, printed) == (0, "")
    assert f"written: {out}" in err.replace("\n", "")

    measured = tmp_path / "eval.json"
    given = ["eval", out, "--data", calibration_file, "--reference", model]
    status, printed, _ = run(*given, "--out", measured, "--json", "--batch-size", 3)
    assert status == 0
    assert one_object(printed) == read_json(measured)
    assert "kl" in printed

    status, printed, _ = run(*given, "--limit", 3)
    assert status == 0
    assert str(out) in printed.replace("\n", "")


def test_eval_without_a_reference(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path
) -> None:
    status, out, _ = run("eval", tiny("qwen2_vl"), "--data", calibration_file, "--json")
    assert status == 0
    one_object(out)


def test_recipes_are_listed_shown_and_checked(run: Cli, tmp_path: Path) -> None:
    status, out, _ = run("recipe", "list")
    assert (status, out.split()) == (0, list(PRESETS))
    status, out, _ = run("recipe", "list", "--json")
    assert (status, json.loads(out)) == (0, sorted(PRESETS))
    status, out, _ = run("recipe", "show", "w4a8-static-all")
    assert status == 0
    assert pq.load_recipe(yaml.safe_load(out)) == pq.load_recipe("w4a8-static-all")
    (tmp_path / "mine.yaml").write_text(out)
    status, out, _ = run("recipe", "validate", tmp_path / "mine.yaml")
    assert (status, out) == (0, "w4a8-static-all: 3 rules, valid\n")
    (tmp_path / "mine.yaml").write_text("rules: [{weights: int4-g128, options: 3}]")
    status, out, err = run("recipe", "validate", tmp_path / "mine.yaml")
    assert (status, out) == (1, "")
    assert "rules[0].options" in err


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "prismquant", "recipe", "validate", "w4a61"]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "did you mean 'w4a16'?" in done.stderr
