"""Data files, pictures and clips that tests of data share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from PIL import Image

from prismquant.data import Sample, read_samples

if TYPE_CHECKING:
    from collections.abc import Sequence


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def turns(question: Any = "what is it ?", answer: Any = "red") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def image(file: str) -> dict[str, str]:
    return {"type": "image", "image": file}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def save_picture(path: Path, size: tuple[int, int] = (24, 16), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_video(
    path: Path, frames: int = 20, rate: int = 10, size: tuple[int, int] = (32, 16)
) -> Path:
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            shade = np.full((height, width, 3), 10 * number % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return path


def mixed_samples(folder: Path) -> tuple[Sample, ...]:
    """Texts, pictures and clips, alone and together; one without an answer."""
    for number in range(6):
        save_picture(folder / f"{number}.png", size=(16 + 8 * (number % 3), 24), seed=number)
    frames = [str(save_picture(folder / f"f{n}.png", seed=10 + n).name) for n in range(4)]
    clip = {"type": "video", "video": frames, "fps": 1.0}
    still = {"type": "video", "video": ["5.png"]}
    history = [*turns([image("3.png"), text("which ?")], "it is a red square")["messages"]]
    return read_samples(
        write_lines(
            folder / "mixed.jsonl",
            [
                {"id": "short", **turns("which ?", "no")},
                {
                    "id": "several",
                    **turns([image("0.png"), text("and"), clip, image("1.png")], "yes and no"),
                },
                {"id": "picture", **turns([text("say"), image("2.png"), text("what ?")])},
                {"id": "long", **turns("which one of the two is it ?" * 12, [text("the red one")])},
                {"id": "still", **turns([still, text("what moves ?")], "it")},
                {"id": "turns", "messages": [*history, *turns("how many ?", "2")["messages"]]},
                {
                    "id": "open",
                    "messages": [*history, {"role": "user", "content": [image("4.png")]}],
                },
            ],
        )
    )
