"""The command line: what it prints, where, and with which status it ends."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import prismquant as pq
from prismquant import api
from prismquant.opening import read_json
from prismquant.recipe.presets import NAMED
from prismquant.storage import write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Cli = Callable[..., tuple[int, str, str]]


ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}


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
    for command in ("demo", "inspect", "quantize", "search", "eval", "recipe"):
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
        (["search"], ["--bits", "--size", "--max-loss", "--for", "--pareto", "--out", "--json"]),
        (["recipe"], ["list", "show", "validate", "convert"]),
        (["recipe", "convert"], ["--from", "--to", "--model", "--out", "--strict", "--json"]),
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
        (["quantize", "a"], "--out"),
        (["quantize", "a", "--recipe", "w4a16"], "--out"),
        (["quantize", "a", "--recipe", "w4a16", "--out", "o", "--samples", "0"], "--samples"),
        (["quantize", "a", "--recipe", "w4a16", "--out", "o", "--batch-size", "x"], "--batch-size"),
        (["eval", "a"], "--data"),
        (["recipe", "show"], "recipe"),
        (["bogus"], "bogus"),
        (["recipe", "bogus"], "bogus"),
        (["quantize", "a", "--recipe", "w4a16", "--out", "o", "--threads", "1e30"], "--threads"),
        (["quantize", "a", "--recipe", "w4a16", "--out", "o", "--threads", "9" * 30], "--threads"),
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


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("quantize", "--memory-budget", "9..9"),
        ("quantize", "--memory-budget", "9" * 400),
        ("quantize", "--memory-budget", "0"),
        ("quantize", "--dtype", "nonsense"),
        ("quantize", "--solver", "gtpq"),
        ("quantize", "--on-failure", "go on"),
        ("quantize", "--batch-size", "9" * 30),
        ("quantize", "--samples", "9" * 30),
        ("quantize", "--tensor-parallel", "9" * 30),
        ("quantize", "--out", ""),
        ("quantize", "--out", "x" * 300),
        ("quantize", "--calib", ""),
        ("eval", "--limit", "9" * 30),
        ("eval", "--batch-size", "9" * 30),
        ("eval", "--reference", ""),
        ("eval", "--out", ""),
        ("export", "--out", ""),
        ("export", "--format", "gtpq"),
        ("export", "--dtype", "int8"),
        ("check", "--for", "vlm"),
        ("search", "--bits", "four"),
        ("search", "--bits", "4.6GB"),
        ("search", "--size", "large"),
        ("search", "--max-loss", "nan"),
        ("search", "--cap", "visoin=8"),
        ("search", "--cap", "vision=0"),
        ("search", "--floor", "llm=much"),
        ("search", "--weight", "answr=1"),
        ("search", "--weight", "answer=x"),
        ("search", "--cache-bytes", "0"),
        ("search", "--latency", "t.json"),
        ("search", "--latency-ms", "3"),
        ("search", "--tensor-parallel", "9" * 30),
        ("search", "--for", "vlm"),
        ("search", "--out", ""),
        ("search", "--pareto", ""),
        ("search", "--verify", ""),
    ],
)
def test_a_value_that_cannot_be_ends_with_2_before_any_work(
    run: Cli,
    command: str,
    option: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    needed: dict[str, dict[str, str]] = {
        "quantize": {"--recipe": "w4a16", "--out": "o"},
        "eval": {"--data": "d"},
        "export": {"--format": "dense", "--out": "o"},
        "check": {},
        "search": {"--max-loss": "1"},
    }
    options = needed[command] | {option: value}
    words = [word for pair in options.items() for word in pair]
    status, out, err = run(command, "nowhere", *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert option in err
    assert "nowhere" not in err
    assert len(err) < 400
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_nothing(run: Cli) -> None:
    for command in (["inspect"], ["check"], ["eval", "--data", "d"]):
        status, out, err = run(*command, "")
        assert (status, out) == (2, "")
        assert "'' is not the name of a file or folder" in err


def test_a_result_that_cannot_be_written_is_found_before_the_work(
    run: Cli, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    given = ["eval", tiny("qwen2_vl"), "--data", tmp_path / "nowhere.jsonl", "--out"]
    status, _, err = run(*given, tmp_path / "no" / "result.json")
    assert (status, "nowhere" in err) == (1, False)
    assert "the folder for the result is not there" in err
    status, _, err = run(*given, tmp_path)
    assert (status, "nowhere" in err) == (1, False)
    assert "the result is a file, but this is a folder" in err


def test_an_evaluation_replaces_no_file_of_others(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """The model, the reference, the data and what is not an earlier result stay as they are."""
    model, data = tiny("qwen2_vl"), tmp_path / "data.jsonl"
    data.write_text('{"text": "kept"}\n')
    other = tmp_path / "reference"
    shutil.copytree(model, other)
    for place in (model / "config.json", other / "model.safetensors", data, tmp_path / "notes"):
        if not place.exists():
            place.write_text("mine")
        before = place.read_bytes()
        status, out, err = run(
            *("eval", model, "--data", data, "--reference", other, "--out", place)
        )
        assert (status, out, place.read_bytes()) == (1, "", before)
        assert "remedy: choose another --out" in err
    (tmp_path / "again.json").write_text(json.dumps({"overall": {}}))
    given = ("eval", model, "--data", calibration_file, "--limit", 1, "--out")
    assert run(*given, tmp_path / "again.json")[0] == 1
    for _ in range(2):
        assert run(*given, tmp_path / "result.json")[0] == 0


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
    run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "quantize", stop)
    for given in (("--out", tmp_path), (f"--out={tmp_path}",)):
        record = tmp_path / "prismquant" / "record.json"
        record.unlink(missing_ok=True)
        status, out, err = run("quantize", "a", "--recipe", "w4a16", *given)
        assert (status, out, err.strip()) == (1, "", "stopped; nothing was written")
        for steps, words in (([], "no step was finished"), ([{}], "`--resume` goes on after")):
            write_json(record, {"steps": steps})
            status, out, err = run("quantize", "a", "--recipe", "w4a16", *given)
            assert (status, out, words in err) == (1, "", True)
    record.unlink()
    write_json(record.with_name("choice") / "trials.json", {"trials": [{}, {}]})
    status, out, err = run("quantize", "a", "--recipe", "auto-w4a8", "--out", tmp_path)
    kept = "stopped; trials that are finished (2) are kept, `--resume` goes on after them"
    assert (status, out, err.strip()) == (1, "", kept)
    # Of the commands that can't go on, none says that it could.
    monkeypatch.setattr(api, "export", stop)
    status, out, err = run("export", "a", "--format", "dense", "--out", "o")
    assert (status, out, err.strip()) == (1, "", "stopped")


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
    assert (status, out, err.strip()) == (1, "", "stopped; nothing was written")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ZeroDivisionError("by nought"), ["error: ZeroDivisionError: by nought", "--debug"]),
        (RuntimeError("size mismatch\nof two"), ["RuntimeError: size mismatch\nof two", "report"]),
        (RecursionError("too deep"), ["RecursionError: too deep"]),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ["UnicodeDecodeError: 'utf-8' codec"]),
        (KeyError("x"), ["KeyError: 'x'"]),
        (RuntimeError("x" * 10_000), ["RuntimeError: xxx", ".."]),
        (type("PanicException", (BaseException,), {})("rust"), ["PanicException: rust"]),
        (MemoryError(), ["error: memory ran out", "ulimit"]),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 7340032"
                " bytes. Error code 12"
            ),
            ["error: memory ran out: 7.0 MiB more were asked for"],
        ),
        (OSError(28, "No space left on device", "/a/b"), ["the disk is full", "where: /a/b"]),
        (PermissionError(13, "Permission denied", "/a"), ["permission is denied", "where: /a"]),
        (OSError(36, "File name too long", "y" * 300), ["the name is too long", "yyy"]),
        (FileNotFoundError(2, "No such file", "/a"), ["no such file or folder", "where: /a"]),
        (OSError(24, "Too many open files", "/a"), ["too many files are open", "ulimit -n"]),
        (OSError(5, "Input/output error", "/a"), ["Input/output error", "where: /a", "--debug"]),
        (OSError("can't load the tokenizer"), ["OSError: can't load the tokenizer"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_is_left_becomes_one_screen(
    run: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, words: list[str]
) -> None:
    """What, where and a remedy, and the trace only for who asks for it."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(api, "inspect", fail)
    monkeypatch.delenv("PRISMQUANT_DEBUG", raising=False)
    status, out, err = run("inspect", "a", "--json")
    assert (status, out) == (1, "")
    for word in words:
        assert word in err, err
    assert "remedy: " in err
    assert "Traceback" not in err
    assert len(err) < 2500
    for arguments in (["--debug", "inspect", "a"], ["inspect", "a", "--debug"]):
        status, out, err = run(*arguments)
        assert (status, out) == (1, "")
        assert "Traceback (most recent call last)" in err
        assert "error: " in err
    monkeypatch.setenv("PRISMQUANT_DEBUG", "1")
    assert "Traceback" in run("inspect", "a")[2]


def test_an_error_names_the_place_in_this_package(
    run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "bind", lambda *_, **__: 1 / 0)
    _, _, err = run("inspect", "a")
    assert re.search(r"where: prismquant/api\.py, line \d+, in inspect\n", err)


def test_the_trace_of_an_error_on_purpose_is_shown_too(run: Cli, tmp_path: Path) -> None:
    status, _, err = run("inspect", tmp_path / "nowhere", "--debug")
    assert status == 1
    assert "Traceback" in err
    assert "remedy: give a folder with config.json" in err.splitlines()[-1]


def test_findings_that_fit_no_screen_are_shown_on_demand(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text(
        yaml.safe_dump({"rules": [{"weigths": 3} for _ in range(50)]})
    )
    status, out, err = run("recipe", "validate", tmp_path / "many.yaml")
    assert (status, out) == (1, "")
    assert "rules[49]" not in err
    assert err.splitlines()[-1] == "  all that was found: run again with --debug"
    status, out, err = run("recipe", "validate", tmp_path / "many.yaml", "--debug")
    assert (status, out) == (1, "")
    assert all(f"rules[{number}]" in err for number in range(50))
    (tmp_path / "few.yaml").write_text(
        yaml.safe_dump({"rules": [{"weigths": 3} for _ in range(2)]})
    )
    assert "all that was found" not in run("recipe", "validate", tmp_path / "few.yaml")[2]


def test_a_word_behind_two_hyphens_is_no_flag(run: Cli) -> None:
    status, _, err = run("recipe", "show", "--", "--debug")
    assert status == 1
    assert "no preset and no file is called '--debug'" in err


def test_nobody_reads_standard_input(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question that a library asks gets no answer, even if one is there."""
    monkeypatch.setattr(api, "inspect", lambda *_, **__: input("run this code? "))
    with monkeypatch.context() as patch:
        stdin = io.StringIO("y\n")
        patch.setattr(sys, "stdin", stdin)
        status, out, err = run("inspect", "a")
        assert sys.stdin is stdin
    assert status == 1
    assert "lost sys.stdin" in err
    assert "run this code" not in out
    assert stdin.read() == "y\n"


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-"])
@pytest.mark.parametrize("arguments", ["recipe list", "recipe show w4a16", "--version"])
def test_a_standard_output_that_takes_nothing_is_an_error(redirect: str, arguments: str) -> None:
    command = f"{sys.executable} -m prismquant {arguments} {redirect}"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output ")
    assert done.stderr.count("\n") == 2


def test_closed_streams_are_never_taken_for_files(tmp_path: Path) -> None:
    """Without them the first file to be opened would be what everything is printed to."""
    (tmp_path / "recipe.yaml").write_text("rules: [{weights: int8-channel}]")
    code = "import os, prismquant.cli.output as o; o.prepare_streams(); print(os.open('/', 0) > 2)"
    command = f'{sys.executable} -c "{code}" <&- 2>&-'
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.stdout == "True\n"


def test_names_that_are_no_text_are_shown(run: Cli, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    status, _, err = run("inspect", tmp_path / name)
    assert status == 1
    assert "caf\\udce9" in err


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
    assert "needs no calibration data" in said["notes"][0]
    assert said["record"] == read_json(out / "prismquant" / "record.json")
    assert said["record"]["finished"] is True
    assert "model.language_model.layers.0: 7 layers, loss" in err
    recipe = pq.load_recipe(out / "prismquant" / "recipe.yaml")
    assert recipe.name == "w4a16-rtn"
    assert (recipe.calibration.samples, recipe.calibration.batch_size) == (3, 2)
    layers = [layer for step in said["record"]["steps"] for layer in step["layers"]]
    assert {layer["diagnostics"]["method"] for layer in layers} == {"rtn"}

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


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_what_the_check_finds_in_the_result_is_an_error(
    run: Cli,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_json: list[str],
) -> None:
    """The files are there, and so is the report; the status tells that they are not to be used."""
    import prismquant.check as checks

    model, real = tiny("qwen2_vl"), checks.check
    (tmp_path / "r.yaml").write_text(
        "rules: [{match: {role: mlp}, weights: int8-channel, solver: rtn}]"
    )

    def finds(folder: Any, target: Any = None) -> checks.Report:
        report = real(folder, target)
        found = checks.Finding(checks.Severity.ERROR, "x", "it is wrong", ("lm_head",), "mend it")
        return dataclasses.replace(report, findings=(*report.findings, found))

    monkeypatch.setattr(checks, "check", finds)
    first = ["quantize", model, "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "a"]
    then = ["export", tmp_path / "a", "--format", "dense", "--out", tmp_path / "b"]
    for command in (first, then):
        status, out, err = run(*command, *as_json)
        assert status == 1
        assert "error: the files were written, but the check of them found errors" in err
        assert f"where: {command[-1]}" in err
        if as_json:
            assert one_object(out)["check"]["findings"][-1]["what"] == "it is wrong"
        else:
            assert "error: it is wrong: lm_head; mend it" in err
    assert (tmp_path / "a" / "config.json").is_file()
    assert (tmp_path / "b" / "config.json").is_file()


def test_a_reference_with_other_tokens_is_refused(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Distributions over other words can't be compared, however alike their shapes are."""
    model = tiny("qwen2_vl")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(words))
    given = ["eval", model, "--data", calibration_file, "--reference", other]
    status, out, err = run(*given)
    assert (status, out) == (1, "")
    assert "the reference's tokenizer differs in 2 tokens" in err
    config = read_json(model / "config.json")
    text = config.get("text_config", config)
    text["vocab_size"] += 8
    write_json(other / "config.json", config)
    status, out, err = run(*given)
    assert (status, out) == (1, "")
    assert re.search(r"the model has \d+ tokens, the reference \d+", err)
    # Without a tokenizer there is nothing more to compare.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    shutil.copy(model / "config.json", other / "config.json")
    assert run(*given, "--limit", 1)[0] == 0


def test_running_text_has_no_answers_to_win_or_lose(
    tiny: Callable[..., Path], tmp_path: Path, run: Cli
) -> None:
    (tmp_path / "a.txt").write_text("what is it ? the colour of it is red \f " * 9)
    folder = tiny("llama")
    given = ("--data", tmp_path / "a.txt", "--seq-length", 8, "--limit", 2)
    status, out, err = run("eval", folder, "--reference", folder, *given)
    assert status == 0, err
    assert "perplexity" in out
    assert "KL, tokens" in out
    assert "answers" not in out
    assert "exact match" not in out
    assert "note: running text: 2 of " in out
    assert "form feeds that do not stand alone on their line are text" in out


def test_eval_without_a_reference(
    run: Cli, tiny: Callable[..., Path], calibration_file: Path
) -> None:
    status, out, _ = run("eval", tiny("qwen2_vl"), "--data", calibration_file, "--json")
    assert status == 0
    one_object(out)


def test_a_demonstration_that_fails_can_be_repeated(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had written is gone, and nothing else."""
    from prismquant.demo import main_job as demo

    def fail(model: Any, recipe: Any, out: Path, *_: Any) -> None:
        (out / "x").mkdir(parents=True)
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(demo, "quantize", fail)
    monkeypatch.setattr(demo, "CALIBRATION_SAMPLES", 3)
    monkeypatch.setattr(demo, "EVALUATION_SAMPLES", 3)
    for _ in range(2):
        status, _, err = run("demo", "--out", tmp_path / "out")
        assert status == 1
        assert "error: the disk is full" in err
        assert not list((tmp_path / "out").iterdir())


def test_recipes_are_listed_shown_and_checked(run: Cli, tmp_path: Path) -> None:
    status, out, _ = run("recipe", "list")
    assert (status, out.split()) == (0, list(NAMED))
    status, out, _ = run("recipe", "list", "--json")
    assert (status, json.loads(out)) == (0, sorted(NAMED))
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


def test_samples_are_limited_by_flags(run: Cli, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """What is cut is told in a run and in an evaluation; what is too small a limit is a usage."""
    folder = tiny("qwen2_vl")
    user = {"role": "user", "content": "what is it ? " * 20}
    line = {"id": "long", "messages": [user, {"role": "assistant", "content": "red"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    limits = ("--max-length", 40, "--max-pixels", 3000, "--max-frames", 4)
    given = ("--calib", tmp_path / "data.jsonl", "--out", tmp_path / "out", "--threads", 1)
    code, _, err = run("quantize", folder, "--recipe", "w4a16", *given, *limits)
    assert code == 0, err
    assert "1 sample (long) is cut to the greatest length" in err
    evaluated = ("eval", folder, "--data", tmp_path / "data.jsonl", "--reference", folder)
    code, out, err = run(*evaluated, *limits)
    assert code == 0, err
    assert "1 sample (long) is cut to the greatest length" in out
    for flag in ("--max-length", "--max-pixels", "--max-frames"):
        assert run(*evaluated, flag, 0)[0] == 2
