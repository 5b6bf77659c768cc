"""DeepseekInference: text in, text out."""

import os
import secrets
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from dsfp4.demo import resolve_model
from dsfp4.errors import Dsfp4Error, ParameterError
from dsfp4.model import Model, Progress, check_integers
from dsfp4.sampling import recommended_sampling
from dsfp4.stream import OnToken, TextStream
from dsfp4.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsfp4 import _core


class DeepseekInference:
    """A checkpoint with its tokenizer, ready to write text.

    `model_path` is a checkpoint folder or "demo". `device` "auto" is the fastest backend present;
    `threads` 0 is one for each core; `max_context` is in tokens, 0 is the model's own limit;
    `progress` is called with the bytes loaded and the bytes in all. Raises the errors of
    `dsfp4.errors`. May be used by several threads: generations run one after the other. Is a
    context manager.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        device: str = "auto",
        *,
        threads: int = 0,
        max_context: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.folder = resolve_model(model_path)
        self.tokenizer = Tokenizer(self.folder)
        self._recommended = recommended_sampling(self.folder)
        self._model: Model | None = Model(
            self.folder, device, threads=threads, max_context=max_context, progress=progress
        )
        self._streams: weakref.WeakSet[TextStream] = weakref.WeakSet()

    @property
    def model(self) -> Model:
        """The loaded model. Raises Dsfp4Error after close()."""
        if self._model is None:
            raise Dsfp4Error("this DeepseekInference is closed; make a new one")
        return self._model

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stream: Literal[False] = False,
    ) -> str: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stream: Literal[True],
    ) -> TextStream: ...
    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stream: bool = False,
    ) -> str | TextStream:
        """Continue `prompt` by up to `max_tokens` tokens and return the new text.

        A string is continued as it stands, with the begin token in front where the checkpoint
        wants one; a sequence of ids is used as it is. `temperature` 0 takes the likeliest token;
        `top_k` 0 and `top_p` 1 are off; each of the three is the checkpoint's recommendation unless
        given. The same `seed`, 0 to 2^64 - 1, gives the same text; None is a new one each time.
        With `stream`, returns at once an iterator over the pieces of the text. Ctrl-C cancels.
        """
        model = self.model
        ids = self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        checked_ids = check_integers("prompt", ids)
        if checked_ids.size == 0:
            raise ParameterError("prompt is empty; give some text", parameter="prompt")
        default = self._recommended

        def run(on_token: OnToken) -> "_core.GenerationResult":
            return model.generate(
                checked_ids,
                max_tokens=max_tokens,
                temperature=default.temperature if temperature is None else temperature,
                top_k=default.top_k if top_k is None else top_k,
                top_p=default.top_p if top_p is None else top_p,
                seed=secrets.randbits(64) if seed is None else seed,
                on_token=on_token,
            )

        pieces = TextStream(run, self.tokenizer.decode_pieces)
        self._streams.add(pieces)
        if stream:
            return pieces
        with pieces:
            return "".join(pieces)

    def close(self) -> None:
        """Cancel what runs and free the weights. May be called twice."""
        for stream in list(self._streams):
            stream.close()
        self._model = None

    def __enter__(self) -> "DeepseekInference":
        """Return the object itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self.close()
