"""Small files: every reader of one refuses what is too large, no regular file, or broken."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsfp4 import files
from dsfp4.chat import ChatTemplate
from dsfp4.errors import CheckpointError, Dsfp4Error, IoError, ParameterError
from dsfp4.evaluate import read_documents
from dsfp4.files import read_checkpoint_file
from dsfp4.sampling import recommended_sampling
from dsfp4.tokenizer import Tokenizer


def copy_links(demo_model: Path, folder: Path) -> Path:
    for path in demo_model.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def _template(folder: Path) -> Any:
    ChatTemplate(folder, Tokenizer(folder.parent))


READERS: list[tuple[str, Callable[[Path], Any], type[Dsfp4Error]]] = [
    ("tokenizer.json", Tokenizer, CheckpointError),
    ("tokenizer_config.json", Tokenizer, CheckpointError),
    ("tokenizer_config.json", _template, CheckpointError),
    ("chat_template.jinja", _template, CheckpointError),
    ("generation_config.json", recommended_sampling, CheckpointError),
    ("text.jsonl", lambda folder: read_documents(folder / "text.jsonl"), ParameterError),
]
EVERY_READER = pytest.mark.parametrize(("name", "read", "error"), READERS)


@pytest.fixture
def folder(demo_model: Path, tmp_path: Path) -> Path:
    """Links to the demo model, in a folder of its own within another one."""
    copy_links(demo_model, tmp_path)
    inner = tmp_path / "model"
    inner.mkdir()
    return copy_links(demo_model, inner)


@EVERY_READER
def test_a_device_is_not_read(folder: Path, name: str, read: Any, error: Any) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(error, match=f"{name}' is not a regular file"):
        read(folder)


@EVERY_READER
def test_a_pipe_is_not_waited_for(folder: Path, name: str, read: Any, error: Any) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(error, match=f"{name}' is not a regular file"):
        read(folder)


@EVERY_READER
def test_a_large_file_is_not_read(folder: Path, name: str, read: Any, error: Any) -> None:
    (folder / name).unlink(missing_ok=True)
    size = 1 << 40
    with (folder / name).open("wb") as file:
        file.truncate(size)
    with pytest.raises(error, match=f"{name}' has {size} bytes; the limit is"):
        read(folder)


@EVERY_READER
def test_a_link_that_leads_nowhere_is_no_absent_file(
    folder: Path, name: str, read: Any, error: Any
) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(IoError, match=f"cannot read .*{name}'"):
        read(folder)


def test_the_limit_itself_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 8)
    (tmp_path / "a").write_bytes(b"8 bytes.")
    (tmp_path / "b").write_bytes(b"9 bytes..")
    assert read_checkpoint_file(tmp_path / "a") == b"8 bytes."
    with pytest.raises(CheckpointError, match="has 9 bytes; the limit is 8") as error:
        read_checkpoint_file(tmp_path / "b")
    assert error.value.file == str(tmp_path / "b")


def test_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "a", tmp_path):
        for _ in range(8):
            try:
                read_checkpoint_file(path)
            except CheckpointError:
                assert path == tmp_path
    assert len(os.listdir("/proc/self/fd")) == before
