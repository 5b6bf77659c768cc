"""Every wait can be left: by Ctrl-C, a flag, another thread, a fork or the interpreter's end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dsfp4
from dsfp4.errors import Dsfp4Error

CASE = "v3-nvfp4-real"
FOR_EVER = 100  # seconds that nothing here may take: a hang, not a slow machine
SHIM = Path(__file__).parents[1] / "fixtures" / "stalled_disk.cpp"


@pytest.fixture(scope="module")
def folder(random_checkpoint: Callable[[str], Path]) -> Path:
    return random_checkpoint(CASE)


@pytest.fixture(scope="module")
def model(folder: Path) -> dsfp4.Model:
    return dsfp4.Model(folder, threads=1, max_context=256)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + FOR_EVER
    while not condition():
        assert time.monotonic() < end, "waited for ever"
        time.sleep(0.001)


def in_thread(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def joined(thread: threading.Thread) -> None:
    thread.join(FOR_EVER)
    assert not thread.is_alive(), "hangs"


# --- turns ---------------------------------------------------------------------------------------


class Running:
    """A generation in another thread that stays at its first token until it is let go."""

    def __init__(self, model: dsfp4.Model) -> None:
        self.started = threading.Event()
        self.go_on = threading.Event()
        self.waits = False
        self.thread = in_thread(
            lambda: model.generate(range(3, 9), max_tokens=4, stop_ids=[], on_token=self.on_token)
        )
        assert self.started.wait(FOR_EVER)

    def on_token(self, token: int) -> bool:
        self.waits = True
        self.started.set()
        gone_on = self.go_on.wait(FOR_EVER)
        self.waits = False
        assert gone_on
        return True


@pytest.fixture
def running(model: dsfp4.Model) -> Iterator[Running]:
    run = Running(model)
    yield run
    run.go_on.set()
    joined(run.thread)


def test_statistics_while_a_generation_runs(model: dsfp4.Model, running: Running) -> None:
    assert model.stats()["reserved_bytes"] > 0
    assert running.waits


def test_a_queued_generation_can_be_left(model: dsfp4.Model, running: Running) -> None:
    calls: list[tuple[int, int]] = []

    def on_prefill(done: int, total: int) -> bool:
        calls.append((done, total))
        return len(calls) < 3

    result = model.generate(range(3, 9), max_tokens=4, on_prefill=on_prefill)
    assert result.finish_reason == "cancelled"
    assert calls == [(0, 6)] * 3
    assert running.thread.is_alive()


def test_those_that_wait_come_in_order(model: dsfp4.Model) -> None:
    run = Running(model)
    order: list[int] = []
    threads = []
    for number in range(4):
        asked = threading.Event()

        def waits(done: int, total: int, asked: threading.Event = asked) -> bool:
            asked.set()
            return True

        def generate(number: int = number, waits: Any = waits) -> None:
            model.generate(
                [5, 6],
                max_tokens=1,
                stop_ids=[],
                on_prefill=waits,
                on_token=lambda token: order.append(number),
            )

        threads.append(in_thread(generate))
        assert asked.wait(FOR_EVER)
    run.go_on.set()
    for thread in [run.thread, *threads]:
        joined(thread)
    assert order == [0, 1, 2, 3]


def test_a_callback_may_ask_for_statistics_and_nothing_else(model: dsfp4.Model) -> None:
    seen: list[Any] = []

    def on_token(token: int) -> None:
        seen.append(model.stats()["reserved_bytes"])
        for call in (
            lambda: model.generate([5], max_tokens=1),
            lambda: model.forward([5]),
            lambda: model.set_memory_config(expert_threshold=0.0),
        ):
            with pytest.raises(Dsfp4Error, match="a callback called the model"):
                call()

    model.generate([5, 6], max_tokens=2, stop_ids=[], on_token=on_token)
    assert len(seen) == 2


# --- other processes -----------------------------------------------------------------------------


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,  # so that its children end with it
    )


def output(process: subprocess.Popen[str]) -> str:
    try:
        text, _ = process.communicate(timeout=FOR_EVER)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        pytest.fail(f"hangs; it had said: {text}")
    return text


def test_a_forked_child_is_told(folder: Path) -> None:
    code = """
        import os, sys, dsfp4, dsfp4.errors
        model = dsfp4.Model(sys.argv[1], threads=2, max_context=32)
        child = os.fork()
        if child == 0:
            for call in (model.stats, lambda: model.forward([5]),
                         lambda: model.generate([5], max_tokens=1)):
                try:
                    call()
                except dsfp4.errors.Dsfp4Error as error:
                    assert "forked" in str(error), error
                else:
                    os._exit(3)
            del model  # joins no thread of the parent
            own = dsfp4.Model(sys.argv[1], threads=2, max_context=32)
            own.generate([5], max_tokens=2)
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        model.generate([5], max_tokens=2)
        """
    process = run_python(code, folder)
    assert output(process).strip() == "7"
    assert process.returncode == 0


@pytest.mark.parametrize("call", ["generate([5], max_tokens=200, stop_ids=[])", "forward([5]*200)"])
def test_the_interpreter_ends_during_a_call_of_a_daemon_thread(folder: Path, call: str) -> None:
    code = f"""
        import sys, threading, time, dsfp4
        model = dsfp4.Model(sys.argv[1], threads=1, max_context=256)
        begun = threading.Event()
        def work():
            while True:
                begun.set()
                model.{call}
        threading.Thread(target=work, daemon=True).start()
        begun.wait()
        time.sleep(0.05)
        print("ends")
        """
    for _ in range(3):
        process = run_python(code, folder)
        assert "ends" in output(process)
        assert process.returncode == 0


def test_a_thread_that_keeps_a_model_to_the_end_makes_no_noise(folder: Path) -> None:
    code = """
        import sys, threading, dsfp4
        model = dsfp4.Model(sys.argv[1], threads=1, max_context=64)
        keep = lambda model: threading.Event().wait()
        threading.Thread(target=keep, args=(model,), daemon=True).start()
        """
    process = run_python(code, folder)
    assert output(process) == ""
    assert process.returncode == 0


def test_ctrl_c_leaves_a_long_forward(folder: Path) -> None:
    code = """
        import sys, dsfp4
        model = dsfp4.Model(sys.argv[1], threads=1, max_context=128)
        print("loaded", flush=True)
        while True:
            model.forward(range(3, 120), decode=True)
        """
    process = run_python(code, folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "loaded\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in output(process)


def test_ctrl_c_leaves_the_queue(folder: Path) -> None:
    code = """
        import os, signal, sys, threading, dsfp4
        model = dsfp4.Model(sys.argv[1], threads=1, max_context=64)
        started, go_on = threading.Event(), threading.Event()
        def on_token(token):
            started.set()
            go_on.wait()
        first = threading.Thread(
            target=lambda: model.generate([5], max_tokens=1, stop_ids=[], on_token=on_token))
        first.start()
        started.wait()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            model.generate([5], max_tokens=1)
        except KeyboardInterrupt:
            print("left")
        go_on.set()
        first.join()
        """
    assert "left" in output(run_python(code, folder))


# --- a disk that does not answer -----------------------------------------------------------------


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "stalled_disk.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, SHIM], check=True)
    return library


class Stall:
    """A disk that answers no read of a shard while it is `on()`."""

    def __init__(self, shim: Path, folder: Path) -> None:
        self.flag = folder / "stall"
        self.mark = folder / "stalled"
        # A sanitizer's runtime must come first; its pread() goes on to this one.
        preload = f"{os.environ.get('LD_PRELOAD', '')} {shim}".strip()
        self.environment = {
            "LD_PRELOAD": preload,
            "STALL_WHILE": str(self.flag),
            "STALLED_MARK": str(self.mark),
        }

    def on(self) -> None:
        self.flag.touch()

    def wait_for_it(self) -> None:
        until(self.mark.exists)


@pytest.fixture
def stall(shim: Path, tmp_path: Path) -> Iterator[Stall]:
    stall = Stall(shim, tmp_path)
    yield stall
    stall.flag.unlink(missing_ok=True)


def test_ctrl_c_leaves_a_load(folder: Path, stall: Stall) -> None:
    code = """
        import sys, dsfp4
        dsfp4.Model(sys.argv[1], threads=1, max_context=32, reader="pread")
        """
    stall.on()
    process = run_python(code, folder, **stall.environment)
    stall.wait_for_it()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in output(process)
    assert stall.flag.exists()  # the disk has not answered since


TIERED = """
    import os, signal, sys, threading, time, dsfp4
    from pathlib import Path
    stall, mark = Path(os.environ["STALL_WHILE"]), Path(os.environ["STALLED_MARK"])
    model = dsfp4.Model(sys.argv[1], threads=1, max_context=32, reader="pread", cpu_cache_size=0,
                        warm_start=False)
    stall.touch()
"""


def with_a_tiered_model(code: str) -> str:
    return textwrap.dedent(TIERED) + textwrap.dedent(code)


def test_ctrl_c_leaves_a_generation(folder: Path, stall: Stall) -> None:
    code = """
    model.generate([5], max_tokens=4)
    """
    process = run_python(with_a_tiered_model(code), folder, **stall.environment)
    stall.wait_for_it()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in output(process)
    assert stall.flag.exists()


def test_a_model_goes_while_a_read_stalls(folder: Path, stall: Stall) -> None:
    code = """
    def interrupt():
        while not mark.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    try:
        model.generate([5], max_tokens=4)
    except KeyboardInterrupt:
        pass
    del model
    print("gone", stall.exists())
    """
    assert "gone True" in output(run_python(with_a_tiered_model(code), folder, **stall.environment))


def test_other_threads_run_while_a_model_goes(folder: Path, stall: Stall) -> None:
    code = """
    def end_it():
        while not mark.exists():
            time.sleep(0.001)
        stall.unlink()
    threading.Thread(target=end_it).start()
    del model  # closes its files, which takes as long as the disk stalls
    print("gone")
    """
    environment = {**stall.environment, "STALL_CLOSE": "1"}
    assert "gone" in output(run_python(with_a_tiered_model(code), folder, **environment))
