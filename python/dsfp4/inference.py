"""DeepseekInference: text in, text out."""

import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np
import numpy.typing as npt

from dsfp4.chat import ChatTemplate
from dsfp4.demo import resolve_model
from dsfp4.errors import Dsfp4Error, ParameterError, UnsupportedError
from dsfp4.inference_options import Memory, Options
from dsfp4.messages import Message
from dsfp4.model import Model, Progress, check_integers
from dsfp4.sampling import recommended_sampling
from dsfp4.stop import check_stop
from dsfp4.stream import Put, TextStream, end_generations
from dsfp4.text import Text, TextBuilder
from dsfp4.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DeepseekInference:
    """A checkpoint with its tokenizer, ready to write text.

    `model_path` is a checkpoint folder, "org/name" or "org/name@revision" for a repository in the
    Hub's cache (`dsfp4 pull`), or "demo". `device` "auto" is the fastest backend present;
    `threads` 0 is one for each core; `max_context` is in tokens, 0 is the model's own limit, or
    less where its KV cache would take over an eighth of the memory;
    `kv_cache_dtype` is "bf16", or "fp8" for half the memory and a little less precision;
    `memory_limit` is the most VRAM in GB (10^9 bytes), everything included, and None is what is
    free; `ram_limit` is the most RAM of this process in GB, None what the machine can spare;
    `progress` is called with the bytes loaded and the bytes in all. For a model that does not fit,
    `cpu_cache_size`, `prefetch_size` and `gpu_reserved` in GB, `max_experts`, `max_gpu_layers`,
    `min_layers`, `prefetch_layers`, `expert_threshold`, `cpu_share`, `quantization`,
    `cache_policy`, `warm_start`, `reader` and `direct_reads` are those of Model, and so is `trace`.
    Raises the errors of `dsfp4.errors`. May be used by several threads: generations run one after
    the other. Is a context manager.

    generate() and chat() take these options:

    - `max_tokens`, 1 or more: the most tokens to write, thoughts included.
    - `temperature`, 0 to 100: 0 takes the likeliest token. None is the checkpoint's recommendation,
      as it is for the next two.
    - `top_k`, 0 or more: only so many likeliest tokens; 0 is off.
    - `top_p`, over 0, to 1: only the likeliest tokens that make up this probability; 1 is off.
    - `min_p`, 0 to 1: only tokens with this share of the likeliest one's probability; 0 is off.
    - `repetition_penalty`, over 0: above 1, tokens of prompt and answer become less likely again;
      1 is off.
    - `logit_bias`: for single ids, what is added to their logits; -inf forbids one.
    - `logprobs`, 0 to 20: `Text.logprobs` has each token's log probability and so many likeliest
      tokens; 0 is off.
    - `seed`, 0 to 2^64 - 1: the same seed gives the same text. None is a new one each time.
    - `stop`: a string or several. The answer ends before the first one; thoughts and tool calls
      do not.
    - `stop_ids`: ids that end the text, in place of the model's own end ids; [] is none.
    - `thinking`: True or False switches the model's thoughts on or off, where its chat template
      can; None is the template's choice.
    - `stream`: return at once an iterator of pieces, each a string with `kind` "reasoning",
      "answer" or "tool_call"; its `result` is the Text in the end.

    An answer is a Text: a string, with `reasoning`, `tool_calls`, `finish_reason`, `tokens` and
    times beside.
    Ctrl-C stops a generation, and leaves the object usable.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        device: str = "auto",
        *,
        threads: int = 0,
        max_context: int = 0,
        kv_cache_dtype: str = "bf16",
        memory_limit: float | None = None,
        ram_limit: float | None = None,
        progress: Progress | None = None,
        **memory: "Unpack[Memory]",
    ) -> None:
        self.folder = resolve_model(model_path)
        self.tokenizer = Tokenizer(self.folder)
        self._recommended = recommended_sampling(self.folder)
        self._model: Model | None = Model(
            self.folder,
            device,
            threads=threads,
            max_context=max_context,
            kv_cache_dtype=kv_cache_dtype,
            memory_limit=memory_limit,
            ram_limit=ram_limit,
            progress=progress,
            **memory,
        )
        self._group = object()  # of its generations
        self._template_lock = threading.Lock()
        self._template: ChatTemplate | UnsupportedError | None = None  # None: not looked for yet

    @property
    def model(self) -> Model:
        """The loaded model. Raises Dsfp4Error after close()."""
        if self._model is None:
            raise Dsfp4Error("this DeepseekInference is closed; make a new one")
        return self._model

    def set_memory_config(
        self,
        *,
        prefetch_layers: int | Literal["auto"] | None = None,
        expert_threshold: float | None = None,
        cpu_share: float | Literal["auto"] | None = None,
    ) -> None:
        """Change how experts are read and computed; see Model.set_memory_config()."""
        self.model.set_memory_config(
            prefetch_layers=prefetch_layers, expert_threshold=expert_threshold, cpu_share=cpu_share
        )

    def set_memory_strategy(self, strategy: Mapping[str, float]) -> None:
        """Change where RAM and VRAM go; see Model.set_memory_strategy()."""
        self.model.set_memory_strategy(strategy)

    def set_compute_streams(self, streams: Mapping[str, bool]) -> None:
        """Switch overlap of stages on or off; see Model.set_compute_streams()."""
        self.model.set_compute_streams(streams)

    def stats(self) -> dict[str, Any]:
        """Return what was counted since loading; see Model.stats()."""
        return self.model.stats()

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template, or None. Raises CheckpointError if it is malformed."""
        template = self._find_template()
        return template if isinstance(template, ChatTemplate) else None

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | npt.NDArray[np.integer[Any]],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        raw: bool = False,
        stream: Literal[False] = False,
        **options: "Unpack[Options]",
    ) -> Text: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int] | npt.NDArray[np.integer[Any]],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        raw: bool = False,
        stream: Literal[True],
        **options: "Unpack[Options]",
    ) -> TextStream: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        raw: bool = False,
        stream: Literal[False] = False,
        **options: "Unpack[Options]",
    ) -> list[Text]: ...
    def generate(
        self,
        prompt: str | Sequence[int] | npt.NDArray[np.integer[Any]] | list[str],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] | None = None,
        thinking: bool | None = None,
        raw: bool = False,
        stream: bool = False,
    ) -> Text | TextStream | list[Text]:
        """Answer `prompt`, or each of a list of prompts.

        A string is a user's turn, where the checkpoint has a chat template. With `raw`, or without
        a template, it is continued as it stands, with the begin token in front where the checkpoint
        wants one. A sequence of ids is continued as it is. The class describes the other options;
        a list cannot be streamed.
        """
        if isinstance(prompt, list) and any(isinstance(item, str) for item in prompt):
            if stream:
                raise ParameterError(
                    "a list of prompts cannot be streamed; stream them one by one",
                    parameter="stream",
                )
            prompts = [
                self._prompt(_check_prompt(item, i), raw, thinking) for i, item in enumerate(prompt)
            ]
        else:
            prompts = [self._prompt(prompt, raw, thinking)]
        start = self._starter(
            stop,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            logit_bias=logit_bias,
            logprobs=logprobs,
            seed=seed,
            stop_ids=stop_ids,
        )
        if stream:
            return start(*prompts[0])
        texts = [_whole(start(*item)) for item in prompts]
        return texts if isinstance(prompt, list) and isinstance(prompt[0], str) else texts[0]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
        stream: Literal[False] = False,
        **options: "Unpack[Options]",
    ) -> Text: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
        stream: Literal[True],
        **options: "Unpack[Options]",
    ) -> TextStream: ...
    def chat(
        self,
        messages: Sequence[Message],
        max_tokens: int = 256,
        temperature: float | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int = 0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] | None = None,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
        stream: bool = False,
    ) -> Text | TextStream:
        """Write the assistant's next turn of a conversation.

        `messages` are mappings with "role" ("system", "user", "assistant", "tool", "developer") and
        "content", a string or a list of parts of type "text"; nothing in them can become markup. An
        assistant's `tool_calls` are as Text.as_message() gives them; their arguments may be
        mappings, too. `tools` are JSON schemas, and `template_options` further variables, where the
        chat template knows them; "enable_thinking" and "thinking_mode" mean what `thinking` does.
        With `continue_last` the last message, an assistant's, is not a turn that has ended: the
        Text is what comes behind its content, or behind its `reasoning_content` if that is all it
        has. The class describes the other options. Raises ParameterError naming messages[i], and
        UnsupportedError if the checkpoint has no chat template.
        """
        _ = self.model  # raises if closed
        template = self._find_template()
        if isinstance(template, UnsupportedError):
            raise template
        prompt = template.prompt(
            messages,
            tools=tools,
            thinking=thinking,
            options=template_options,
            continue_last=continue_last,
        )
        start = self._starter(
            stop,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            logit_bias=logit_bias,
            logprobs=logprobs,
            seed=seed,
            stop_ids=stop_ids,
        )
        ids = check_integers("messages", prompt.ids)
        pieces = start(ids, prompt.thinking, prompt.continued)
        return pieces if stream else _whole(pieces)

    def close(self) -> None:
        """Cancel what runs, wait for it to end and free the weights. May be called twice.

        The wait is for one step of the model; Ctrl-C leaves it. A generate() or chat() that another
        thread waits for raises Dsfp4Error there; a stream ends.
        """
        self._model = None  # first: what starts from now on sees it and ends
        try:
            end_generations(self._group)
        finally:
            if isinstance(self._template, ChatTemplate):
                self._template.close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError(
            "a DeepseekInference cannot be copied or pickled; load it once in each process"
        )

    def __enter__(self) -> "DeepseekInference":
        """Return the object itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self.close()

    def _find_template(self) -> ChatTemplate | UnsupportedError:
        with self._template_lock:
            if self._template is None:
                try:
                    self._template = ChatTemplate(self.folder, self.tokenizer)
                except UnsupportedError as error:
                    self._template = error
            return self._template

    def _prompt(
        self, prompt: Any, raw: bool, thinking: bool | None
    ) -> tuple[npt.NDArray[np.int64], bool | None]:
        """Return the ids of `prompt` and whether they end in thoughts; None if it is no turn."""
        _ = self.model  # raises if closed
        is_text = isinstance(prompt, str)
        if is_text and not raw and (template := self.chat_template) is not None:
            turn = template.prompt([{"role": "user", "content": prompt}], thinking=thinking)
            return check_integers("prompt", turn.ids), turn.thinking
        if thinking is not None:
            raise ParameterError(
                "thinking needs a chat template, and a prompt that is a user's turn; leave it at "
                "None",
                parameter="thinking",
            )
        ids = self.tokenizer.encode_prompt(prompt) if is_text else prompt
        checked = check_integers("prompt", ids)
        if checked.size == 0:
            raise ParameterError("prompt is empty; give some text", parameter="prompt")
        return checked, None

    def _starter(
        self,
        stop: str | Sequence[str] | None,
        *,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int | None,
        **options: Any,
    ) -> Callable[..., TextStream]:
        """Return a function that starts a generation from ids, with the given options."""
        model = self.model
        default = self._recommended
        strings = check_stop(stop)

        def start(
            ids: npt.NDArray[np.int64], thinking: bool | None, continued: bool = False
        ) -> TextStream:
            def run(put: Put) -> Text:
                builder = TextBuilder(self.tokenizer, thinking, strings, continued)

                def on_token(id: int) -> bool:
                    return put(*builder.push(id)) and not builder.stopped

                result = model.generate(
                    ids,
                    temperature=default.temperature if temperature is None else temperature,
                    top_k=default.top_k if top_k is None else top_k,
                    top_p=default.top_p if top_p is None else top_p,
                    seed=secrets.randbits(64) if seed is None else seed,
                    on_token=on_token,
                    on_prefill=lambda done, total: put(),
                    **options,
                )
                put(*builder.finish())
                return builder.text(result)

            stream = TextStream(run, self._group)
            if self._model is None:  # close() was called meanwhile, and may not have seen it
                stream.cancel()
            return stream

        return start


def _check_prompt(prompt: Any, index: int) -> str:
    if not isinstance(prompt, str):
        raise ParameterError(
            f"prompt[{index}] must be a string as others are, not {type(prompt).__name__}",
            parameter="prompt",
        )
    return prompt


def _whole(stream: TextStream) -> Text:
    """Wait for the end of `stream`, which nobody else can cancel but close()."""
    try:
        for _ in stream:
            pass
    except BaseException:
        stream.cancel()  # Ctrl-C may come between two pieces
        raise
    stream.close()
    if stream.result is None or stream.result.finish_reason == "cancelled":
        raise Dsfp4Error(
            "this DeepseekInference was closed during the generation; make a new one, and close it "
            "when all threads have their answers"
        )
    return stream.result
