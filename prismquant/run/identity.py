"""Everything that decides the bytes of a result, as it is written down when a run begins.

A run is resumed only if it would end with the bytes that it would have had without the break. Each
part is kept in such detail that a refusal can say what differs, and not only that something does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prismquant.arguments import EXACT


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
    """Identity of a run: everything that decides the bytes of its result.

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

    @property
    def files_digest(self) -> str:
        """SHA-256 of what the source's files hold; alike for a copy in another folder."""
        return json_digest({name: stamp.digest for name, stamp in self.files.items()})

    @property
    def samples_digest(self) -> str:
        """SHA-256 of the samples' fingerprints, in their order."""
        return json_digest(self.samples)


def json_digest(content: Any) -> str:
    """SHA-256 of a value of JSON types, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
