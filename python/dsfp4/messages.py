"""Conversations as people write them, checked and brought into one shape for chat templates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsfp4.errors import ParameterError

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
ROLES = ("system", "developer", "user", "assistant", "tool")
_MOST_NESTED = 64


@dataclass(frozen=True)
class Arguments:
    """The arguments of call `call` of message `message`, which are a JSON object.

    `text` is its JSON: the caller's own where `was_text`.
    """

    message: int
    call: int
    text: str
    was_text: bool


@dataclass(frozen=True)
class Conversation:
    """Messages made of JSON's types alone: `content` is a string, `arguments` an object.

    An argument string that is no JSON object, which a model may well write, stays a string.
    `without_text` are the messages whose content was None or empty beside tool calls.
    """

    messages: list[dict[str, Any]]
    arguments: list[Arguments]
    without_text: list[int]


def check_messages(messages: Any) -> Conversation:
    """Return `messages` in one shape. Raises ParameterError naming the one that is malformed.

    Content is a string, a list of parts of type "text", which are joined by line breaks, or, where
    an assistant calls tools or has `reasoning_content`, None. `tool_calls` that are None or empty
    count as absent; a call's `arguments` are an object, JSON text, or None for no arguments.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ParameterError(
            f"messages must be a list of mappings, not {type(messages).__name__}",
            parameter="messages",
        )
    if not messages:
        raise ParameterError("messages is empty; give one from the user", parameter="messages")
    plain, arguments, without_text = [], [], []
    for i, message in enumerate(messages):
        checked = _check_message(message, f"messages[{i}]")
        calls = checked.get("tool_calls", [])
        for j, call in enumerate(calls):
            arguments += _check_call(call, f"messages[{i}].tool_calls[{j}]", i, j)
        if calls and not checked["content"]:
            without_text.append(i)
        plain.append(checked)
    return Conversation(plain, arguments, without_text)


def _check_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ParameterError(
            f"{name} must be a mapping with role and content, not {type(message).__name__}",
            parameter=name,
        )
    role = message.get("role")
    if role not in ROLES:
        raise ParameterError(
            f"{name}.role must be one of {', '.join(ROLES)}, not {role!r:.100}",
            parameter=f"{name}.role",
        )
    calls = message.get("tool_calls")
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, (Sequence, type(None))):
        raise ParameterError(
            f"{name}.tool_calls must be a list of mappings, not {type(calls).__name__}",
            parameter=f"{name}.tool_calls",
        )
    content = _content(message.get("content"), f"{name}.content")
    says_more = role == "assistant" and bool(calls or message.get("reasoning_content"))
    if content is None and not says_more:
        raise ParameterError(
            f"{name}.content must be a string or a list of parts, not NoneType; only an assistant "
            "that calls tools may have none",
            parameter=f"{name}.content",
        )
    absent = () if calls else ("tool_calls",)
    plain: dict[str, Any] = json_copy(
        {key: item for key, item in message.items() if key not in absent} | {"content": content},
        name,
    )
    plain["content"] = plain["content"] or ""
    return plain


def _content(content: Any, name: str) -> str | None:
    """Return the text of a message's content."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ParameterError(
            f"{name} must be a string or a list of parts, not {type(content).__name__}",
            parameter=name,
        )
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            what = f"{kind!r:.100}" if isinstance(part, Mapping) else type(part).__name__
            raise ParameterError(
                f"{name}[{i}] must be a part of type 'text', not {what}; these models read text "
                "alone",
                parameter=f"{name}[{i}]",
            )
        texts.append(_text(part.get("text"), f"{name}[{i}].text"))
    return "\n".join(texts)


def _check_call(call: Any, name: str, message: int, number: int) -> list[Arguments]:
    """Bring a tool call, JSON already, into shape, and return its arguments if it is an object."""
    if not isinstance(call, dict):
        raise ParameterError(
            f"{name} must be a mapping with type and function, not {type(call).__name__}",
            parameter=name,
        )
    function = call.get("function", call)  # some write name and arguments without `function`
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ParameterError(
            f"{name}.function must be a mapping with name, a string, and arguments",
            parameter=f"{name}.function",
        )
    call.setdefault("type", "function")
    given = function.get("arguments")
    function["arguments"] = value = {} if given is None else given
    was_text = isinstance(value, str)
    if isinstance(value, str):
        text = value
        try:
            value = json_copy(json.loads(text or "{}"), name)
        except (ValueError, RecursionError):  # ParameterError, for what is nested deep, is one too
            return []
        if not isinstance(value, dict):
            return []
        function["arguments"] = value
    elif isinstance(value, dict):
        text = json.dumps(value, ensure_ascii=False)
    else:
        raise ParameterError(
            f"{name}.function.arguments must be a mapping or JSON text, not {type(value).__name__}",
            parameter=f"{name}.function.arguments",
        )
    return [Arguments(message, number, text, was_text)]


def json_copy(value: Any, name: str, depth: int = 0) -> Any:
    """Return a copy of `value` made of JSON's types alone. Raises ParameterError under `name`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, name)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if depth < _MOST_NESTED and isinstance(value, Mapping):
        return {
            _text(key, f"a key of {name}"): json_copy(item, f"{name}.{key}", depth + 1)
            for key, item in value.items()
        }
    if depth < _MOST_NESTED and isinstance(value, Sequence) and not isinstance(value, bytes):
        return [json_copy(item, f"{name}[{i}]", depth + 1) for i, item in enumerate(value)]
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
