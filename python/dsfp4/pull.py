"""Downloads the files of a repository of the Hugging Face Hub that running its model needs."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsfp4 import _core, hub
from dsfp4.errors import Dsfp4Error, HubError, IoError, ParameterError, UnsupportedError
from dsfp4.hub import Repository
from dsfp4.model import Progress

_OLDEST = (1, 20)  # huggingface_hub; from there on it resumes after a broken connection
_MARK = ".dsfp4-pull"  # in the folder `to`: says what is downloaded there
_KEPT = "complete files are kept: pull again to go on"


@dataclass(frozen=True)
class Pulled:
    """A repository's files on disk, and bytes: downloaded now, needed, and of weights left out."""

    folder: Path
    files: int
    downloaded: int
    needed: int
    left_out: int


def pull(
    repository: str,
    *,
    revision: str | None = None,
    to: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Download what the model in `repository`, "org/name", needs to run.

    `revision` is a branch, a tag or a commit; without one it is main, or that of
    "org/name@revision". The files go into the Hub's cache, where "org/name" then is a model, or to
    the folder `to`, which is empty or absent unless this was pulled to it before. Before any weight
    is downloaded, a model that cannot be run is refused by its configuration and the names of its
    tensors, and a lack of space by the sizes of the files. Files are downloaded one by one:
    complete ones stay, whatever happens, and are not downloaded again; of the one that was not
    complete nothing is kept. `progress` is called with bytes done and in all, of those that are not
    there.

    Needs the package huggingface_hub, which reads HF_TOKEN and more from the environment. Raises
    HubError where the Hub (HF_ENDPOINT, if set) cannot be reached or refuses, or that package is
    not installed; IoError where the disk has no room or refuses; UnsupportedError and
    CheckpointError for a model that cannot be run or lacks files; ParameterError for a wrong name
    or a folder that holds something else.
    """
    wanted = parse(repository, revision)
    _require_package()
    with _typed_errors(wanted):
        download = _Download(wanted, None if to is None else Path(to).expanduser().absolute())
        return download.run(progress or _ignore)


def parse(repository: str, revision: str | None = None) -> Repository:
    """Return the repository that the arguments of pull() name, or raise ParameterError."""
    parsed = hub.parse_repository(repository)
    if parsed is None:
        meant = hub.repository_of_url(repository)
        advice = f"; its name is '{meant}'" if meant else ""
        raise ParameterError(
            f"repository must be as the Hub names it, org/name or org/name@revision, not "
            f"{repository!r}{advice}",
            parameter="repository",
        )
    if revision is None:
        return parsed
    both = hub.parse_repository(f"{parsed.name}@{revision}")
    if both is None or parsed.revision not in (hub.DEFAULT_REVISION, revision):
        raise ParameterError(
            f"revision must be a branch, a tag or a commit, and given once, not {revision!r} of "
            f"{repository!r}",
            parameter="revision",
        )
    return both


def _ignore(done: int, total: int) -> None:
    pass


class _Download:
    """The needed files of one commit, on their way to the folder `to`, or to the cache."""

    def __init__(self, repository: Repository, to: Path | None) -> None:
        import huggingface_hub

        self._fetch_file = partial(huggingface_hub.hf_hub_download, endpoint=_endpoint())
        # One request, which finds out about name, revision and access, and gives all sizes.
        info = huggingface_hub.HfApi(_endpoint()).model_info(
            repository.name, revision=repository.revision, files_metadata=True
        )
        self._repository = repository
        self._commit = str(info.sha)
        self._files = {file.rfilename: file for file in info.siblings or []}
        self._to = to
        self._folder = to or hub.snapshot_folder(repository, self._commit)

    def run(self, progress: Progress) -> Pulled:
        if hub.CONFIG not in self._files:
            raise UnsupportedError(
                f"'{self._repository}' has no {hub.CONFIG}: it is no model as Hugging Face "
                "publishes them"
            )
        if self._to is not None:
            _claim(self._to, self._repository)
        self._fetch(hub.CONFIG)
        _core.read_config(self._folder)  # refuses what this engine does not run
        for name in hub.side_files(self._files):
            self._fetch(name)
        needed = hub.needed_files(self._folder, self._files)
        missing = {name: self._size(name) for name in needed if not self._has(name)}
        total = sum(missing.values())
        self._check_space(total)
        done = 0

        def report(before: int, count: int) -> None:
            progress(before + count, total)

        # One by one: huggingface_hub keeps no part of a file, so no more than one is lost. What is
        # there under another revision is linked.
        for name in needed:
            self._fetch(name, partial(report, done))
            done += missing.get(name, 0)
            progress(done, total)
        if self._to is None:
            hub.set_revision(self._repository, self._commit)
        unneeded = [name for name in self._files if name.endswith(".safetensors")]
        return Pulled(
            self._folder,
            files=len(needed),
            downloaded=total,
            needed=sum(map(self._size, needed)),
            left_out=sum(self._size(name) for name in unneeded if name not in needed),
        )

    def _size(self, name: str) -> int:
        size: int | None = self._files[name].size
        if size is None:
            raise HubError(
                f"'{self._repository}': the Hub does not tell the size of '{name}'",
                repository=self._repository.name,
            )
        return size

    def _has(self, name: str) -> bool:
        path = self._folder / name
        if self._to is None and not path.exists():
            file = self._files[name]
            digest = file.lfs.sha256 if file.lfs else file.blob_id
            path = hub.blob_path(self._repository, digest or "")
        return path.is_file() and path.stat().st_size == self._size(name)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise IoError(
                f"'{self._folder}' has {free / 1e9:.4g} GB free, but {needed / 1e9:.4g} GB more "
                f"are needed; free {(needed - free) / 1e9:.4g} GB, or choose another folder",
                file=str(self._folder),
                errno=errno.ENOSPC,
            )

    def _fetch(self, name: str, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Download a file unless it is there; `on_bytes` is called with its bytes so far."""
        self._fetch_file(
            self._repository.name,
            name,
            revision=self._commit,
            cache_dir=hub.cache_folder(),
            local_dir=self._to,
            tqdm_class=_counter(on_bytes),
        )


def _claim(folder: Path, repository: Repository) -> None:
    """Mark `folder` as the repository's. Raises ParameterError if it has files of something else.

    huggingface_hub replaces what has the name of a file to download.
    """
    mark = folder / _MARK
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        mark.write_text(f"{repository}\n")
    elif not mark.is_file() or mark.read_text() != f"{repository}\n":
        raise ParameterError(
            f"'{folder}' holds files, and '{repository}' was not pulled to it; choose another "
            "folder, or an empty one",
            parameter="to",
        )


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _counter(on_bytes: Callable[[int], None]) -> Any:
    """Return a class that huggingface_hub takes for a bar of tqdm, of which it makes instances."""

    class Counter:
        def __init__(self, *, initial: int = 0, **appearance: Any) -> None:
            self._count = initial

        def update(self, more: int) -> None:
            self._count += more
            on_bytes(self._count)

        def update_transfer(self, more: int) -> None:
            """Leave out what crosses the wire: Xet's chunks are packed, and counted once more."""

        def set_postfix_str(self, *appearance: Any, **more: Any) -> None:
            pass

        set_transfer_postfix_str = set_postfix_str

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *exception: object) -> None:
            pass

    return Counter


def _require_package() -> None:
    problem = "is not installed"
    try:
        import huggingface_hub

        version = huggingface_hub.__version__
        if tuple(map(int, version.split(".")[:2])) >= _OLDEST:
            return
        problem = f"is {version}, which is too old"
    except ImportError:
        pass
    raise HubError(
        f"downloading needs the package huggingface_hub, which {problem}; "
        "`pip install 'dsfp4[hub]'` installs it"
    )


@contextmanager
def _typed_errors(repository: Repository) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors of this package."""
    from huggingface_hub import errors

    # The base of what its HTTP library raises, which is another one in each major version.
    http_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    hub_url = _endpoint()
    login = "log in with `hf auth login` or set HF_TOKEN"

    def refusal(problem: str, error: BaseException) -> HubError:
        response = getattr(error, "response", None)
        return HubError(
            f"'{repository}': {problem}",
            repository=repository.name,
            status=0 if response is None else response.status_code,
        )

    try:
        yield
    except Dsfp4Error:
        raise
    except errors.GatedRepoError as error:
        raise refusal(
            f"its owner gives it to those who ask: do so on {hub_url}/{repository.name}, then "
            f"{login}",
            error,
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise refusal(
            f"{hub_url} has no such repository, or not for you; check the name, or {login}", error
        ) from error
    except errors.RevisionNotFoundError as error:
        raise refusal(
            f"the repository has no revision '{repository.revision}'; {hub_url}/{repository.name} "
            "lists its branches and tags",
            error,
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise refusal("HF_HUB_OFFLINE forbids downloads; unset it", error) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = f" ({error.server_message})" if error.server_message else ""
        raise refusal(
            f"{error.response.url} is answered with {status}{said}; "
            f"{login if status in (401, 403) else _KEPT}",
            error,
        ) from error
    except (http_error, errors.LocalEntryNotFoundError) as error:
        cause = error.__cause__ or error
        raise refusal(
            f"{hub_url} cannot be read from: {_first_line(cause)}; check the network; {_KEPT}",
            cause,
        ) from error
    except errors.HFValidationError as error:
        raise ParameterError(_first_line(error), parameter="repository") from error
    except OSError as error:
        if error.errno is None:  # not the system's: what came is not what was sent
            raise refusal(f"{_first_line(error)}; {_KEPT}", error) from error
        raise IoError(str(error), file=str(error.filename or ""), errno=error.errno) from error
    except RuntimeError as error:  # of hf_xet
        raise refusal(f"{_first_line(error)}; {_KEPT}", error) from error


def _first_line(error: BaseException) -> str:
    """Return an error's first line; the package's messages go on with advice of its own."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
