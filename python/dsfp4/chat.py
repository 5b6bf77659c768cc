"""Chat templates: a conversation to the prompt that the model was trained on."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsfp4.errors import CheckpointError, ParameterError, UnsupportedError
from dsfp4.files import read_checkpoint_file
from dsfp4.jsonfile import read_optional_json
from dsfp4.markup import Disguise
from dsfp4.template_process import TemplateProcess
from dsfp4.tokenizer import THINK_START, Tokenizer

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_NESTED = 64


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation. `thinking` tells whether it ends inside the model's thoughts."""

    text: str
    ids: list[int]
    thinking: bool


class ChatTemplate:
    """The Jinja template of the checkpoint in `folder`, rendered in a sandbox.

    It is chat_template.jinja, or `chat_template` in tokenizer_config.json: a string, or a list of
    named ones, of which "tool_use" serves conversations with tools, and "default" all others. It
    may be used by several threads. Raises UnsupportedError if the checkpoint has none,
    CheckpointError if it is malformed.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        path, sources = _read_templates(folder)
        self._tokenizer = tokenizer
        self._sources = sources
        self._processes = {name: TemplateProcess(source, path) for name, source in sources.items()}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the text of the prompt; see prompt()."""
        return self.prompt(messages, add_generation_prompt=add_generation_prompt).text

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> ChatPrompt:
        """Return the prompt, begin token included, that asks for the next assistant turn.

        `messages` are mappings with "role", one of ROLES, and "content", a string, or None where an
        assistant only calls tools; other fields are the template's to know. `tools` are JSON
        schemas. `thinking` switches the model's thoughts on or off where the template knows how;
        None is the template's own choice. No text in them can become markup. Raises ParameterError
        for messages that are malformed or that the template refuses, and for a switch that it has
        not; CheckpointError where the template fails or takes too long.
        """
        conversation: dict[str, Any] = {"messages": check_messages(messages)}
        if tools:
            conversation["tools"] = _json(tools, "tools")
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        source = self._sources[name]
        disguise = Disguise(self._tokenizer.markup, conversation, source)
        hidden = disguise.hide(conversation)
        for message, original in zip(hidden["messages"], conversation["messages"], strict=True):
            message["role"] = original["role"]
        own = {
            "tools": None,
            "documents": None,
            "bos_token": self._tokenizer.bos_token or "",
            "eos_token": self._tokenizer.eos_token or "",
            "add_generation_prompt": add_generation_prompt,
        }
        if thinking is not None:
            own["thinking"] = thinking
        if tools:
            del own["tools"]
        rendered = self._processes[name].render(hidden, own, disguise.characters)
        prompt = ChatPrompt(
            text=disguise.show(rendered),
            ids=self._tokenizer.encode_disguised(rendered, disguise.show),
            thinking=rendered.rstrip().endswith(THINK_START),
        )
        if thinking not in (None, prompt.thinking) and not re.search(r"\bthinking\b", source):
            raise ParameterError(
                f"this checkpoint's chat template cannot switch thoughts to {thinking}; leave "
                "thinking at None",
                parameter="thinking",
            )
        return prompt

    def close(self) -> None:
        """End the processes that render."""
        for process in self._processes.values():
            process.close()


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return `messages` as plain JSON. Raises ParameterError naming the one that is malformed."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ParameterError(
            f"messages must be a list of mappings, not {type(messages).__name__}",
            parameter="messages",
        )
    if not messages:
        raise ParameterError("messages is empty; give one from the user", parameter="messages")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ParameterError(
            f"{name} must be a mapping with role and content, not {type(message).__name__}",
            parameter=name,
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ParameterError(
            f"{name}.role must be one of {', '.join(ROLES)}, not {role!r:.100}",
            parameter=f"{name}.role",
        )
    only_calls = content is None and role == "assistant" and bool(message.get("tool_calls"))
    if not isinstance(content, str) and not only_calls:
        raise ParameterError(
            f"{name}.content must be a string, not {type(content).__name__}",
            parameter=f"{name}.content",
        )
    plain: dict[str, Any] = _json(message, name)
    return plain


def _json(value: Any, name: str, depth: int = 0) -> Any:
    """Return a copy of `value` made of JSON's types alone."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, name)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if depth < _MOST_NESTED and isinstance(value, Mapping):
        return {
            _text(key, f"a key of {name}"): _json(item, f"{name}.{key}", depth + 1)
            for key, item in value.items()
        }
    if depth < _MOST_NESTED and isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_json(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(value)]
    problem = (
        f"is nested more than {_MOST_NESTED} deep"
        if depth >= _MOST_NESTED
        else f"must be JSON, not {type(value).__name__}"
    )
    raise ParameterError(f"{name[:200]} {problem}", parameter=name)


def _text(value: Any, name: str) -> str:
    try:
        if isinstance(value, str):
            value.encode()
            return str.__str__(value)
        problem = f"must be a string, not {type(value).__name__}"
    except UnicodeEncodeError as error:
        problem = f"is not valid Unicode at character {error.start}"
    raise ParameterError(f"{name[:200]} {problem}", parameter=name)


def _read_templates(folder: Path) -> tuple[Path, dict[str, str]]:
    """Return the file that holds them and the templates by name."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        try:
            return path, {"default": read_checkpoint_file(path).decode()}
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"'{path}' is not UTF-8 at byte {error.start}", file=str(path), offset=error.start
            ) from error
    path = folder / "tokenizer_config.json"
    template = read_optional_json(path).get("chat_template")
    if template is None:
        raise UnsupportedError(
            f"'{path}' has no chat_template; give the prompt as raw text instead"
        )
    if isinstance(template, str):
        return path, {"default": template}
    try:
        named = {entry["name"]: entry["template"] for entry in template}
    except (TypeError, KeyError):
        named = {}
    if "default" not in named or not all(isinstance(item, str) for item in named.values()):
        raise CheckpointError(
            f"chat_template in '{path}' must be a string or a list of named templates, one of them "
            "'default'",
            file=str(path),
            tensor="chat_template",
        )
    return path, {name: named[name] for name in ("default", "tool_use") if name in named}
