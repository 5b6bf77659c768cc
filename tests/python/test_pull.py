"""`dsfp4 pull` against a server on this machine that speaks the Hub's endpoints."""

import errno
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from test_checkpoint import edit_json

import dsfp4
from dsfp4.cli import main
from dsfp4.errors import (
    CheckpointError,
    HubError,
    IoError,
    ParameterError,
    UnsupportedError,
)
from dsfp4.hub import INDEX
from dsfp4.pull import pull
from fixtures.checkpoint_io import read_shard, read_tensors, write_shard
from fixtures.hub_server import HubRepository, HubServer, serve_hub

NAME = "org/DeepSeek-Tiny-FP4"
MTP_SHARD = "model-00004.safetensors"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
SIDE_FILES = [
    *("config.json", "generation_config.json", "hf_quant_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", INDEX),
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def original(
    random_checkpoint: Callable[[str], Path], demo_model: Path, tmp_path_factory: Any
) -> Path:
    """A small checkpoint whose MTP layer lies in a shard of its own, and files of no use."""
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(random_checkpoint("v3-nvfp4-mtp"), folder, dirs_exist_ok=True)
    mtp: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_shard(path)
        mtp |= {name: t for name, t in tensors.items() if name.startswith("model.layers.3.")}
        write_shard(path, {name: t for name, t in tensors.items() if name not in mtp})
    write_shard(folder / MTP_SHARD, mtp)
    edit_json(
        folder / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(mtp, MTP_SHARD))
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, folder)
    (folder / "generation_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "README.md").write_text("# A model")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 3000)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "tokenizer.json").write_text("{}")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def running() -> Iterator[HubServer]:
    with serve_hub() as server:
        yield server


@pytest.fixture
def hub(
    running: HubServer, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> HubServer:
    """The server with one repository, and a cache that is empty."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    running.repositories = {NAME: HubRepository({"main": files_of(original)})}
    running.gets = []
    return running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub tries again without waiting."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_what_is_needed_comes_and_runs(hub: HubServer, original: Path) -> None:
    calls: list[tuple[int, int]] = []
    pulled = pull(NAME, progress=lambda done, total: calls.append((done, total)))
    assert hub.downloaded() == [*SIDE_FILES, *SHARDS]
    weights = sum((original / name).stat().st_size for name in SHARDS)
    sides = sum((original / name).stat().st_size for name in SIDE_FILES)
    assert (pulled.files, pulled.downloaded) == (len(SIDE_FILES + SHARDS), weights)
    assert (pulled.needed, pulled.left_out) == (
        weights + sides,
        (original / MTP_SHARD).stat().st_size,
    )
    assert calls == sorted(calls)
    assert calls[-1] == (weights, weights)

    ids = range(1, 9)
    expected = dsfp4.Model(original, device="reference").forward(ids)
    for model in (NAME, f"{NAME}@main", f"{NAME}@{pulled.folder.name}"):
        np.testing.assert_array_equal(dsfp4.Model(model, device="reference").forward(ids), expected)
    with dsfp4.DeepseekInference(NAME, device="reference") as inference:
        assert inference.folder == pulled.folder

    hub.gets.clear()
    assert pull(NAME).downloaded == 0
    assert hub.gets == []


def test_into_a_folder(hub: HubServer, original: Path, tmp_path: Path) -> None:
    to = tmp_path / "a" / "model"
    assert pull(NAME, to=to).folder == to
    assert sorted(path.name for path in to.glob("[!.]*")) == sorted(SIDE_FILES + SHARDS)
    for name in SIDE_FILES + SHARDS:
        assert (to / name).read_bytes() == (original / name).read_bytes(), name
    assert not (tmp_path / "home" / "hub").exists()
    dsfp4.Model(to)
    hub.gets.clear()
    assert pull(NAME, to=to).downloaded == 0
    assert hub.gets == []


def test_revisions(hub: HubServer, original: Path) -> None:
    repository = hub.repositories[NAME]
    changed = files_of(original) | {"chat_template.jinja": b"another"}
    repository.revisions["refs/pr/1"] = changed
    first = pull(NAME).folder
    second = pull(NAME, revision="refs/pr/1")
    assert second.folder.name == repository.commit("refs/pr/1") != first.name
    assert second.downloaded == 0, "the shards are the same"
    for model, folder in ((NAME, first), (f"{NAME}@refs/pr/1", second.folder)):
        with dsfp4.DeepseekInference(model, device="reference") as inference:
            assert inference.folder == folder
    repository.revisions["main"] = changed
    assert pull(NAME).folder == second.folder
    with pytest.raises(HubError, match="no revision 'v9'") as error:
        pull(f"{NAME}@v9")
    assert (error.value.repository, error.value.status) == (NAME, 404)
    with pytest.raises(ParameterError, match="given once"):
        pull(f"{NAME}@v9", revision="v8")


def test_a_broken_connection_is_resumed(
    hub: HubServer, original: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 1 << 16  # huggingface_hub counts in these
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    hub.repositories[NAME].broken = Counter({SHARDS[1]: 2})
    calls: list[int] = []
    folder = pull(NAME, progress=lambda done, total: calls.append(done)).folder
    size = (original / SHARDS[1]).stat().st_size
    half = size // 2 // chunk * chunk
    asked = [first for name, first in hub.gets if name == SHARDS[1]]
    assert asked == [0, half, half + (size - half) // 2 // chunk * chunk]
    assert (folder / SHARDS[1]).read_bytes() == (original / SHARDS[1]).read_bytes()
    assert calls == sorted(calls)


def test_complete_files_are_kept(hub: HubServer, impatient: None) -> None:
    hub.repositories[NAME].broken = Counter({SHARDS[1]: 1000})
    with pytest.raises(HubError, match="complete files are kept") as error:
        pull(NAME)
    assert (error.value.repository, error.value.status) == (NAME, 0)
    with pytest.raises(CheckpointError, match=f"`dsfp4 pull {NAME}` completes it"):
        dsfp4.Model(NAME)
    hub.repositories[NAME].broken.clear()
    hub.gets.clear()
    pull(NAME)
    assert hub.downloaded() == SHARDS[1:]
    dsfp4.Model(NAME)


def test_ctrl_c_on_a_terminal(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories[NAME].stalled = {SHARDS[1]}
    to = tmp_path / "a folder"
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "dsfp4", "pull", NAME, "--to", str(to)]
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=terminal, text=True
    ) as process:
        os.close(terminal)
        shown = ""
        while SHARDS[1] not in hub.downloaded():  # the rest of it never comes
            if select.select([screen], [], [], 0.05)[0]:
                shown += os.read(screen, 1000).decode()
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.read() == ""
        assert process.wait() == 130
    shown += os.read(screen, 10000).decode()
    os.close(screen)
    assert re.search(r"downloading .* of 5.8 MB, .*/s", shown)
    assert f"`dsfp4 pull {NAME} --to '{to}'` goes on" in shown
    hub.repositories[NAME].stalled = set()
    hub.gets.clear()
    pull(NAME, to=to)
    assert hub.downloaded() == SHARDS[1:]
    dsfp4.Model(to)


def test_a_folder_of_something_else(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["org/other"] = hub.repositories[NAME]
    pull(NAME, to=tmp_path / "mine")
    before = files_of(tmp_path / "mine")
    with pytest.raises(ParameterError, match="'org/other' was not pulled to it"):
        pull("org/other", to=tmp_path / "mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ParameterError, match="holds files"):
        pull(NAME, to=tmp_path / "other")
    assert files_of(tmp_path / "mine") == before
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


def test_nobody_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be read from.*the network"):
        pull(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        pull(NAME)


@pytest.mark.parametrize(
    ("raised", "error", "words"),
    [
        (RuntimeError("Xet's\nmore"), HubError, "Xet's; complete files are kept"),
        (OSError("Consistency check failed.\nmore"), HubError, "check failed; complete files are"),
        (OSError(errno.ENOSPC, "No space left", "x"), IoError, "No space left"),
    ],
)
def test_other_failures(
    hub: HubServer,
    raised: Exception,
    error: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **more: Any) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(error, match=words) as caught:
        pull(NAME)
    assert getattr(caught.value, "errno", None) == getattr(raised, "errno", None)


def test_sizes_that_are_not_told(hub: HubServer) -> None:
    hub.repositories[NAME].tells_sizes = False
    with pytest.raises(HubError, match="does not tell the size"):
        pull(NAME)
    assert not {*SHARDS} & {*hub.downloaded()}


def test_refused_by_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match=r"no such repository.*check the name") as error:
        pull("org/nothing")
    assert (error.value.repository, error.value.status) == ("org/nothing", 401)

    repository = hub.repositories[NAME]
    repository.token = "hf_secret"
    with pytest.raises(HubError, match=r"no such repository.*HF_TOKEN"):  # private
        pull(NAME)
    repository.gated = True
    with pytest.raises(HubError, match=f"ask: do so on {hub.url}/{NAME}.*HF_TOKEN") as error:
        pull(NAME)
    assert (error.value.repository, error.value.status) == (NAME, 401)
    assert hub.gets == []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(NAME)


def test_files_that_the_repository_lacks(hub: HubServer, original: Path) -> None:
    files = files_of(original)
    hub.repositories[NAME].withheld = {SHARDS[2]}  # listed, and not given
    with pytest.raises(
        HubError, match=f"{SHARDS[2]} is answered with 404 .Entry not found"
    ) as error:
        pull(NAME)
    assert error.value.status == 404

    del files[SHARDS[0]]
    hub.repositories[NAME] = HubRepository({"main": files})
    hub.gets.clear()
    with pytest.raises(CheckpointError, match=f"'{SHARDS[0]}', which the repository does not have"):
        pull(NAME)
    assert not {*SHARDS} & {*hub.downloaded()}

    for shard in SHARDS[1:]:
        del files[shard]
    del files[INDEX], files[MTP_SHARD]
    hub.repositories[NAME] = HubRepository({"main": files})
    with pytest.raises(UnsupportedError, match=r"no \*\.safetensors"):
        pull(NAME)


def test_models_that_cannot_be_run(hub: HubServer, original: Path) -> None:
    files = files_of(original)
    hub.repositories[NAME] = HubRepository(
        {"main": files | {"config.json": b'{"model_type": "llama"}'}}
    )
    with pytest.raises(UnsupportedError, match="llama"):
        pull(NAME)
    assert hub.downloaded() == ["config.json"]

    index = json.loads(files[INDEX])
    index["weight_map"]["model.layers.0.mlp.down_proj.pre_quant_scale"] = SHARDS[0]
    hub.repositories[NAME] = HubRepository({"main": files | {INDEX: json.dumps(index).encode()}})
    with pytest.raises(UnsupportedError, match="NVFP4 without AWQ is"):
        pull(NAME)
    assert not {*SHARDS} & {*hub.downloaded()}

    del files["config.json"]
    hub.repositories[NAME] = HubRepository({"main": files})
    with pytest.raises(UnsupportedError, match=r"no config\.json"):
        pull(NAME)


def test_one_file_without_an_index(hub: HubServer, original: Path) -> None:
    files = {name: data for name, data in files_of(original).items() if "model" not in name}
    single = original.parent / "single.safetensors"
    write_shard(single, read_tensors(original))
    more = {"model.safetensors": single.read_bytes(), "adapter_model.safetensors": b"x" * 3000}
    hub.repositories[NAME] = HubRepository({"main": files | more})
    pulled = pull(NAME)
    assert (hub.downloaded()[-1], pulled.left_out) == ("model.safetensors", 3000)
    dsfp4.Model(NAME)


def test_no_space(hub: HubServer, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(original / name).stat().st_size for name in SHARDS]
    total = sum(sizes)
    free = total - 1000

    def statvfs(path: Any) -> Any:
        return SimpleNamespace(f_frsize=1, f_blocks=2 * free, f_bfree=2 * free, f_bavail=free)

    with monkeypatch.context() as patched:
        patched.setattr("os.statvfs", statvfs)
        words = f"{free / 1e9:.4g} GB free, but {total / 1e9:.4g} GB more are needed; free 1e-06 GB"
        with pytest.raises(IoError, match=words) as error:
            pull(NAME)
        assert error.value.errno == errno.ENOSPC
        assert not {*SHARDS} & {*hub.downloaded()}
    hub.repositories[NAME].withheld = {SHARDS[1]}
    with pytest.raises(HubError):
        pull(NAME)
    hub.repositories[NAME].withheld = set()
    monkeypatch.setattr("os.statvfs", statvfs)
    assert pull(NAME).downloaded == total - sizes[0], "what is there needs no room"


def test_the_command(hub: HubServer, capsys: Capture) -> None:
    assert main(["pull", NAME]) == 0
    said = capsys.readouterr()
    folder = said.out.strip()
    assert (Path(folder) / SHARDS[0]).is_file()
    assert "5.8 MB in " in said.err
    assert "the model has 5.98 MB in 10 files" in said.err
    assert ", and 2.19 MB of weights that are not needed to decode\n" in said.err
    assert f"`dsfp4 chat {NAME}` talks to it" in said.err
    assert "\r" not in said.err, "progress is for terminals"
    assert main(["pull", NAME, "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert said.err == ""
    assert (facts["folder"], facts["files"], facts["downloaded"]) == (folder, 10, 0)
    assert facts["seconds"] > 0
    assert main(["info", NAME]) == 0
    assert main(["verify", NAME]) == 0
    assert "deepseek_v3: 3 layers" in capsys.readouterr().out
    assert main(["pull", "org/nothing"]) == 1
    assert capsys.readouterr().err.startswith("dsfp4: error: 'org/nothing': ")


@pytest.mark.parametrize(("version", "problem"), [(None, "not installed"), ("0.36.2", "too old")])
def test_without_the_package(
    version: str | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "huggingface_hub", package)
    with pytest.raises(HubError, match=f"{problem}; `pip install 'dsfp4\\[hub\\]'` installs it"):
        pull(NAME)
