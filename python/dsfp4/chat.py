"""Chat templates: a conversation to the prompt that the model was trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsfp4.errors import CheckpointError, UnsupportedError
from dsfp4.jsonfile import read_optional_json
from dsfp4.tokenizer import Tokenizer

Message = Mapping[str, str]  # {"role": "user", "content": "..."}


class ChatTemplate:
    """The Jinja template of the checkpoint in `folder`, rendered in a sandbox.

    Raises UnsupportedError if the checkpoint has none, CheckpointError if it is malformed.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        path = folder / "tokenizer_config.json"
        source = read_optional_json(path).get("chat_template")
        if not isinstance(source, str):
            raise UnsupportedError(
                f"'{path}' has no chat_template; give the prompt as raw text instead"
            )
        self._path = path
        self._tokens = {
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
        }
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise self._malformed(error) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt, begin token included, that asks for the next assistant turn."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except jinja2.TemplateError as error:
            raise self._malformed(error) from error

    def _malformed(self, error: jinja2.TemplateError) -> CheckpointError:
        return CheckpointError(
            f"chat_template in '{self._path}' is malformed: {error}",
            file=str(self._path),
            tensor="chat_template",
        )
