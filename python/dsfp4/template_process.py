"""The process that renders a chat template: starts it, asks it, and says why it died."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsfp4.errors import CheckpointError, IoError, ParameterError

CPU_SECONDS = 5.0  # for each rendering
MOST_CHARACTERS = 2**24  # of a rendered prompt: four for each of four million tokens

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from dsfp4.template_worker import main; main()"
)


# What Python and a date need. Secrets and preloaded libraries are not a template's business.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL", "LC_TIME")


class TemplateProcess:
    """Renders the Jinja template `source`, which came from `path`, outside this process.

    May be used by several threads. Raises CheckpointError for a template that is malformed, fails,
    or wants more than CPU_SECONDS or MOST_CHARACTERS.
    """

    def __init__(self, source: str, path: Path) -> None:
        self._source = source
        self._path = path
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Any = None
        self.variables: frozenset[str] = frozenset()  # those that the template reads
        with self._lock:
            self._ensure_started()

    def render(
        self,
        conversation: dict[str, Any],
        own: dict[str, Any],
        disguise: dict[str, str],
        arguments: Sequence[Sequence[Any]] = (),
        without_text: Sequence[int] = (),
    ) -> str:
        """Return what the template makes of `conversation`, the caller's variables, and `own`.

        `disguise` maps characters to those that stand for them in `conversation` and in the texts
        of `arguments`: the fields of messages.Arguments; `without_text` is that of Conversation.
        """
        with self._lock:
            self._ensure_started()
            return self._ask(
                {
                    "conversation": conversation,
                    "own": own,
                    "disguise": disguise,
                    "arguments": arguments,
                    "without_text": without_text,
                }
            )

    def close(self) -> None:
        """End the process; the next rendering starts a new one."""
        with self._lock:
            self._end()

    def _ensure_started(self) -> None:
        if self._process is not None:
            return
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # a terminal's Ctrl-C is ours
            )
        except OSError as error:
            raise IoError(
                f"cannot start '{sys.executable}' to render the chat template: {error.strerror}",
                file=sys.executable or "",
                errno=error.errno or 0,
            ) from error
        self._stop = weakref.finalize(self, _kill, self._process)
        settings = {"seconds": CPU_SECONDS, "characters": MOST_CHARACTERS}
        self.variables = frozenset(json.loads(self._ask({"template": self._source} | settings)))

    def _ask(self, request: dict[str, Any]) -> str:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        line = b""
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass  # it died: the exit status below says why
        except BaseException:  # Ctrl-C: question and answer no longer match
            self._end()
            raise
        answer: dict[str, str] = json.loads(line) if line.endswith(b"\n") else {}
        if "text" in answer:
            return answer["text"]
        if "refused" in answer:
            raise ParameterError(
                f"the chat template refuses the messages: {answer['refused']}",
                parameter="messages",
            )
        self._end()
        raise CheckpointError(
            f"chat_template in '{self._path}' "
            + (f"fails: {answer['error']}" if answer else _cause_of_death(process.returncode)),
            file=str(self._path),
            tensor="chat_template",
        )

    def _end(self) -> None:
        if self._process is not None:
            self._stop()
            self._process = None


def _cause_of_death(status: int) -> str:
    if status == -signal.SIGPROF:
        return f"takes more than {CPU_SECONDS:g} seconds to render"
    return f"ends the process that renders it (exit status {status})"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(OSError):  # it is dead, and has not read all
        process.stdin.close()  # type: ignore[union-attr]  # a pipe, as above
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()  # type: ignore[union-attr]
