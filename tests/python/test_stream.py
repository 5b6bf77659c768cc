"""TextStream on generators made for the purpose: order, errors, and every way to stop early."""

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dsfp4.errors import Dsfp4Error
from dsfp4.stream import Put, TextStream, end_generations
from dsfp4.text import Piece

DEADLINE = 60.0  # seconds; only reached when something is broken


def piece(text: str) -> Piece:
    return Piece(text, "answer")


class Endless:
    """Generates until it is cancelled, and says that it ended."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def __call__(self, put: Put) -> Any:
        while put(piece("x")):
            pass
        self.ended.set()
        return "cancelled"


def test_pieces_come_in_order_and_then_the_result() -> None:
    def generate(put: Put) -> Any:
        assert all(put(piece(character)) for character in "abc")
        return "result"

    stream = TextStream(generate)
    assert list(stream) == ["a", "b", "c"]
    assert stream.result == "result"
    assert list(stream) == []


def test_an_error_reaches_the_consumer_after_the_text_before_it() -> None:
    def generate(put: Put) -> Any:
        put(piece("a"))
        raise RuntimeError("broken")

    stream = TextStream(generate)
    assert next(stream) == "a"
    with pytest.raises(RuntimeError, match="broken"):
        next(stream)
    assert list(stream) == []
    assert stream.result is None


def test_the_worker_does_not_wait_for_the_consumer() -> None:
    finished = threading.Event()

    def generate(put: Put) -> Any:
        for _ in range(10_000):
            put(piece("x"))
        finished.set()

    stream = TextStream(generate)
    assert finished.wait(DEADLINE)
    assert len("".join(stream)) == 10_000


def _close(stream: TextStream) -> None:
    stream.close()
    stream.close()


def _leave_with_block(stream: TextStream) -> None:
    with stream:
        pass


@pytest.mark.parametrize("stop", [_close, _leave_with_block])
def test_stopping_early_cancels_and_waits(stop: Callable[[TextStream], None]) -> None:
    generate = Endless()
    stream = TextStream(generate)
    assert next(stream) == "x"
    stop(stream)
    assert generate.ended.is_set()
    assert stream.result == "cancelled"
    assert list(stream) == []


def test_cancelling_does_not_wait_and_keeps_the_pieces() -> None:
    go_on = threading.Event()

    def generate(put: Put) -> Any:
        put(piece("a"))
        assert go_on.wait(DEADLINE)
        return "cancelled" if not put() else "all"

    stream = TextStream(generate)
    stream.cancel()
    assert stream.result is None
    go_on.set()
    assert list(stream) == ["a"]
    assert stream.result == "cancelled"


def test_a_forgotten_stream_is_cancelled() -> None:
    generate = Endless()
    stream = TextStream(generate)
    next(stream)
    del stream
    gc.collect()
    assert generate.ended.wait(DEADLINE)


def test_a_forgotten_stream_is_not_waited_for() -> None:
    # The collector may find it on the thread that its worker waits for.
    turn = threading.Lock()
    ended = threading.Event()

    def generate(put: Put) -> Any:
        with turn:
            ended.set()

    def forget() -> None:
        with turn:
            stream: Any = TextStream(generate)
            stream.itself = stream  # only the collector finds it
            del stream
            gc.collect()

    thread = threading.Thread(target=forget, daemon=True)
    thread.start()
    assert ended.wait(DEADLINE)


def test_all_of_a_group_are_cancelled_before_any_is_waited_for() -> None:
    # They take turns: the first to be waited for may need the end of another.
    others = [threading.Event(), threading.Event()]

    def generation(own: threading.Event, other: threading.Event) -> Callable[[Put], Any]:
        def generate(put: Put) -> Any:
            while put():
                pass
            own.set()
            assert other.wait(DEADLINE)

        return generate

    group, outsider = object(), Endless()
    with TextStream(outsider) as stays:
        streams = [TextStream(generation(*pair), group) for pair in (others, others[::-1])]
        end_generations(group)
        assert [stream.result for stream in streams] == [None, None]
        assert all(event.is_set() for event in others)
        assert [list(stream) for stream in streams] == [[], []]
        next(stays)
        assert not outsider.ended.is_set()


def test_a_thread_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(Dsfp4Error, match="can't start new thread"):
        TextStream(Endless())


def test_ctrl_c_cancels() -> None:
    generate = Endless()
    stream = TextStream(generate)
    pieces = 0
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pieces += 1
            if pieces == 3:
                threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
    stream.close()
    assert generate.ended.is_set()
    assert pieces >= 3


def test_ctrl_c_while_waiting_for_the_first_piece() -> None:
    cancelled = threading.Event()

    def generate(put: Put) -> Any:
        os.kill(os.getpid(), signal.SIGINT)  # as if pressed during the prefill
        while put():
            pass
        cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        for _ in TextStream(generate):
            pass
    assert cancelled.wait(DEADLINE)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_leaves_in_the_midst_of_a_step() -> None:
    started, step_ended = threading.Event(), threading.Event()

    def generate(put: Put) -> Any:
        assert started.wait(DEADLINE)
        press_ctrl_c()
        assert step_ended.wait(DEADLINE)
        return "the step was waited for by nobody"

    stream = TextStream(generate)
    with pytest.raises(KeyboardInterrupt):
        started.set()
        next(stream)
    step_ended.set()
    stream.close()
    assert stream.result == "the step was waited for by nobody"


def test_ctrl_c_leaves_the_wait_for_the_end_and_nothing_waits_again() -> None:
    step_ended = threading.Event()

    def generate(put: Put) -> Any:
        while put():
            pass
        press_ctrl_c()  # close() was called
        assert step_ended.wait(DEADLINE)

    stream = TextStream(generate)
    with pytest.raises(KeyboardInterrupt):
        stream.close()
    stream.close()
    assert stream.result is None
    step_ended.set()


def test_an_open_stream_does_not_hold_up_the_end_of_the_program() -> None:
    program = (
        "from dsfp4.stream import TextStream\n"
        "from dsfp4.text import Piece\n"
        "def generate(put):\n"
        "    while put(Piece('x', 'answer')): pass\n"
        "stream = TextStream(generate)\n"
        "print(next(stream))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")
