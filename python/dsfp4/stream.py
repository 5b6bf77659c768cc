"""Generation in a thread of its own, its text handed over piece by piece."""

import atexit
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import NoReturn, Protocol

from dsfp4.errors import Dsfp4Error
from dsfp4.text import Piece, Text

# Seconds. A Ctrl-C that comes just before a wait begins does not end it; it is seen after this.
_LONGEST_WAIT = 0.2


class Put(Protocol):
    """Hands over the next pieces, if any; False asks for the end."""

    def __call__(self, *pieces: Piece) -> bool:
        """Hand over."""


class TextStream(Iterator[Piece]):
    """The text of one generation, as it is made: reasoning, then the answer with its tool calls.

    `generate` is run at once in a worker thread; it puts the pieces and returns the whole. An error
    of the worker is raised to whoever iterates. Ending early, by cancel(), by close(), by leaving a
    `with` block, by Ctrl-C or by forgetting the stream, cancels the generation within one token.
    Only close() and leaving a `with` block wait for that. Not to be iterated by two threads at
    once, copied or pickled. `group` is what end_generations() knows it by.
    """

    def __init__(self, generate: Callable[[Put], Text], group: object = None) -> None:
        self._generation = _Generation(generate, group)
        self._pieces = self._generation.pieces()
        self._generation.start()

    @property
    def result(self) -> Text | None:
        """The whole answer with reasoning, ids and times; None while it runs or if it failed."""
        return self._generation.result

    def __next__(self) -> Piece:
        """Wait for the next piece."""
        try:
            return next(self._pieces)
        except StopIteration:
            raise
        except BaseException:  # Ctrl-C leaves at once: the worker may be amid a long step
            self.cancel()
            self._pieces = iter(())
            raise

    def cancel(self) -> None:
        """Ask for the end, from any thread, and do not wait; the pieces made so far stay."""
        self._generation.cancel()

    def close(self) -> None:
        """Cancel what still runs and wait for it to end; the iterator is then exhausted.

        The wait is for one step of the model. Ctrl-C leaves it, and nothing waits there again.
        """
        self._generation.close()

    def __enter__(self) -> "TextStream":
        """Return the stream itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the stream."""
        self.close()

    def __del__(self) -> None:
        """Cancel without a wait: the collector runs this on any thread, with any lock held."""
        if hasattr(self, "_generation"):
            self.cancel()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError("a TextStream cannot be copied or pickled; its result can")


def end_generations(group: object = None) -> None:
    """Cancel all generations of `group`, or of the process, then wait for them.

    All are cancelled before any is waited for, as they take turns.
    """
    generations = [one for one in _running.copy() if group is None or one.group is group]
    for generation in generations:
        generation.cancel()
    for generation in generations:
        generation.close()


class _Generation:
    """What a stream and its worker share; it must not refer to the stream."""

    def __init__(self, generate: Callable[[Put], Text], group: object) -> None:
        self.group = group
        self.result: Text | None = None
        self._items: SimpleQueue[Piece | BaseException | None] = SimpleQueue()  # None: the end
        self._cancelled = False  # no Event: the collector may set it while any lock is held
        self._closed = False
        self._ended = False
        self._given_up = False  # somebody has interrupted the wait for the end
        self._worker = threading.Thread(
            target=self._work, args=(generate,), name="dsfp4-generate", daemon=True
        )

    def start(self) -> None:
        """Start the worker. Raises Dsfp4Error if there is no thread to be had."""
        try:
            self._worker.start()
        except RuntimeError as error:
            raise Dsfp4Error(
                f"cannot start a thread for the generation: {error}; end some, or raise the limit"
            ) from error
        except BaseException:  # Ctrl-C, as start() waits for the thread to run
            self.cancel()
            raise
        _running.add(self)
        if self._ended:  # before it was added
            _running.discard(self)

    def cancel(self) -> None:
        """Ask for the end and do not wait."""
        self._cancelled = True

    def close(self) -> None:
        """Cancel, drop the pieces that are left and wait for the end.

        Who interrupts the wait does not want it at the next call either.
        """
        try:
            self._cancelled = self._closed = True
            if not self._given_up and self._worker is not threading.current_thread():
                while self._worker.is_alive():
                    self._worker.join(_LONGEST_WAIT)
        except BaseException:
            self._given_up = True
            raise

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces as they are made, until close(); raises the worker's error."""
        while not self._closed:
            try:
                item = self._items.get(timeout=_LONGEST_WAIT)
            except Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _work(self, generate: Callable[[Put], Text]) -> None:
        try:
            self.result = generate(self._put)
            self._items.put(None)
        except BaseException as error:
            self._items.put(error)
        self._ended = True
        _running.discard(self)

    def _put(self, *pieces: Piece) -> bool:
        for piece in pieces:
            self._items.put(piece)
        return not self._cancelled


_running: set[_Generation] = set()

# No worker may run on while the interpreter is torn down.
atexit.register(end_generations)
