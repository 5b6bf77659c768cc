"""Repositories of the Hugging Face Hub: names, the files that are needed, and the cache on disk.

Nothing here uses the network or the huggingface_hub package; pull.py does.
"""

import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dsfp4 import _core
from dsfp4.errors import CheckpointError, UnsupportedError
from dsfp4.files import read_file

DEFAULT_REVISION = "main"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[^\s/\\\0]+(/[^\s/\\\0]+)*")  # git forbids .. too
_HUB_URL = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/([^/?#]+/[^/?#]+)", re.IGNORECASE
)
_COMMIT = re.compile(r"[0-9a-f]{40}")

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
# The index comes last: where it is, so are the others.
_SIDE_FILES = (
    *(CONFIG, "generation_config.json", "hf_quant_config.json", "dsfp4.xxh3.json"),
    *("tokenizer*.json", "chat_template*", INDEX),
)


@dataclass(frozen=True)
class Repository:
    """A repository, "org/name", at a revision: a branch, a tag or the 40 digits of a commit."""

    name: str
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        """Spell it as MODEL takes it."""
        return self.name if self.revision == DEFAULT_REVISION else f"{self.name}@{self.revision}"


def parse_repository(text: str) -> Repository | None:
    """Return what "org/name" or "org/name@revision" means; None for what is neither."""
    name, at, revision = text.partition("@")
    if not _NAME.fullmatch(name) or (at and not _REVISION.fullmatch(revision)):
        return None
    return Repository(name, revision or DEFAULT_REVISION)


def side_files(names: Iterable[str]) -> list[str]:
    """Return which of a repository's files are needed beside the weights, config.json first."""
    names = sorted(names)
    return [
        name
        for pattern in _SIDE_FILES
        for name in names
        if fnmatchcase(name, pattern) and "/" not in name
    ]


def needed_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Return which of a repository's files `names` running the model needs, weights last.

    `folder` has its side_files(); no weight need be there. A shard that holds nothing but tensors
    that decoding does not use, as those of MTP layers, is left out. Raises CheckpointError for a
    needed shard that is not one of `names`, and what reading the configuration and the index
    raises: UnsupportedError for a model that this version does not run.
    """
    names = set(names)
    shards = _weights(folder, names)
    if shards is None:
        shards = sorted(name for name in names if _is_weights(name))
        if not shards:
            raise UnsupportedError(
                "the repository has no *.safetensors file; weights in another format cannot be run"
            )
    for shard in shards:
        if shard not in names:
            raise CheckpointError(
                f"'{folder / INDEX}' places tensors in '{shard}', which the repository does not "
                "have; its owner must upload it",
                file=shard,
            )
    return side_files(names) + shards


def cache_folder() -> Path:
    """Return the Hub's cache, where huggingface_hub keeps it too."""
    environment = os.environ
    home = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(cache or os.path.join(home, "hub"))).expanduser().absolute()


def snapshot_folder(repository: Repository, commit: str) -> Path:
    """Return where the cache has, or will have, a commit of the repository."""
    return _folder(repository) / "snapshots" / commit


def blob_path(repository: Repository, digest: str) -> Path:
    """Return where the cache keeps a file's bytes, for all commits: by SHA-256 or Git's hash."""
    return _folder(repository) / "blobs" / digest


def find_in_cache(repository: Repository) -> Path | None:
    """Return the repository's folder in the Hub's cache; None if there is no part of it.

    Raises CheckpointError that says how to complete it if files that are needed are missing.
    """
    folder = _folder(repository)
    commit = _read_commit(folder, repository.revision)
    if commit is None:
        if not any(folder.glob("snapshots/*")):
            return None
        problem = f"the cache has other revisions of it, or not all of '{repository.revision}'"
    else:
        snapshot = folder / "snapshots" / commit
        missing = _missing_files(snapshot)
        if not missing:
            return snapshot
        problem = _describe_missing(missing)
    raise CheckpointError(
        f"'{repository}' is not complete in the Hub's cache, '{folder}': {problem}; "
        f"`dsfp4 pull {repository}` completes it",
        file=str(folder),
    )


def find_in_folder(folder: Path) -> Path | None:
    """Return the snapshot that a repository's folder in any cache means; None if it is no such.

    That is the commit of 'main', or the only one. Such a folder is named "models--org--name", and
    its "snapshots" stands for it. Raises CheckpointError if there is no such commit, or not all
    files of it.
    """
    if folder.name == "snapshots":
        folder = folder.parent
    prefix, *parts = folder.name.split("--")
    if prefix != "models" or not parts or not (folder / "snapshots").is_dir():
        return None
    name = "/".join(parts)
    pull = f"dsfp4 pull {name}"
    if folder.parent != cache_folder():
        pull = f"HF_HUB_CACHE={shlex.quote(str(folder.parent))} {pull}"
    commit = _read_commit(folder, DEFAULT_REVISION)
    commits = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    if commit is None and len(commits) > 1:
        raise CheckpointError(
            f"'{folder}' has {len(commits)} commits and no '{DEFAULT_REVISION}'; give the folder "
            f"of one of them, '{commits[0]}' for one",
            file=str(folder),
        )
    if commit is not None:
        commits = [folder / "snapshots" / commit]
    missing = _missing_files(commits[0]) if commits else [CONFIG]
    if missing:
        raise CheckpointError(
            f"'{folder}' is not complete: {_describe_missing(missing)}; `{pull}` completes it",
            file=str(folder),
        )
    return commits[0]


def repository_of_url(text: str) -> Repository | None:
    """Return the repository that a URL of the Hub names; None for any other text."""
    found = _HUB_URL.match(text)
    return parse_repository(found[1]) if found else None


def set_revision(repository: Repository, commit: str) -> None:
    """Let the cache know what commit the repository's revision is."""
    if repository.revision == commit:
        return
    path = _folder(repository) / "refs" / repository.revision
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(commit)
    new.replace(path)  # readers find the old one or the new one


def _describe_missing(missing: list[str]) -> str:
    more = f", and {len(missing) - 1} other files" if len(missing) > 1 else ""
    return f"'{missing[0]}' is missing{more}"


def _is_weights(name: str) -> bool:
    """Tell whether a file of a folder without an index is read for weights."""
    adapter = name.startswith(("adapter_model", "."))
    return name.endswith(".safetensors") and "/" not in name and not adapter


def _weights(folder: Path, names: set[str]) -> list[str] | None:
    """Return the needed files of weights: the index, else model.safetensors, decides.

    An index of whose shards none is one of `names` yields. None where neither decides. These are
    the rules of the core's catalogue.
    """
    shards = _core.needed_shards(folder)
    if _WHOLE in names and (shards is None or not names.intersection(shards)):
        return [_WHOLE]
    return shards


def _folder(repository: Repository) -> Path:
    return cache_folder() / f"models--{repository.name.replace('/', '--')}"


def _read_commit(folder: Path, revision: str) -> str | None:
    """Return the commit that a revision is, None if the cache does not know."""
    path = folder / "refs" / revision
    if not path.is_file():
        known = _COMMIT.fullmatch(revision) and (folder / "snapshots" / revision).is_dir()
        return revision if known else None

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(
            f"{problem}; delete it, as it should hold the name of a commit", file=str(path)
        )

    commit = read_file(path, 100, refuse).decode(errors="replace").strip()
    if not _COMMIT.fullmatch(commit):
        raise refuse(f"'{path}' holds {commit!r}, not 40 hexadecimal digits")
    return commit


def _missing_files(snapshot: Path) -> list[str]:
    """Return which files are not there that a model needs to be loaded."""
    if not (snapshot / CONFIG).exists():
        return [CONFIG]
    shards = _weights(snapshot, {path.name for path in snapshot.iterdir() if path.exists()})
    if shards is None:
        here = any(_is_weights(path.name) for path in snapshot.iterdir())
        return [] if here else [_WHOLE]
    return [shard for shard in shards if not (snapshot / shard).exists()]
