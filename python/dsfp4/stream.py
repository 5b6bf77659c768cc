"""Generation in a thread of its own, its text handed over piece by piece."""

import threading
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Protocol

from dsfp4.text import Piece, Text


class Put(Protocol):
    """Hands over the next pieces, if any; False asks for the end."""

    def __call__(self, *pieces: Piece) -> bool:
        """Hand over."""


class TextStream(Iterator[Piece]):
    """The text of one generation, as it is made: pieces of reasoning, then pieces of the answer.

    `generate` is run at once in a worker thread; it puts the pieces and returns the whole. An error
    of the worker is raised to whoever iterates. Ending early, by close(), by leaving a `with`
    block, by Ctrl-C or by forgetting the stream, cancels the generation within one token. Not to
    be iterated by two threads at once.
    """

    def __init__(self, generate: Callable[[Put], Text]) -> None:
        self._channel = _Channel()
        worker = threading.Thread(
            target=self._channel.work, args=(generate,), name="dsfp4-generate", daemon=True
        )
        # Also runs when the stream is forgotten and, before threads are torn down, at exit.
        self._stop = weakref.finalize(self, _cancel, self._channel, worker)
        self._pieces = self._channel.pieces()
        try:
            worker.start()
        except BaseException:  # Ctrl-C, as start() waits for the thread to run
            self.close()
            raise

    @property
    def result(self) -> Text | None:
        """The whole answer with reasoning, ids and times; None while it runs or if it failed."""
        return self._channel.result

    def __next__(self) -> Piece:
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
        self.result: Text | None = None
        self.cancelled = threading.Event()
        self._items: SimpleQueue[Piece | BaseException | None] = SimpleQueue()  # None: the end

    def work(self, generate: Callable[[Put], Text]) -> None:
        try:
            self.result = generate(self._put)
            self._items.put(None)
        except BaseException as error:
            self._items.put(error)

    def _put(self, *pieces: Piece) -> bool:
        for piece in pieces:
            self._items.put(piece)
        return not self.cancelled.is_set()

    def pieces(self) -> Iterator[Piece]:
        while (item := self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


def _cancel(channel: _Channel, worker: threading.Thread) -> None:
    channel.cancelled.set()
    # The collector may run this anywhere, in the worker too.
    if worker.is_alive() and worker is not threading.current_thread():
        worker.join()
