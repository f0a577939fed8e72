"""What decides the bytes of a result, and in what two runs differ.

A run is resumed only if it would end with the bytes that it would have had without the break. What
decides these is written down when it begins: the plan, the source's files, the samples and the
tensors they become, device and dtype, and the versions of the code. Each part is kept in such
detail that a refusal can say what differs, and not only that something does.

Numbers of threads and models of processors may change the order in which sums are rounded, too, but
cannot always be had again: they are told in the record, and not refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from prismquant.arguments import EXACT
from prismquant.data import Sample, fingerprint
from prismquant.errors import StorageError
from prismquant.version import __version__

# A shard is looked at in so many places, of so many bytes each: every tensor of some size is hit,
# and a checkpoint of any size is stamped within a second.
_WINDOWS, _WINDOW = 256, 1 << 12
_SHOWN = 5
_LONGEST = 60
# What follows from other fields of a plan, or is only said for people.
_DERIVED = {"stored_bytes", "float_bytes", "other_bytes", "total_bytes", "totals"}
_SPOKEN = {"recipe", "remarks", "note"}


@dataclass(frozen=True)
class FileStamp:
    """One file of the source as it was when the run began.

    Attributes:
        size: Bytes.
        modified: Time of its last change, in nanoseconds since 1970.
        inode: Its number in the file system; the same file, if that is the same.
        digest: SHA-256 over its size and contents; of large shards over the header and windows of
            4 KiB that are spread evenly.
    """

    __pydantic_config__ = EXACT

    size: int
    modified: int
    inode: int
    digest: str


@dataclass(frozen=True)
class Identity:
    """What decides the bytes of a result.

    Attributes:
        plan: Fingerprint of the plan.
        files: The source's shards, configuration and processor files, by their path in its folder.
        samples: A fingerprint of each calibration sample, in order.
        inputs: Fingerprint of the tensors that the samples become; empty without samples.
        arithmetic: Type of device, and dtype.
        versions: Of the code that computes; ``sources`` is a fingerprint of PrismQuant's own.
    """

    __pydantic_config__ = EXACT

    plan: str
    files: Mapping[str, FileStamp]
    samples: tuple[str, ...]
    inputs: str
    arithmetic: str
    versions: Mapping[str, str]


def stamp_files(folder: Path, files: Sequence[Path]) -> dict[str, FileStamp]:
    """Stamp files of the source.

    Args:
        folder: The source.
        files: Files in it.

    Raises:
        StorageError: One cannot be read.
    """
    stamps = {}
    for path in sorted(files):
        try:
            stat = path.stat()
            digest = _digest(path, stat.st_size)
        except OSError as error:
            raise StorageError(f"cannot read {path.name}: {error.strerror}", where=str(path)) from (
                error
            )
        name = path.relative_to(folder).as_posix()
        stamps[name] = FileStamp(stat.st_size, stat.st_mtime_ns, stat.st_ino, digest)
    return stamps


def _digest(path: Path, size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WINDOWS * _WINDOW or path.suffix != ".safetensors":
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()
        (length,) = struct.unpack("<Q", file.read(8))
        digest.update(file.read(min(length, size)))
        for number in range(_WINDOWS):
            file.seek((size - _WINDOW) * number // (_WINDOWS - 1))
            digest.update(file.read(_WINDOW))
    return digest.hexdigest()


@contextlib.contextmanager
def unchanged(folder: Path, files: Mapping[str, FileStamp]) -> Iterator[Callable[[], None]]:
    """Watch over files of the source: at the end of the block, and whenever asked within it.

    An error in the block is blamed on a file that changed meanwhile, if one did.

    Yields:
        A function without arguments that looks once. It costs one ``stat`` a file.

    Raises:
        StorageError: A file has changed or is gone; names it.
    """

    def look() -> None:
        for name, stamp in files.items():
            try:
                stat = (folder / name).stat()
                same = (stat.st_size, stat.st_mtime_ns) == (stamp.size, stamp.modified)
                what = "" if same else "has changed"
            except OSError:
                what = "is gone"
            if what:
                raise StorageError(
                    f"{name} of the source model {what} while the run was reading it",
                    where=str(folder / name),
                    remedy="bring back the file as it was and run again with --resume: finished "
                    "steps are kept",
                )

    try:
        yield look
    except Exception:
        look()
        raise
    look()


def fingerprint_samples(samples: Sequence[Sample]) -> tuple[str, ...]:
    """A fingerprint of each sample, of its messages and its pictures' bytes; not of its id."""
    return tuple(fingerprint([sample])[:16] for sample in samples)


def fingerprint_batches(prints: Sequence[str]) -> str:
    """SHA-256 over the fingerprints of all batches, in their order. Empty for no batch."""
    return hashlib.sha256(" ".join(prints).encode()).hexdigest() if prints else ""


def code_versions() -> dict[str, str]:
    """Versions of what computes: this package and its sources, torch, transformers, numba."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".toml")):
        digest.update(f"{path.relative_to(package).as_posix()} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return {
        "prismquant": __version__,
        "sources": digest.hexdigest()[:16],
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numba": _version_if_any("numba"),
    }


def _version_if_any(package: str) -> str:
    """Of a package that there may be to do without."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


# Differences, in words


def differences(
    earlier: Identity, now: Identity, earlier_plan: Any, plan: Mapping[str, Any]
) -> list[str]:
    """In what two runs differ, one line each; empty if they would end with the same bytes.

    Args:
        earlier: The run that is to be resumed.
        now: What is asked for now.
        earlier_plan: The content of the earlier run's plan.json; None if it cannot be read.
        plan: The plan now, as JSON types.
    """
    found = []
    if earlier.plan != now.plan:
        found += _shortened("recipe", plan_differences(earlier_plan, plan))
    found += _shortened("model", _file_differences(earlier.files, now.files))
    found += _sample_differences(earlier, now, explained=bool(found))
    if earlier.arithmetic != now.arithmetic:
        found.append(f"arithmetic: {earlier.arithmetic} -> {now.arithmetic}")
    return found + _version_differences(earlier.versions, now.versions)


def plan_differences(earlier: Any, now: Mapping[str, Any]) -> list[str]:
    """In what two plans differ, layers with the same change together.

    Args:
        earlier: The content of an earlier plan.json; anything else if it cannot be read.
        now: The plan as JSON types.
    """
    if not isinstance(earlier, Mapping):
        return ["it gives another plan; plan.json of the earlier run cannot be read"]
    before, after = _flat(earlier), _flat(now)
    alike: dict[str, list[str]] = {}
    for part in dict.fromkeys([*after, *before]):
        old, new = before.get(part), after.get(part)
        if old is None or new is None:
            change = "not there before" if old is None else "no longer there"
        else:
            keys = [key for key in dict.fromkeys([*new, *old]) if old.get(key) != new.get(key)]
            change = ", ".join(f"{k} {_brief(old.get(k))} -> {_brief(new.get(k))}" for k in keys)
        if change:
            alike.setdefault(change, []).append(part)
    return [f"{_and_others(parts)}: {change}" for change, parts in alike.items()] or [
        "it gives another plan, in ways that its rows do not show"
    ]


def _flat(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A plan as parts (a layer, an edge, a setting) with the plain values of each."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in plan.items():
        if key in _DERIVED | _SPOKEN or value is None:
            continue
        if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            for item in value:
                title = _title(item) if key == "rows" else f"{key} {_title(item)}"
                parts[title] = _leaves(item)
        else:
            parts[key] = _leaves(value)
    return parts


def _title(part: Mapping[str, Any]) -> str:
    """Name of a layer, of an edge, or of a rotation."""
    for key in ("site", "edge"):
        if isinstance(part.get(key), Mapping):
            part = part[key]
    names = (part.get(key) for key in ("name", "norm", "producer", "modality"))
    return str(next((name for name in names if name), None))


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        if key not in _DERIVED | _SPOKEN:
            # The settings of a layer are told as a recipe has them.
            inside = f"{path}.{key}" if path else str(key)
            leaves |= _leaves(inner, "" if inside == "config" else inside)
    return leaves


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if value is None:
        text = "none"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]}.."


def _and_others(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} other{'s' if len(names) > 2 else ''}"


def _shortened(title: str, lines: Sequence[str]) -> list[str]:
    more = [f"{title}: and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"{title}: {line}" for line in lines[:_SHOWN]] + more


def _file_differences(earlier: Mapping[str, FileStamp], now: Mapping[str, FileStamp]) -> list[str]:
    lines = []
    for name in sorted({*earlier, *now}):
        old, new = earlier.get(name), now.get(name)
        kind = "shard " if name.endswith(".safetensors") else ""
        if old is None or new is None:
            lines.append(f"{kind}{name} {'is new' if old is None else 'is gone'}")
        elif old.digest != new.digest:
            sizes = f" ({old.size} -> {new.size} bytes)" if old.size != new.size else ""
            lines.append(f"{kind}{name} has changed{sizes}")
        elif old.inode == new.inode and old.modified != new.modified:
            # Its digest may have missed what was written: it looks at large files in places.
            lines.append(
                f"{kind}{name} was written to at {_moment(new.modified)}, after the run began"
            )
    return lines


def _moment(nanoseconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(nanoseconds / 1e9))


def _sample_differences(earlier: Identity, now: Identity, *, explained: bool) -> list[str]:
    if earlier.samples == now.samples:
        if earlier.inputs == now.inputs or explained:
            return []
        return [
            "calibration: the same samples become other tokens or pixels: --max-pixels, "
            "--max-frames or --max-length differ, or a library that the processor uses has changed"
        ]
    before, after = len(earlier.samples), len(now.samples)
    kept = (Counter(earlier.samples) & Counter(now.samples)).total()
    if before != after:
        return [f"calibration: {after} samples instead of {before}, {after - kept} of them new"]
    if kept == after:
        return [f"calibration: the same {after} samples in another order"]
    return [f"calibration: {after - kept} of {after} samples differ"]


def _version_differences(earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    lines = [
        f"code version: {name} {earlier.get(name, 'unknown')} -> {now.get(name, 'unknown')}"
        for name in dict.fromkeys([*earlier, *now])
        if name != "sources" and earlier.get(name) != now.get(name)
    ]
    if not lines and earlier.get("sources") != now.get("sources"):
        return ["code version: the sources of prismquant were edited"]
    return lines
