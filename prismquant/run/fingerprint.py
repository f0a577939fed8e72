"""Fingerprints of what decides the bytes of a result: source files, samples, code.

Numbers of threads and models of processors may change the order in which sums are rounded, too, but
cannot always be had again: they are told in the record, and not refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from prismquant.data import Sample, fingerprint
from prismquant.errors import StorageError
from prismquant.models.arch import ArchSpec
from prismquant.models.config import read_config
from prismquant.models.given_arch import own_arch_file
from prismquant.run.differences import ARCHITECTURE
from prismquant.run.identity import FileStamp
from prismquant.version import __version__

# A shard is looked at in so many places, of so many bytes each: every tensor of some size is hit,
# and a checkpoint of any size is stamped within a second.
_WINDOWS, _WINDOW = 256, 1 << 12


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


def described_versions(folder: Path, arch: ArchSpec) -> dict[str, str]:
    """Fingerprint of an architecture, by its key; empty where a file of the package describes it.

    Args:
        folder: The checkpoint.
        arch: Its architecture.
    """
    if own_arch_file(folder, read_config(folder).get("model_type")) is None:
        return {}
    return {ARCHITECTURE: hashlib.sha256(repr(arch).encode()).hexdigest()[:16]}


def _version_if_any(package: str) -> str:
    """Version of an optional package, or 'none'."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
