"""The core's messages reach Python's logging."""

import logging
import signal
import subprocess
import sys

import pytest

from dsfp4 import _core


def test_a_message_reaches_the_logger(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG, logger="dsfp4"):
        _core.log_warning("100 %s slower: größer")
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("dsfp4", "WARNING", "100 %s slower: größer")
    ]


def test_unset_logging_prints_warnings_once_on_stderr():
    code = "from dsfp4 import _core; _core.log_warning('plain words')"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("", "plain words\n")


def test_a_handler_that_raises_does_no_harm(monkeypatch: pytest.MonkeyPatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)

    class Bad(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("from the handler")

    handler = Bad()
    logging.getLogger("dsfp4").addHandler(handler)
    try:
        _core.log_warning("a message")
    finally:
        logging.getLogger("dsfp4").removeHandler(handler)
    assert [str(event.exc_value) for event in heard] == ["from the handler"]


def test_ctrl_c_in_a_handler_is_not_lost():
    class Interrupted(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            signal.raise_signal(signal.SIGINT)

    handler = Interrupted()
    logging.getLogger("dsfp4").addHandler(handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _core.log_warning("a message")
    finally:
        logging.getLogger("dsfp4").removeHandler(handler)
