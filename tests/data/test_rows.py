"""Rows of every dialect become samples, and nothing that a row says is lost in silence."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prismquant.data import Sample, fingerprint, located, media_of, read_samples, text_of
from prismquant.data.pictures import read_picture
from prismquant.data.read import sample_of
from prismquant.data.row_findings import Findings
from prismquant.data.rows import Row, read_rows
from prismquant.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

A, B = ({"type": "image", "image": name} for name in ("a.png", "b.png"))
CLIP = {"type": "video", "video": ["a.png", "b.png"]}
Q = {"type": "text", "text": "what ?"}
USER, MODEL = {"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}


def parsed(row: Any) -> Sample:
    return sample_of(Row("row 1", 1, row), Path(), "data")


def findings(row: Any) -> str:
    with pytest.raises(Findings) as caught:
        parsed(row)
    return "\n".join(caught.value.lines)


def chat(content: Any = "what ?", answer: Any = "red", **keys: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **keys}


def turns(question: Any = "what ?", answer: Any = "red", **keys: Any) -> dict[str, Any]:
    values = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": values, **keys}


def item(kind: str = "image", **keys: Any) -> dict[str, Any]:
    return chat([{"type": kind, kind: "a.png" if kind == "image" else "a.mp4", **keys}, Q])


# Dialects


@pytest.mark.parametrize(
    ("row", "content"),
    [
        # Markers in the text, as in ms-swift and LLaMA-Factory
        (chat("<image>what ?", images=["a.png"]), [A, Q]),
        (chat("<image>\nwhat ?", images="a.png"), [A, Q]),
        (chat("<image>what ?", image={"path": "a.png", "bytes": None}), [A, Q]),
        (chat("<image> what ?<image>", images=["a.png", "b.png"]), [A, Q, B]),
        (chat([{"type": "text", "text": "<image>what ?"}], images=["a.png"]), [A, Q]),
        (chat("<video><image>what ?", images=["a.png"], videos=[CLIP["video"]]), [CLIP, A, Q]),
        (turns("<image>what ?", images=["a.png"]), [A, Q]),
        (turns("<video>what ?", video=["a.png", "b.png"]), [CLIP, Q]),
        # Items without a file, and texts without a marker, as in TRL
        (chat([{"type": "image"}, Q], images=["a.png"]), [A, Q]),
        (chat([{"type": "image", "index": 0, "text": None}, Q], images=["a.png"]), [A, Q]),
        (chat(images=["a.png", "b.png"]), [A, B, Q]),
        (chat([Q], image="a.png"), [A, Q]),
        ({"prompt": [USER], "completion": [MODEL], "images": ["a.png"]}, [A, Q]),
        # Typed items of OpenAI and Hugging Face
        (chat([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, Q]), [A, Q]),
        (chat([{"type": "image_url", "image_url": "a.png"}, "what ?"]), [A, Q]),
        (chat([{"type": "image", "path": "a.png"}, Q]), [A, Q]),
        (chat([{"type": "image", "url": "file://a.png", "cache_control": {"x": 1}}, Q]), [A, Q]),
        # A list that names once more what items show
        (chat([A, Q], images=["a.png"], image_path="train/a.png"), [A, Q]),
        # Keys of their own
        ({"question": "what ?", "image": "a.png", "answer": "red"}, [A, Q]),
        ({"question": "<image> what ?", "images": ["a.png"], "answers": ["red", "a red"]}, [A, Q]),
        ({"prompt": "what ?", "completion": "red"}, [Q]),
        ({"query": "<image>what ?", "response": "red", "images": ["a.png"]}, [A, Q]),
        ({"question": "what ?", "response": "red", "answers": None}, [Q]),
    ],
)  # fmt: skip
def test_every_dialect_says_the_same(row: dict[str, Any], content: list[Any]) -> None:
    sample = parsed(row)
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert sample.messages[0]["content"] == content
    assert sample.answer == "red"


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("user", "human", "Human", "USER"), "user"),
        (("assistant", "gpt", "bot", "model", "ChatGPT"), "assistant"),
        (("system", "System", "developer"), "system"),
        (("tool", "function", "observation"), "tool"),
    ],
)
def test_roles_have_many_names(names: tuple[str, ...], role: str) -> None:
    for name in names:
        row = {"conversations": [{"from": name, "value": "x"}, {"role": name, "content": "x"}]}
        assert [message["role"] for message in parsed(row).messages] == [role, role]


def test_instructions_with_an_input_plain_texts_and_counts_are_read() -> None:
    asked = parsed({"instruction": "add", "input": "1 1", "output": "2"})
    assert [text_of(message) for message in asked.messages] == ["add\n1 1", "2"]
    assert parsed({"text": "a <b> c", "source": "wiki"}).messages[0]["role"] == "user"
    assert text_of(parsed({"text": "a <b> c"}).messages[0]) == "a <b> c"
    assert parsed({"question": "how many ?", "answer": 2}).answer == "2"


def test_system_prompts_and_history_come_before_the_question() -> None:
    row = {"query": "c", "response": "d", "history": [["a", "b"]], "system": "be brief"}
    said = [(message["role"], text_of(message)) for message in parsed(row).messages]
    assert said == [
        ("system", "be brief"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]
    twice = [{"role": "system", "content": "be brief"}, *chat()["messages"]]
    assert len(parsed({"messages": twice, "system": "be brief"}).messages) == 3
    assert "another system prompt" in findings({"messages": twice, "system": "be long"})
    assert findings(chat(system={"text": "x"})) == "'system' is not text, but {'text': 'x'}"


def test_notes_are_kept_as_metadata() -> None:
    notes = {"source": "coco/1.jpg", "split": "train", "image_id": 7, "question_id": "9", "n": None}
    sample = parsed(chat("<image>what ?", images=["a.png"], id=3, kind="x", type="ocr", **notes))
    assert (sample.id, sample.type, sample.meta) == ("3", "ocr", {"type": "ocr", **notes})
    assert parsed(chat(meta={"picture": "a red square"})).kind == "text"
    assert parsed(chat(type=["a", "b"], topic="sum")).type == "sum"


def test_the_same_conversation_as_a_text_is_no_second_one() -> None:
    written = "<|im_start|>user\nwhat ?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    for text in ("what ?", written, None, [], ""):
        assert len(parsed(chat("what ?", "red", text=text)).messages) == 2


def test_markers_in_answers_and_plain_texts_are_words(tmp_path: Path) -> None:
    row = chat("how does HTML show a clip ?", "with <video>, not with <img>a clip</img>")
    assert parsed(row).answer == "with <video>, not with <img>a clip</img>"
    (tmp_path / "a.txt").write_text("the tag <image> is no tag\n\f\n<img>x</img> <audio>")
    assert [sample.kind for sample in read_samples(tmp_path / "a.txt")] == ["text", "text"]


# Nothing is lost


@pytest.mark.parametrize(
    ("row", "finding"),
    [
        # Files and their places
        (chat("<image>x"), "1 <image> markers or items without a file, but 0 image files"),
        (chat("<image>x", images=["a.png", "b.png"]), "but 2 image files"),
        (chat([{"type": "image"}], images=["a.png", "b.png"]), "but 2 image files"),
        (chat([A, Q], images=["b.png"]), "0 <image> markers or items without a file, but 1"),
        (turns("<video> and <video>", video=["a.mp4"]), "2 <video> markers"),
        (chat("<image>x", "<image>y", images=["a.png"]), "2 <image> markers"),
        (chat("x", "<image>", images=["a.png"]), "message 2: an answer that shows"),
        (chat(images=["a.png"], image="b.png"), "both 'images' and 'image' list files"),
        (chat([{"type": "image", "index": 1}], images=["a.png"]), "but says index 1"),
        (chat(images=["a.png", 3]), "images, number 2: a file is named by its path, not by 3"),
        (chat(videos=[["a.png", None]]), "videos, number 1: frame 2: a file is named by its path"),
        (chat(images=[{"path": None, "bytes": "aGk="}]), "a file is named by its path"),
        (chat(images=[{"path": "a.png", "size": 3}]), "a file is named by its path"),
        (chat(videos=[b"abc"]), "save the one in this row as a file"),
        # Sound
        (chat("<audio>x"), "1 <audio> markers or items without a file, but 0 audio files"),
        (chat("hi", audio_path="a.wav"), "'audio_path' names a sound that is not heard"),
        (chat([{"type": "input_audio", "input_audio": {"data": "x"}}]), "a sound is a file"),
        (chat([{"type": "audio", "audio": b"RIFF"}]), "a sound is a file"),
        # Keys that look as if they named a picture
        (chat(imagse=["a.png"]), "key 'imagse' is not used: did you mean 'images'?"),
        (chat("<video>x", vidoes=["a.mp4"]), "did you mean 'videos'?"),
        (chat("<video>x", vidoes=["a.mp4"]), "1 <video> markers or items without a file, but 0"),
        (chat(Images=["a.png"]), "did you mean 'images'?"),
        (turns(image_path="a.png"), "'image_path' names a picture or a clip that is not shown"),
        (chat([A], second_image="b.png"), "'second_image' names a picture"),
        (chat([A], frames=["b.png"]), "'frames' names a picture"),
        (chat(image_1="b.png"), "'image_1' names a picture"),
        (chat(imageUrl="https://a.b/c"), "'imageUrl' names a picture"),
        (chat(file_name="b.png"), "'file_name' names a picture"),
        (chat(meta={"raw": [{"images": [{"path": "b.png"}]}]}), "'meta.raw.images.path' names a"),
        (chat(extra={"jpg": b"abc"}), "'extra.jpg' names a picture"),
        (chat(pixel_values=[[0.5, 1.0]]), "'pixel_values' names a picture"),
        (chat("<img>a.png</img> what ?"), "named within a text, by <img>a.png</img>"),
        # Other keys
        ({"mesages": []}, "only 'mesages': did you mean 'messages'?"),
        ({"messages": None}, "no conversation: 'messages' is null"),
        ({"text": None, "question": None}, "no conversation: 'question', 'text' are null"),
        ({"text": None, "id": 3}, "no conversation: 'text' is null"),
        ({"id": 3}, "no conversation: none of 'messages'"),
        ({"question": "x", "anwser": "y"}, "did you mean 'answer'?"),
        (chat(tools=[{"name": "f"}]), "'tools' would change what the chat template writes"),
        (chat(prompt="something else"), "'messages' and 'prompt' say different things"),
        (chat(text="another conversation"), "'messages' and 'text' say different things"),
        (chat(text=["x"]), "'messages' and 'text' say different things"),
        (turns(text="another conversation"), "'conversations' and 'text' say different things"),
        ({"question": "x", "text": "y"}, "'question' and 'text' say different things"),
        (chat(history=[["a", "b"]]), "'messages' and 'history' say different things"),
        ({"messages": [USER | {"name": "Ann"}]}, "message 1: key 'name' is not used"),
        ({"messages": [USER, {"role": "tool", "name": "f", "content": "3"}]}, "key 'name' is not"),
        ({"messages": chat()["messages"][:1], "answer": "red"}, "'answer' is not used beside"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "'chosen' is not used beside 'prompt'"),
        ({"query": "x", "answer": "y", "completion": "z"}, "which is the answer: 'answer' or"),
        (chat("<ref-object><bbox>", objects={"bbox": [[1, 2]]}), "'objects' are not put"),
        ({"messages": [{"role": "user", "contnet": "x"}]}, "message 1: key 'contnet' is not used"),
        ({"messages": [{"role": "user", "contnet": "x"}]}, "did you mean 'content'?"),
        ({"messages": [USER | {"images": ["a.png"]}]}, "key 'images' is not used"),
        ({"messages": [USER | {"tool_calls": [{"name": "f"}]}]}, "key 'tool_calls' is not used"),
        ({"messages": [USER | {"from": "human"}]}, "both 'role' and 'from'"),
        (chat([{"type": "text", "text": "x", "txt": "y"}]), "key 'txt' is not used"),
        # Texts are made of texts alone
        (turns(None), "message 1: no content"),
        (turns(3), "message 1: content is a text or a list of items, not 3"),
        (chat({"type": "text", "text": "x"}), "content is a text or a list of items, not {"),
        (chat([{"type": "text", "text": None}]), "the text of an item is not text, but None"),
        ({"question": ["a"]}, "'question' is not text, but ['a']"),
        ({"question": "x", "answer": []}, "'answer' is an empty list"),
        ({"question": "x", "answer": [["a"]]}, "'answer' is not text, but ['a']"),
        ({"question": "x", "answer": 2.5}, "'answer' is not text, but 2.5"),
        ({"question": "x", "answer": True}, "'answer' is not text, but True"),
        ({"text": ["x"]}, "'text' is not text, but ['x']"),
        ({"instruction": "x", "input": 3, "output": "y"}, "'input' is not text, but 3"),
        ({"question": "x", "answers": {"text": ["y"]}}, "'answers' is not text"),
        ({"query": "x", "history": [["a"]]}, "'history' holds pairs of texts"),
        (chat(id=["a"]), "an id is a text or a number, not ['a']"),
        (chat(meta=json.loads("[" * 40 + "]" * 40)), "nested too deeply"),
        # Roles
        ({"messages": [{"role": None, "content": "x"}]}, "message 1: no role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role ['user'] is not known"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
        ({"messages": ["x"]}, "message 1: it is no object, but 'x'"),
        ({"messages": {"role": "user"}}, "'messages' is not a list"),
        # Items
        (chat([{"type": ["image"]}]), "video or audio, not {'type': ['im"),
        (chat([{"type": "imgae", "image": "a.png"}]), "did you mean 'image'?"),
        (chat([3]), "an item is of type text, image, video or audio, not 3"),
        (chat([{"type": "image_url", "image_url": {}}]), "of type 'image_url' names no file"),
        (chat([{"type": "image_url", "image_url": {"ulr": "a.png"}}]), "a file is named by its"),
        (item(path="b.png"), "named by both 'image' and 'path'"),
        (item(image="a\0.png"), "a file is named by its path"),
        (item(image="file:///tmp/%00.png"), "a file is named by its path"),
        (item(image="ftp://a.b/c.png"), "is not a local file; download it first"),
        (item(image="data:image/png;base64,aGk="), "is not a local file"),
        (item(image="HTTPS://a.b/c.png"), "is not a local file"),
    ],
)  # fmt: skip
def test_what_would_be_lost_or_guessed_is_a_finding(row: Any, finding: str) -> None:
    assert finding in findings(row)


def test_a_row_tells_all_that_is_wrong_with_it() -> None:
    row = chat(
        [
            {"type": "image", "image": 3, "max_pixel": 1, "min_pixels": -1},
            {"type": "text"},
        ],
        None,
        imagse=["a.png"],
    )
    said = findings(row)
    assert said.count("\n") == 5
    for part in ("imagse", "max_pixels", "min_pixels is", "not by 3", "not text", "message 2: no"):
        assert part in said


# Options of pictures and clips


def test_options_are_kept_with_their_types() -> None:
    sizes = {"min_pixels": 784, "max_pixels": 7840, "resized_height": None}
    ((_, picture),) = media_of(parsed(item(**sizes)))
    assert picture == {"type": "image", "image": "a.png", "min_pixels": 784, "max_pixels": 7840}
    options = {"fps": 2, "min_frames": 4, "max_frames": 8, "total_pixels": 10**6}
    ((_, clip),) = media_of(parsed(item("video", **options, video_start=1, video_end=2.5)))
    expected = {**options, "fps": 2.0, "video_start": 1.0, "video_end": 2.5}
    assert clip == {"type": "video", "video": "a.mp4", **expected}
    assert [type(clip[key]) for key in ("fps", "video_start")] == [float, float]
    waiting = chat([{"type": "image", "max_pixels": 784}, Q], images=["b.png"])
    ((_, picture),) = media_of(parsed(waiting))
    assert picture == {"type": "image", "image": "b.png", "max_pixels": 784}


@pytest.mark.parametrize(
    ("kind", "options", "finding"),
    [
        ("image", {"max_pixel": 5}, "key 'max_pixel' is not used (did you mean 'max_pixels'?"),
        ("image", {"fps": 2}, "key 'fps' is not used"),
        ("image", {"min_pixels": 0}, "min_pixels is a whole number from 1"),
        ("image", {"min_pixels": True}, "min_pixels is a whole number from 1"),
        ("image", {"max_pixels": 1.5}, "max_pixels is a whole number from 1"),
        ("image", {"max_pixels": "9"}, "max_pixels is a whole number from 1"),
        ("image", {"max_pixels": 10**400}, "max_pixels is a whole number from 1"),
        ("image", {"min_pixels": 9, "max_pixels": 8}, "min_pixels 9 is above max_pixels 8"),
        ("image", {"resized_height": 28}, "resized_height and resized_width belong together"),
        (
            "image",
            {"resized_height": 28, "resized_width": 28, "max_pixels": 784},
            "resized_height and max_pixels exclude one another",
        ),
        ("video", {"fps": float("nan")}, "fps is a number from 0.0001 to 10000, not nan"),
        ("video", {"fps": float("inf")}, "fps is a number from"),
        ("video", {"fps": 10**400}, "fps is a number from"),
        ("video", {"fps": [2]}, "fps is a number from"),
        ("video", {"fps": False}, "fps is a number from"),
        ("video", {"fps": 2, "nframes": 4}, "fps and nframes exclude one another"),
        ("video", {"min_frames": 2, "nframes": 4}, "min_frames and nframes exclude one another"),
        ("video", {"min_frames": 9, "max_frames": 8}, "min_frames 9 is above max_frames 8"),
        ("video", {"video_start": 3, "video_end": 2}, "video_end 2 is not after the start"),
        ("video", {"video_end": 0}, "video_end 0 is not after the start"),
        ("video", {"nframes": 1}, "nframes is a whole number from 2"),
        ("video", {"video_start": -1}, "video_start is a number from 0"),
        ("video", {"video": ["a.png"], "nframes": 4}, "a list of frames is shown whole"),
    ],
)
def test_options_that_cannot_be_obeyed_are_findings(
    kind: str, options: dict[str, Any], finding: str
) -> None:
    assert finding in findings(item(kind, **options))


def test_options_enter_the_fingerprint(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    prints = set()
    for options in ({}, {"max_pixels": 784}, {"max_pixels": 785}, {"min_pixels": 784}):
        (tmp_path / "d.jsonl").write_text(json.dumps(item(**options)))
        prints.add(fingerprint(read_samples(tmp_path / "d.jsonl")))
    assert len(prints) == 4


# Files of rows


def test_one_bad_row_hides_no_other(tmp_path: Path) -> None:
    lines = [
        json.dumps(chat([{"type": ["image"]}])),
        '{"messages": [], "messages": []}',
        "[" * 100_000,
        '{"messages": [' + "1" * 5000 + "]}",
        json.dumps(chat("half \ud83d")),
        json.dumps(chat()),
    ]
    data = "\n".join(lines).encode() + b'\n{"messages": "\xff"}\n'
    (tmp_path / "d.jsonl").write_bytes(data)
    with pytest.raises(DataError, match="6 findings") as caught:
        read_samples(tmp_path / "d.jsonl")
    shown = caught.value.what.split("\n")[1:]
    assert [line.split(":")[0] for line in shown] == [f"  - line {n}" for n in (1, 2, 3, 4, 5, 7)]
    parts = ("type", "twice", "deeply", "digits", "surrogates", "utf-8")
    assert all(part in line for line, part in zip(shown, parts, strict=True))


def test_a_key_that_is_there_twice_names_its_entry(tmp_path: Path) -> None:
    whole = json.dumps(chat())
    text = f' [ {whole} ,\n{{"messages": [[]], "id": 1, "id": 2}}\n, {{"id": 3}}, {whole} ]\n'
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(DataError, match="2 findings") as caught:
        read_samples(tmp_path / "d.json")
    assert "entry 2: no valid JSON (key 'id' is there twice" in caught.value.what
    assert "entry 3: no conversation" in caught.value.what


@pytest.mark.parametrize(
    ("name", "data", "finding"),
    [
        ("d.json", b'{"a": 1}', "it holds no list of samples"),
        ("d.json", b'{"a": 1}\n{"a": 2}', "objects on lines of their own are a .jsonl file"),
        ("d.json", b'{"a": 1, "a": 1}', "the file: no valid JSON (key 'a' is there twice"),
        ("d.json", b"[" * 100_000, "the file: no valid JSON (it is nested too deeply)"),
        ("d.json", b"\xff", "utf-8"),
        ("d.jsonl", '{"messages": []}'.encode("utf-16"), "it is in UTF-16"),
        ("d.jsonl", b'{"\x1b[31m', '{"\N{REPLACEMENT CHARACTER}[31m'),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, name: str, data: bytes, finding: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_samples(tmp_path / name)
    assert finding in caught.value.what


def test_a_mark_of_utf8_is_no_text(tmp_path: Path) -> None:
    for name, text in (("d.jsonl", json.dumps(chat())), ("d.json", json.dumps([chat()]))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert len(read_samples(tmp_path / name)) == 1


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe would be waited for without end."""
    for name in ("d.jsonl", "a.png", "pipe"):
        os.mkfifo(tmp_path / name)
    for name in ("d.jsonl", "pipe"):
        with pytest.raises(DataError, match="cannot be read: it is a named pipe"):
            read_samples(tmp_path / name)
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, (item(), item("video")))))
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="2 findings") as caught:
        read_samples(tmp_path / "e.jsonl")
    assert caught.value.what.count("it is a named pipe, not a regular file") == 2
    (tmp_path / "f.jsonl").mkdir()
    with pytest.raises(DataError, match="it is a folder"):
        read_samples(tmp_path / "f.jsonl")


@pytest.mark.parametrize("name", ["", "a\0b.jsonl", "x" * 300 + ".jsonl"])
def test_impossible_names_are_explained(name: str) -> None:
    with pytest.raises(DataError):
        read_samples(name)


def test_urls_of_files_are_decoded_and_shared_files_are_named_once(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a b.png")
    url = (tmp_path / "a b.png").as_uri()
    assert "%20" in url
    (tmp_path / "d.jsonl").write_text(json.dumps(item(image=url)))
    (sample,) = read_samples(tmp_path / "d.jsonl")
    ((_, shown),) = media_of(sample)
    assert shown["image"] == str(tmp_path / "a b.png")
    assert fingerprint([sample]) == fingerprint(read_samples(tmp_path / "d.jsonl"))


# Hugging Face datasets


def png(size: tuple[int, int] = (8, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a folder that ``datasets`` reads."""
    datasets = pytest.importorskip("datasets")

    def write(rows: list[Any], **features: Any) -> Path:
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        folder = tmp_path / "table"
        folder.mkdir(exist_ok=True)
        table.to_parquet(folder / "train.parquet")
        return folder

    return write


def test_pictures_of_a_dataset_are_kept_as_their_files(dataset: Callable[..., Path]) -> None:
    import datasets

    text = datasets.Value("string")
    row = {
        "images": [{"bytes": png(), "path": "x.png"}, {"bytes": png((4, 8)), "path": None}],
        "messages": chat([{"type": "image", "text": None}, {"type": "image"}, Q])["messages"][:1],
        "file_name": "x.png",
    }
    item = {"type": text, "text": text}
    folder = dataset(
        [row],
        images=datasets.Sequence(datasets.Image()),
        messages=[{"role": text, "content": [item]}],
        file_name=text,
    )
    (sample,) = read_samples(folder, limit=1)
    pictures = [read_picture(located(shown["image"], sample)) for _, shown in media_of(sample)]
    assert [picture.size for picture in pictures] == [(8, 4), (4, 8)]
    assert fingerprint([sample]) == fingerprint(read_samples(folder))
    row["images"][1]["bytes"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    (folder / "train.parquet").unlink()
    folder = dataset(
        [row],
        images=datasets.Sequence(datasets.Image(decode=False)),
        messages=[{"role": text, "content": [item]}],
        file_name=text,
    )
    with pytest.raises(DataError, match="row 1: picture in the row is of no format that is read"):
        read_samples(folder)


def test_clips_inside_a_dataset_are_refused(dataset: Callable[..., Path]) -> None:
    import datasets

    clip = {"bytes": b"abc", "path": "a.mp4"}
    folder = dataset(
        [{"question": "x", "video": clip}],
        question=datasets.Value("string"),
        video=datasets.Video(),
    )
    with pytest.raises(DataError, match="save the one in this row as a file"):
        read_samples(folder)


def test_pictures_beside_a_dataset_are_fetched_from_its_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    from datasets.utils import file_utils

    path = "hf://datasets/someone/data@main/a.png"
    features = datasets.Features(
        {"question": datasets.Value("string"), "image": datasets.Image(decode=False)}
    )
    table = datasets.IterableDataset.from_generator(
        lambda: iter([{"question": "x", "image": {"bytes": None, "path": path}}]), features=features
    )
    asked = []

    def xopen(name: str, mode: str) -> io.BytesIO:
        asked.append((name, mode))
        return io.BytesIO(png())

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    monkeypatch.setattr(file_utils, "xopen", xopen)
    (sample,) = read_samples("someone/data")
    ((_, shown),) = media_of(sample)
    assert shown["image"].name == path
    assert asked == [(path, "rb")]


# Any row at all

WORDS = st.sampled_from(
    (
        *("messages", "conversations", "question", "answer", "prompt", "completion", "query"),
        *("response", "history", "system", "tools", "role", "from", "content", "value", "type"),
        *("text", "image", "images", "video", "videos", "audio", "image_url", "url", "path"),
        *("bytes", "index", "fps", "nframes", "min_pixels", "resized_height", "id", "kind", "meta"),
        *("user", "human", "gpt", "assistant"),
    )
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | WORDS
    | st.sampled_from(("a.png", "<image>", "<video>x", "<audio>", "file://%00", ""))
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@given(VALUES | st.fixed_dictionaries({"messages": st.lists(VALUES, max_size=3)}))
def test_any_row_is_a_sample_or_a_finding(row: Any) -> None:
    try:
        sample = parsed(row)
    except Findings as wrong:
        said = wrong.lines
    else:
        said = ("a sample",)
        roles = {message["role"] for message in sample.messages}
        assert roles <= {"user", "assistant", "system", "tool"}
        assert all(isinstance(text_of(message).encode(), bytes) for message in sample.messages)
        assert all(shown[kind] for kind, shown in media_of(sample))
    assert said
    assert all(isinstance(line, str) and line for line in said)


MEDIA_KEYS = st.sampled_from(
    ("image", "images", "video", "videos", "image_path", "imagePath", "img", "audio", "image_2")
)
NAMED = st.sampled_from(
    (
        "new.png",
        ["new.png"],
        {"path": "new.png"},
        [{"path": "new.png", "bytes": None}],
        {"url": "new.png"},
        [["new.png"]],
        {"name": "new.png"},
    )
)
ROWS = st.sampled_from(
    (
        chat,
        turns,
        lambda: chat("<image>what ?"),
        lambda: turns("<video>what ?"),
        lambda: chat([{"type": "image"}, Q]),
        lambda: chat([A, Q]),
        lambda: {"question": "what ?", "answer": "red"},
        lambda: {"query": "<image>what ?", "response": "red"},
    )
)


@given(ROWS, MEDIA_KEYS, NAMED, st.lists(st.sampled_from(("meta", "raw", "x")), max_size=2))
def test_a_picture_that_is_named_is_shown_or_refused(
    make: Callable[[], dict[str, Any]], key: str, named: Any, folders: list[str]
) -> None:
    value: Any = {key: named}
    for folder in folders:
        value = {folder: value}
    try:
        sample = parsed({**make(), **value})
    except Findings:
        return
    files = [shown[kind] for kind, shown in media_of(sample)]
    assert "new.png" in [
        part for file in files for part in (file if isinstance(file, list) else [file])
    ]


@pytest.mark.parametrize(
    ("name", "place", "split", "documents"),
    [
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "train", ["a\n\nb"]),
        ("wikitext2:test", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test", ["a\n\nb"]),
        ("c4", ("allenai/c4", "en"), "train", ["a", "b"]),
        ("pileval", ("mit-han-lab/pile-val-backup",), "validation", ["a", "b"]),
    ],
)
def test_texts_that_go_by_a_name(
    name: str,
    place: tuple[str, ...],
    split: str,
    documents: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*given: str, **options: Any) -> list[dict[str, str]]:
        asked.append((given, options["split"]))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = read_rows(name, None, 0)
    assert asked == [(place, split)]
    assert [row.value["messages"][0]["content"] for row in rows] == documents
    assert all(row.running for row in rows)


def test_a_named_text_out_of_reach_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="Salesforce/wikitext on the Hugging Face hub") as caught:
        read_rows("wikitext2", 4, 0)
    assert "give --calib FILE.txt" in str(caught.value)
    assert "long trace" not in str(caught.value)
