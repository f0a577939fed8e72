"""Hostile files against one entry point, in a process whose every step outside is watched.

    python tests/fuzzing.py TARGET --examples 200 --seed 0

Whatever a target reads is mutated: whole values, keys, types, bytes. Its calls may work or raise a
``PrismQuantError``. Anything else ends the process with status 1 and the smallest example that
shows it: another exception, more than five seconds of CPU time, a gigabyte of memory, a file
written or deleted outside the scratch folder, a process started, a socket opened.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiny_vlm
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from sensitivities import made

import prismquant as pq
from prismquant.api import export
from prismquant.check import check
from prismquant.data import read_samples
from prismquant.errors import PrismQuantError
from prismquant.memory import peak_memory_bytes, resident_bytes
from prismquant.models.processor import load_processor
from prismquant.recipe.presets import PRESETS
from prismquant.recipe.schema import load_recipe
from prismquant.shards import ShardReader

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
# A call that waits for something, such as a pipe, takes no CPU time.
WALL_SECONDS = 60

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Violation(BaseException):
    """What no handler of exceptions may swallow."""


# ---------------------------------------------------------------------------------- what is watched

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# With the place of the folder that a path starts at among the arguments, where there may be one.
_CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir"), 1),
    **dict.fromkeys(("os.rename", "os.mkdir", "os.link", "os.symlink", "os.chmod"), 2),
    "os.chown": 3,
    **dict.fromkeys(("os.truncate", "shutil.rmtree", "shutil.move"), None),
}
_FORBIDDEN = {
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile"),
    *("socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class"),
}


class Guard:
    """Notes each step outside ``folder`` while it is armed.

    Args:
        folder: All that may be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.armed = False
        self.seen: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {args!r:.200}")
        writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITES
        if writes or event in _CHANGES:
            place = _CHANGES.get(event)
            self._inside(event, args[0], -1 if place is None else args[place])

    def _inside(self, event: str, path: Any, start: int) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            folder = "" if start < 0 else os.readlink(f"/proc/self/fd/{start}")
            real = os.path.realpath(os.path.join(folder, os.fsdecode(path)))
            if real != os.devnull and not real.startswith(self.folder + os.sep):
                self.seen.append(f"{event} {real}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within, only :class:`PrismQuantError` may be raised, which is the right answer."""
        before = _reset_peak_memory()
        self.armed, self.seen = True, []
        # Of the process, whatever else the machine is busy with.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        # For what waits in code that hears no signal.
        faulthandler.dump_traceback_later(2 * WALL_SECONDS, exit=True)
        try:
            with contextlib.suppress(PrismQuantError):
                yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            self.armed = False
        if self.seen:
            raise Violation("; ".join(self.seen))
        grown = peak_memory_bytes() - before
        if grown > MEMORY_BYTES:
            raise Violation(f"{grown / 2**20:.0f} MiB of memory")


def _reset_peak_memory() -> int:
    """Let the peak of memory begin again, where the system can; the bytes that are resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return resident_bytes()
    return peak_memory_bytes()


# ---------------------------------------------------------------------------------------- mutations

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 127, 1000, 100_000, 2**31, 2**63, 10**30),
    *(0.5, -0.5, 1e308, float("inf"), float("nan"), 5e-324),
    *("", "x", "0", "nan", "none", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "[/red]"),
    *("re:", "re:(", "re:.*", "re:(a|aa)+$", "re:([a-z_.0-9]+)+!", "*", "[", "A" * 300),
    "http://127.0.0.1:9/x",
    *([], [[]], [0], ["x"], [None], {}, {"x": 1}, {"": {}}, [1, "a", None], [-1, 0], [2**62, 2]),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if not isinstance(value, dict | list):
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _places(part, (*path, key))


def _mutate_once(draw: Draw, value: Any) -> Any:
    places = list(_places(value))
    path = draw(st.sampled_from(places[1:] or places))
    if not path:
        return copy.deepcopy(draw(st.sampled_from(_VALUES)))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    last = path[-1]
    how = draw(st.sampled_from(("replace", "replace", "delete", "rename", "wrap", "copy", "nudge")))
    if how == "delete":
        del parent[last]
    elif how == "rename" and isinstance(parent, dict):
        name = draw(st.sampled_from((f"{last}s", str(last)[:-1], "x", "", "type", "name")))
        parent[name] = parent.pop(last)
    elif how == "wrap":
        part = parent[last]
        parent[last] = draw(st.sampled_from(([part], {"x": part}, str(part))))
    elif how == "copy":
        other = value
        for key in draw(st.sampled_from(places)):
            other = other[key]
        parent[last] = json.loads(json.dumps(other))
    elif how == "nudge" and type(parent[last]) in (int, float):
        parent[last] *= draw(st.sampled_from((-1, 2, 3, 0, 1000)))
        parent[last] += draw(st.integers(-1, 1))
    else:
        parent[last] = copy.deepcopy(draw(st.sampled_from(_VALUES)))
    return value


def mutated(draw: Draw, value: Any) -> Any:
    """A copy of a JSON value in which one to three things are otherwise."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        value = _mutate_once(draw, value)
    return value


def mutated_bytes(draw: Draw, data: bytes) -> bytes:
    """A copy of some bytes with a few of them overwritten, cut off, or put in."""
    how = draw(st.sampled_from(("flip", "flip", "cut", "put")))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    junk = draw(st.binary(min_size=1, max_size=8))
    if how == "cut":
        return data[:at]
    return data[:at] + junk + data[at + (len(junk) if how == "flip" else 0) :]


def written_json(draw: Draw, path: Path, value: Any) -> None:
    """Write a mutated value; now and then its text is broken as well."""
    data = json.dumps(mutated(draw, value)).encode()
    if draw(st.integers(0, 9)) == 0:
        data = mutated_bytes(draw, data)
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------ targets

Target = Callable[[Draw, Guard], None]


def _copied(source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder, symlinks=True))


def _split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write_shard(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def headers(folder: Path) -> Target:
    """Headers of safetensors files."""
    model = tiny_vlm.build("qwen2_vl", folder / "model", llm_blocks=1, vision_blocks=1)
    full, data = _split_header(model / "model.safetensors")
    kept = dict(sorted(full.items(), key=lambda item: item[1].get("data_offsets", [0, 0])[1])[:6])
    end = max(entry["data_offsets"][1] for name, entry in kept.items() if name != "__metadata__")
    inside = folder / "shards"

    def run(draw: Draw, guard: Guard) -> None:
        inside.mkdir(exist_ok=True)
        header = json.dumps(mutated(draw, kept)).encode()
        length = None
        if draw(st.booleans()):
            header = mutated_bytes(draw, header)
            length = draw(st.none() | st.sampled_from((0, 1, 2**20, 2**40, 2**63)))
        _write_shard(inside / "model.safetensors", header, data[:end], length)
        with guard.watching():
            reader = ShardReader(inside)
            for name in reader.names:
                reader.read(name)

    return run


def index(folder: Path) -> Target:
    """The index of a model in several shards."""
    model = tiny_vlm.build("qwen2_vl", folder / "model", llm_blocks=1, vision_blocks=1)
    reader = ShardReader(model)
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(sorted(reader.names), "model-00001-of-00001.safetensors")
    path = model / "model.safetensors.index.json"

    def run(draw: Draw, guard: Guard) -> None:
        written_json(draw, path, {"metadata": {"total_size": 1}, "weight_map": names})
        with guard.watching():
            pq.inspect(model, "w8a8")

    return run


def configs(folder: Path) -> Target:
    """``config.json`` of every family, and of the layout with code beside it."""
    models = [tiny_vlm.build(family, folder / family, llm_blocks=1) for family in tiny_vlm.FAMILIES]
    remote = tiny_vlm.build("video_llama_3", folder / "remote", layout="remote", llm_blocks=1)
    bomb = f"open({str(folder.parent / 'code-ran')!r}, 'w')\n"
    for name in ("configuration_videollama3.py", "processing_videollama3.py"):
        (remote / name).write_text(bomb)
    whole = {model: json.loads((model / "config.json").read_text()) for model in (*models, remote)}

    def run(draw: Draw, guard: Guard) -> None:
        model = draw(st.sampled_from([*models, remote]))
        written_json(draw, model / "config.json", whole[model])
        with guard.watching():
            pq.inspect(model, draw(st.sampled_from(("w8a8", "awq-gptq-w4a16", "w8a8-static"))))

    return run


def processors(folder: Path) -> Target:
    """Tokenizer and processor files, and what is made with them."""
    models = [tiny_vlm.build(f, folder / f, llm_blocks=1) for f in ("qwen2_vl", "video_llama_3")]
    files = ("tokenizer.json", "tokenizer_config.json", "processor_config.json")
    whole = {
        path: json.loads(path.read_text())
        for model in models
        for path in (model / name for name in files)
        if path.is_file()
    }

    def run(draw: Draw, guard: Guard) -> None:
        path = draw(st.sampled_from(sorted(whole)))
        written_json(draw, path, whole[path])
        try:
            with guard.watching():
                load_processor(path.parent)
        finally:
            path.write_text(json.dumps(whole[path]))

    return run


_SNIPPETS = (
    *("&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system ['true']", "!!set {a}"),
    *("2024-02-30", "0x7fffffffffffffff", ".inf", ".nan", "1e400", "\t", "---\n", "\0"),
    *("? [a]\n: b\n", "%YAML 9.9\n"),
    *("rules:\n", "[" * 3000, "{a: " * 2000, "- - - -", "'", '"', "\ufeff", "\u2028"),
)


def recipes(folder: Path) -> Target:
    """Recipe files, laid over a model."""
    model = tiny_vlm.build("qwen2_vl", folder / "model", llm_blocks=1, vision_blocks=1)
    bodies = [load_recipe(name).to_dict() for name in sorted(PRESETS)]
    path = folder / "recipe.yaml"

    def run(draw: Draw, guard: Guard) -> None:
        body = mutated(draw, draw(st.sampled_from(bodies)))
        text = yaml.safe_dump(body, allow_unicode=True)
        for _ in range(draw(st.integers(0, 2))):
            at = draw(st.integers(0, len(text)))
            text = text[:at] + draw(st.sampled_from(_SNIPPETS)) + text[at:]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with guard.watching():
            pq.inspect(model, load_recipe(path))

    return run


_ROWS: tuple[Any, ...] = (
    {
        "messages": [
            {"role": "user", "content": "what is this ?"},
            {"role": "assistant", "content": "red"},
        ]
    },
    {
        "id": "a",
        "messages": [
            {"role": "system", "content": "answer with one word"},
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "0.png", "max_pixels": 4096},
                    {"type": "image_url", "image_url": {"url": "file://1.png"}},
                    {"type": "video", "video": ["0.png", "0.png"], "fps": 2.0},
                    {"type": "text", "text": "what is this ?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
    },
    {
        "messages": [{"role": "user", "content": "<image><video>what is this ?"}],
        "images": ["0.png"],
        "videos": [["1.png", "1.png"]],
    },
    {
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is this ?"},
            {"from": "gpt", "value": "red"},
        ],
        "image": "0.png",
    },
    {"question": "what is this ?", "answer": ["red", "blue"], "image": "1.png", "type": "colour"},
)


def rows(folder: Path) -> Target:
    """Rows of data files in every dialect."""
    data = folder / "data"
    tiny_vlm.samples(data, kinds=("image",), count=2)
    os.mkfifo(data / "pipe")
    (data / "list.png").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    path = data / "hostile.jsonl"
    names = ("pipe", "list.png", "/dev/zero", "hostile.jsonl", "0.png", ".", "")

    def run(draw: Draw, guard: Guard) -> None:
        lines = []
        for _ in range(draw(st.integers(1, 3))):
            row = mutated(draw, draw(st.sampled_from(_ROWS)))
            text = json.dumps(row).replace("1.png", draw(st.sampled_from(names)))
            lines.append(text.encode())
        if draw(st.integers(0, 4)) == 0:
            lines.append(mutated_bytes(draw, lines[-1]))
        path.write_bytes(b"\n".join(lines))
        with guard.watching():
            read_samples(path)

    return run


def quantized(folder: Path) -> Target:
    """Quantized checkpoints: what their configuration says, their headers, their small tensors."""
    source = tiny_vlm.build("qwen2_vl", folder / "model", llm_blocks=1, vision_blocks=1)
    calibration = tiny_vlm.samples(folder / "data", count=2)
    bases = []
    for recipe in ("w8a8-static", "nvfp4", "w4a16", "fp8-kv"):
        chosen = load_recipe(recipe).with_rules({"fallback": "nearest", "solver": "rtn"})
        pq.quantize(source, chosen, folder / recipe, calibration, dtype="float32")
        bases.append(folder / recipe)
    broken, exported = folder / "broken", folder / "exported"

    def run(draw: Draw, guard: Guard) -> None:
        base = draw(st.sampled_from(bases))
        _copied(base, broken)
        what = draw(st.sampled_from(("config", "config", "header", "bytes")))
        if what == "config":
            config = json.loads((base / "config.json").read_text())
            section = mutated(draw, config["quantization_config"])
            (broken / "config.json").write_text(
                json.dumps(config | {"quantization_config": section})
            )
        else:
            shard = draw(st.sampled_from(sorted(broken.glob("*.safetensors"))))
            header, data = _split_header(shard)
            if what == "header":
                _write_shard(shard, json.dumps(mutated(draw, header)).encode(), data)
            else:
                _write_shard(shard, json.dumps(header).encode(), mutated_bytes(draw, data))
        shutil.rmtree(exported, ignore_errors=True)
        with guard.watching():
            check(broken)
        with guard.watching():
            pq.load(broken)
        with guard.watching():
            export(broken, draw(st.sampled_from(("dense", "gptq", "gguf"))), exported)

    return run


def runs(folder: Path) -> Target:
    """The provenance of a run that is taken up again."""
    source = tiny_vlm.build("qwen2_vl", folder / "model", llm_blocks=1, vision_blocks=1)
    base = folder / "base"
    rounded = {"version": 1, "rules": [{"weights": "int8-channel", "solver": "rtn"}]}
    pq.quantize(source, rounded, base)
    (base / "config.json").unlink()
    again = folder / "again"

    def run(draw: Draw, guard: Guard) -> None:
        _copied(base, again)
        name = draw(st.sampled_from(("record.json", "record.json", "plan.json")))
        path = again / "prismquant" / name
        written_json(draw, path, json.loads(path.read_text()))
        with guard.watching():
            pq.quantize(source, rounded, again, resume=True)

    return run


def searches(folder: Path) -> Target:
    """Sensitivities and tables of latencies, and the recipes that are found from them."""
    folder.mkdir()
    found = asdict(made(0, blocks=1, formats=("int3-g128", "int8-channel+int8-token")))
    path, table = folder / "sensitivity.json", folder / "latency.json"
    layers = [
        {"out": layer["out_features"], "in": layer["in_features"], "format": name, "ms": 1.0}
        for unit in found["units"]
        for layer in unit["layers"]
        for name in ("float", *found["formats"])
    ]
    times = {"layers": list({json.dumps(one): one for one in layers}.values())}
    bounds = ({"bits": 5}, {"max_loss": 1.0}, {"size": "1MB", "cap": "vision=4", "reader": "vllm"})

    def run(draw: Draw, guard: Guard) -> None:
        written_json(draw, path, found)
        asked: dict[str, Any] = dict(draw(st.sampled_from(bounds)))
        if draw(st.integers(0, 3)) == 0:
            path.write_text(json.dumps(found))
            written_json(draw, table, times)
            asked |= {"latency": table, "latency_ms": 20}
        out = folder / "recipe.yaml"
        with guard.watching():
            pq.find_mix(path, out=out, tensor_parallel=draw(st.sampled_from((1, 2))), **asked)
            load_recipe(out)

    return run


TARGETS: dict[str, Callable[[Path], Target]] = {
    target.__name__: target
    for target in (headers, index, configs, processors, recipes, rows, quantized, runs, searches)
}


def main() -> None:
    """Run one target and exit with what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()

    def out_of_time(number: int, _: object) -> None:
        worked = number == signal.SIGPROF
        raise Violation(
            f"more than {CPU_SECONDS} s of CPU" if worked else f"{WALL_SECONDS} s of waiting"
        )

    signal.signal(signal.SIGPROF, out_of_time)
    signal.signal(signal.SIGALRM, out_of_time)
    with tempfile.TemporaryDirectory() as name:
        guard = Guard(Path(name))
        target = TARGETS[said.target](Path(name) / "inside")

        @seed(said.seed)
        @settings(
            max_examples=said.examples,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data())
        def tried(data: st.DataObject) -> None:
            target(data.draw, guard)

        tried()


if __name__ == "__main__":
    main()
