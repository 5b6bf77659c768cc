"""What a MODEL may be beside a folder: one sentence for each thing that people give instead."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsfp4
from dsfp4 import hub
from dsfp4.cli import main
from dsfp4.demo import resolve_model
from dsfp4.errors import CheckpointError, IoError, ParameterError
from dsfp4.files import read_checkpoint_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 7847345\n"
)


@pytest.fixture
def repository(tmp_path: Path, demo_model: Path) -> Path:
    """A repository's folder in a cache that is not the user's own."""
    folder = tmp_path / "models--org--tiny"
    for commit in (COMMIT, COMMIT[::-1]):
        shutil.copytree(demo_model, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


def test_an_empty_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_model: Path) -> None:
    monkeypatch.chdir(demo_model)  # "" would be this folder
    with pytest.raises(ParameterError, match="is empty; give the folder of a checkpoint") as error:
        resolve_model("")
    assert error.value.parameter == "model"
    assert resolve_model(".") == demo_model


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://huggingface.co/org/tiny", "`dsfp4 pull org/tiny` downloads"),
        ("https://huggingface.co/org/tiny/tree/v1?x=y", "`dsfp4 pull org/tiny` downloads"),
        ("https://hf.co/org/tiny/", "`dsfp4 pull org/tiny` downloads"),
        ("hf://org/tiny@v1", "`dsfp4 pull org/tiny@v1` downloads"),
        ("https://example.com/model.tar", "give the folder of a checkpoint"),
        ("https://huggingface.co/org", "give the folder of a checkpoint"),
        ("s3://bucket/model", "give the folder of a checkpoint"),
    ],
)
def test_a_url(url: str, words: str) -> None:
    with pytest.raises(ParameterError) as error:
        resolve_model(url)
    assert str(error.value).startswith(f"'{url}' is a URL")
    assert words in str(error.value)


def test_a_url_is_no_repository_to_pull(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("huggingface_hub")
    assert main(["pull", "https://huggingface.co/org/tiny"]) != 0
    assert "org/tiny" in capsys.readouterr().err


def test_a_folder_of_the_cache_is_its_main_commit(repository: Path) -> None:
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository, repository / "snapshots", snapshot):
        assert resolve_model(folder) == snapshot
        assert resolve_model(str(folder)) == snapshot
    dsfp4.Model(repository, "cpu")


def test_a_folder_of_the_cache_without_main(repository: Path) -> None:
    (repository / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match="has 2 commits and no 'main'") as error:
        resolve_model(repository)
    assert error.value.file == str(repository)
    shutil.rmtree(repository / "snapshots" / COMMIT[::-1])
    assert resolve_model(repository) == repository / "snapshots" / COMMIT
    shutil.rmtree(repository / "snapshots" / COMMIT)
    with pytest.raises(
        CheckpointError, match=r"`HF_HUB_CACHE=.* dsfp4 pull org/tiny` completes it"
    ):
        resolve_model(repository)


def test_a_part_of_a_folder_of_the_cache(repository: Path) -> None:
    shard = repository / "snapshots" / COMMIT / "model-00002-of-00005.safetensors"
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"'{shard.name}' is missing; ") as error:
        resolve_model(repository)
    assert f"`HF_HUB_CACHE={repository.parent} dsfp4 pull org/tiny` completes it" in str(
        error.value
    )


# ---- which files a model is -----------------------------------------------------------------


def whole(folder: Path) -> None:
    """A file of all weights beside an index of shards that are gone."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model.safetensors").touch()


def no_index(folder: Path) -> None:
    (folder / hub.INDEX).unlink()
    (folder / "model.safetensors").touch()
    (folder / "consolidated.safetensors").touch()


@pytest.mark.parametrize("change", [whole, no_index])
def test_model_safetensors_decides(demo_model: Path, tmp_path: Path, change: Any) -> None:
    folder = Path(shutil.copytree(demo_model, tmp_path / "model"))
    change(folder)
    names = [path.name for path in folder.iterdir()]
    needed = hub.needed_files(folder, names)
    assert [name for name in needed if name.endswith("safetensors")] == ["model.safetensors"]


def test_the_index_decides(demo_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_model, tmp_path / "model"))
    names = [path.name for path in folder.iterdir()]
    before = hub.needed_files(folder, names)
    assert hub.needed_files(folder, [*names, "model.safetensors"]) == before


# ---- files that are not what they should be -------------------------------------------------


@pytest.fixture
def folder(demo_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model, tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("tokenizer.json", dsfp4.DeepseekInference),
        ("generation_config.json", dsfp4.DeepseekInference),
        ("config.json", dsfp4.Model),
        (hub.INDEX, dsfp4.Model),
        ("model-00002-of-00005.safetensors", dsfp4.Model),
    ],
)
def test_a_git_lfs_pointer(folder: Path, name: str, read: Callable[[Path], Any]) -> None:
    (folder / name).write_text(LFS_POINTER)
    with pytest.raises(CheckpointError, match="is a Git LFS pointer") as error:
        read(folder)
    assert name in str(error.value)
    assert "7847345 bytes; run `git lfs pull`" in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
def test_a_link_that_leads_nowhere(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/0123")
    words = "is a link to '../blobs/0123', which is not there"
    with pytest.raises(IoError, match=re.escape(words)) as error:
        dsfp4.DeepseekInference(folder)
    assert error.value.file == str(folder / name)


def test_a_text_that_looks_like_a_pointer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text(LFS_POINTER + " " * 1024)  # no pointer is as long
    assert read_checkpoint_file(path).startswith(b"version ")


# ---- values that the sampler refuses --------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("top_p", 0, "must be a number over 0, to 1 (off), not 0"),
        ("top_p", -0.5, "must be a number over 0, to 1 (off), not -0.5"),
        ("top_k", 1.5, "must be an integer from 0 (off) to 2147483647, not 1.5"),
        ("top_k", 2**31, "must be an integer from 0 (off) to 2147483647, not 2147483648"),
        ("temperature", 101, "must be a number from 0 to 100, not 101"),
    ],
)
def test_a_recommendation_that_is_refused(
    folder: Path, field: str, value: float, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError) as error:
        dsfp4.DeepseekInference(folder)
    assert words in str(error.value)
    assert error.value.tensor == field
    assert main(["info", str(folder)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"temperature": 0.6, "top_p": 0.95}, "temperature 0.6, top_k off, top_p 0.95"),
        ({"top_k": 50.0, "top_p": 1}, "temperature 0.7, top_k 50, top_p off"),
        ({"do_sample": False, "top_p": 0.5}, "the likeliest token (temperature 0)"),
    ],
)
def test_info_shows_the_defaults(
    folder: Path, config: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert main(["info", str(folder)]) == 0
    assert f"sampling, unless told otherwise: {line}\n" in capsys.readouterr().out
    assert main(["info", str(folder), "--json"]) == 0
    sampling = json.loads(capsys.readouterr().out)["sampling"]
    assert sampling.keys() == {"temperature", "top_k", "top_p"}
    assert sampling["top_p"] == config.get("top_p", 1.0)


def test_max_tokens_is_what_the_documentation_says(demo_model: Path) -> None:
    assert "`max_tokens`, 1 or more:" in str(dsfp4.DeepseekInference.__doc__)
    with dsfp4.DeepseekInference(demo_model, "cpu") as model:
        assert len(model.generate([1], max_tokens=1).tokens) == 1
        with pytest.raises(ParameterError, match="max_tokens': must be at least 1, not 0"):
            model.generate([1], max_tokens=0)
