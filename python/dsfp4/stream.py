"""Generation in a thread of its own, its text handed over piece by piece."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsfp4 import _core

OnToken = Callable[[int], bool]


class TextStream(Iterator[str]):
    """The text of one generation, as it is made.

    `generate` is run at once in a worker thread, with a callback for each id; `decode` turns ids
    into text. An error of the worker is raised to whoever iterates. Ending early, by close(), by
    leaving a `with` block, by Ctrl-C or by forgetting the stream, cancels the generation within one
    token. Not to be iterated by two threads at once.
    """

    def __init__(
        self,
        generate: Callable[[OnToken], "_core.GenerationResult"],
        decode: Callable[[Iterable[int]], Iterator[str]],
    ) -> None:
        self._channel = _Channel()
        worker = threading.Thread(
            target=self._channel.work, args=(generate,), name="dsfp4-generate", daemon=True
        )
        # Also runs when the stream is forgotten and, before threads are torn down, at exit.
        self._stop = weakref.finalize(self, _cancel, self._channel, worker)
        self._pieces = decode(self._channel.ids())
        try:
            worker.start()
        except BaseException:  # Ctrl-C, as start() waits for the thread to run
            self.close()
            raise

    @property
    def result(self) -> "_core.GenerationResult | None":
        """Ids, times and the reason of the end; None while it runs or if it failed."""
        return self._channel.result

    def __next__(self) -> str:
        """Wait for the next piece."""
        try:
            return next(self._pieces)
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel what still runs and wait for it to end; the iterator is then exhausted."""
        self._stop()
        self._pieces = iter(())

    def __enter__(self) -> "TextStream":
        """Return the stream itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the stream."""
        self.close()


class _Channel:
    """What the worker and the stream share; it must not refer to the stream."""

    def __init__(self) -> None:
        self.result: _core.GenerationResult | None = None
        self.cancelled = threading.Event()
        self._items: SimpleQueue[int | BaseException | None] = SimpleQueue()  # None: the end

    def work(self, generate: Callable[[OnToken], "_core.GenerationResult"]) -> None:
        try:
            self.result = generate(self._on_token)
            self._items.put(None)
        except BaseException as error:
            self._items.put(error)

    def _on_token(self, id: int) -> bool:
        self._items.put(id)
        return not self.cancelled.is_set()

    def ids(self) -> Iterator[int]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def _cancel(channel: _Channel, worker: threading.Thread) -> None:
    channel.cancelled.set()
    # The collector may run this anywhere, in the worker too.
    if worker.is_alive() and worker is not threading.current_thread():
        worker.join()
