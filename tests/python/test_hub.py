"""Names of repositories, and the Hub's cache as it lies on disk; nothing here uses a network."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsfp4
from dsfp4.cli import main
from dsfp4.demo import resolve_model
from dsfp4.errors import CheckpointError, IoError
from dsfp4.hub import (
    INDEX,
    Repository,
    cache_folder,
    needed_files,
    parse_repository,
    side_files,
    snapshot_folder,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = Repository("org/tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def snapshot(cache: Path, random_checkpoint: Callable[[str], Path]) -> Path:
    """A checkpoint in the cache as huggingface_hub leaves it: links to blobs, and a reference."""
    folder = cache / "models--org--tiny"
    blobs = Path(shutil.copytree(random_checkpoint("v3-nvfp4-mtp"), folder / "blobs"))
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize(
    ("text", "repository"),
    [
        ("deepseek-ai/DeepSeek-R1", Repository("deepseek-ai/DeepSeek-R1", "main")),
        ("org/a.b_c-1@v1.0+x", Repository("org/a.b_c-1", "v1.0+x")),
        ("org/name@refs/pr/1", Repository("org/name", "refs/pr/1")),
        *((text, None) for text in ("name", "demo", "", "/", "org/", "/name", "a/b/c", "./name")),
        *((text, None) for text in ("../name", "org/..", "~/name", "org/na me", "org/name@")),
        *((text, None) for text in ("org/name@../x", "org/name@/x", "org/name@a//b", "@main")),
        *((text, None) for text in ("org/name@a b", "org/name\n", "org/name@v1\n", "org/n@a\0")),
    ],
)
def test_names(text: str, repository: Repository | None) -> None:
    assert parse_repository(text) == repository
    if repository is not None:
        assert parse_repository(str(repository)) == repository


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "~/h"}, "~/h/hub"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "$HOME/c"}, "~/c"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/c", "HF_HUB_CACHE": "/d"}, "/d"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder).expanduser()
    code = "from huggingface_hub.constants import HF_HUB_CACHE as cache; print(cache)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == str(cache_folder())


def test_side_files() -> None:
    names = ["tokenizer.json", INDEX, "model.safetensors", "config.json", "tokenizer.model"]
    names += ["chat_template.jinja", "tokenizer_config.json", "x/config.json", "README.md"]
    assert side_files(names) == [
        *("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", INDEX)
    ]


def test_needed_files_of_a_folder(snapshot: Path) -> None:
    names = [path.name for path in snapshot.iterdir()]
    shards = [name for name in sorted(names) if name.endswith(".safetensors")]
    assert needed_files(snapshot, [*names, "README.md"]) == side_files(names) + shards
    for name in shards:
        (snapshot / name).unlink()
    assert needed_files(snapshot, names) == side_files(names) + shards, "none need be there"


def test_a_repository_is_a_model(
    snapshot: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert snapshot == snapshot_folder(REPOSITORY, COMMIT)
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert resolve_model(name) == snapshot
    dsfp4.Model("org/tiny", device="reference")
    assert main(["info", "org/tiny"]) == 0
    assert main(["bench", "storage", "org/tiny", "--seconds", "0.05", "--block-kib", "4"]) == 0
    assert main(["verify", "org/tiny"]) == 0
    capsys.readouterr()
    assert main(["quantize", "org/tiny", str(tmp_path / "out")]) == 1
    assert f"in '{snapshot}/" in capsys.readouterr().err, "it is in FP4 already"

    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert resolve_model("org/tiny") == tmp_path / "org" / "tiny", "a folder of that name wins"
    assert resolve_model("org/tiny@main") == snapshot
    with pytest.raises(IoError, match="is not a folder"):
        resolve_model(Path("org/other"))


def test_reading_the_cache_needs_no_package(snapshot: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from dsfp4.demo import resolve_model; print(resolve_model('org/tiny'))"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == str(snapshot)


def test_a_repository_that_is_not_there(cache: Path) -> None:
    with pytest.raises(IoError, match=r"neither a folder nor .*`dsfp4 pull org/tiny@v1` ") as error:
        dsfp4.DeepseekInference("org/tiny@v1")
    assert str(cache) in str(error.value)


def drop_shard(snapshot: Path) -> None:
    (snapshot / "model-00002-of-00003.safetensors").unlink()


def drop_shards(snapshot: Path) -> None:
    for path in snapshot.glob("*.safetensors"):
        path.unlink()


def drop_blob(snapshot: Path) -> None:
    (snapshot / "model-00002-of-00003.safetensors").resolve().unlink()


def drop_config(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()


def drop_index_and_shards(snapshot: Path) -> None:
    for path in [snapshot / INDEX, *snapshot.glob("*.safetensors")]:
        path.unlink()


def drop_snapshot(snapshot: Path) -> None:
    shutil.rmtree(snapshot)


def drop_reference(snapshot: Path) -> None:
    (snapshot.parents[1] / "refs" / "main").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_shard, "'model-00002-of-00003.safetensors' is missing; "),
        (drop_shards, "'model-00001-of-00003.safetensors' is missing, and 2 other files; "),
        (drop_blob, "'model-00002-of-00003.safetensors' is missing; "),
        (drop_config, "'config.json'"),
        (drop_index_and_shards, "'model.safetensors'"),
        (drop_snapshot, "'config.json'"),
        (drop_reference, "other revisions of it, or not all of 'main'"),
    ],
)
def test_a_part_of_a_repository(snapshot: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(snapshot)
    with pytest.raises(CheckpointError, match="`dsfp4 pull org/tiny` completes it") as error:
        dsfp4.Model("org/tiny")
    assert words in str(error.value)
    assert error.value.file == str(snapshot.parents[1])


@pytest.mark.parametrize("text", ["", "main", "../../..", COMMIT[1:], "x" * 1000])
def test_a_reference_that_names_no_commit(snapshot: Path, text: str) -> None:
    path = snapshot.parents[1] / "refs" / "main"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="delete it, as it should hold the name of a commit"):
        resolve_model("org/tiny")
    path.unlink()
    os.mkfifo(path)  # is not waited for
    with pytest.raises(CheckpointError, match="not all of 'main'"):
        resolve_model("org/tiny")
