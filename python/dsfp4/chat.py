"""Chat templates: a conversation to the prompt that the model was trained on."""

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from dsfp4.errors import CheckpointError, ParameterError, UnsupportedError
from dsfp4.files import read_checkpoint_file
from dsfp4.jsonfile import read_optional_json
from dsfp4.markup import Disguise
from dsfp4.messages import Conversation, Message, check_messages, json_copy
from dsfp4.template_options import check_options, switch_thinking
from dsfp4.template_process import TemplateProcess
from dsfp4.tokenizer import THINK_END, THINK_START, Tokenizer

_USER = {"role": "user", "content": "x"}


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation. `thinking` tells whether it ends inside the model's thoughts.

    `continued` tells whether it ends inside a text, which goes on without a gap.
    """

    text: str
    ids: list[int]
    thinking: bool
    continued: bool = False


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
        self._shown: dict[tuple[str, str], bool | None] = {}

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the text of the prompt; see prompt()."""
        return self.prompt(messages, add_generation_prompt=add_generation_prompt).text

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        options: Mapping[str, Any] | None = None,
        continue_last: bool = False,
        add_generation_prompt: bool = True,
    ) -> ChatPrompt:
        """Return the prompt, begin token included, that asks for the next assistant turn.

        `messages` are mappings with "role", one of ROLES, and "content"; messages.check_messages()
        says what that may be. Other fields are the template's to know. A developer's message is a
        system's where the template knows no developers. `tools` are JSON schemas. `thinking`
        switches the model's thoughts on or off where the template knows how; None is the template's
        own choice. `options` are further variables of the template; "thinking", "enable_thinking"
        and "thinking_mode" ("thinking" or "chat") are the switch whatever the template calls it.
        With `continue_last` the prompt ends with the last message's text, an assistant's: its
        content, or inside its thoughts where it has but `reasoning_content`. No text in all of them
        can become markup. Raises ParameterError for messages that are malformed, that the template
        refuses or has no place for, and for options, tools and a switch that it has not;
        CheckpointError where the template fails or takes too long.
        """
        conversation = check_messages(messages)
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        process = self._processes[name]
        if tools and "tools" not in process.variables:
            raise ParameterError(
                "this checkpoint's chat template has no place for tools; describe them in the "
                "system's message",
                parameter="tools",
            )
        others = check_options(options, process.variables)
        begun = _check_begun(conversation, thinking) if continue_last else None
        self._check_shown(name, conversation)
        if begun is not None and begun.thoughts:
            thinking = True if thinking is None else thinking
            conversation.messages.pop()
        elif begun is not None:
            add_generation_prompt = False
        switch = switch_thinking(thinking, others, process.variables)
        variables: dict[str, Any] = {"messages": conversation.messages, **others}
        if tools:
            variables["tools"] = json_copy(tools, "tools")
        texts = [item.text for item in conversation.arguments]
        said = [] if begun is None else [begun.thoughts, begun.content]
        disguise = Disguise(self._tokenizer.markup, [variables, texts, said], self._sources[name])
        hidden = disguise.hide(variables)
        for message, original in zip(hidden["messages"], conversation.messages, strict=True):
            message["role"] = original["role"]
        if begun is not None and not begun.thoughts:
            hidden["messages"][-1]["content"] += disguise.mark
        own = self._own(add_generation_prompt, bool(tools)) | switch.variables
        arguments = [
            (item.message, item.call, disguise.hide(item.text), item.was_text)
            for item in conversation.arguments
        ]
        rendered = process.render(
            hidden, own, disguise.characters, arguments, conversation.without_text
        )
        thoughts = rendered.rstrip().endswith(THINK_START)
        if begun is None:
            switch.check(thoughts)
        else:
            rendered = begun.end_of(rendered, disguise)
        return ChatPrompt(
            text=disguise.show(rendered),
            ids=self._tokenizer.encode_disguised(rendered, disguise.show),
            thinking=thoughts if begun is None else not begun.content,
            continued=begun is not None,
        )

    def close(self) -> None:
        """End the processes that render."""
        for process in self._processes.values():
            process.close()

    def _own(self, add_generation_prompt: bool, tools: bool) -> dict[str, Any]:
        """Return the variables that every template has and no caller sets."""
        return {
            **({} if tools else {"tools": None}),
            "documents": None,
            "bos_token": self._tokenizer.bos_token or "",
            "eos_token": self._tokenizer.eos_token or "",
            "add_generation_prompt": add_generation_prompt,
        }

    def _check_shown(self, name: str, conversation: Conversation) -> None:
        """Make systems of developers, and refuse what the template would leave out."""
        for i, message in enumerate(conversation.messages):
            if message["role"] == "developer" and not self._shows(name, "developer"):
                message["role"] = "system"
            if message["role"] == "tool" and self._shows(name, "tool") is False:
                raise ParameterError(
                    "this checkpoint's chat template has no role 'tool'; say what a tool gave in a "
                    "user's message",
                    parameter=f"messages[{i}].role",
                )
            if "tool_calls" not in message or message["role"] != "assistant":
                continue
            if self._shows(name, "calls") is False:
                problem = "this checkpoint's chat template has no tool calls; leave them out of"
            elif message["content"] and self._shows(name, "calls beside content") is False:
                problem = "this checkpoint's chat template has tool calls or content, not both, in"
            else:
                continue
            raise ParameterError(f"{problem} messages[{i}]", parameter=f"messages[{i}].tool_calls")

    def _shows(self, name: str, what: str) -> bool | None:
        """Tell whether the template shows such a message, by trying; None if it fails over it."""
        if (name, what) not in self._shown:
            mark = secrets.token_hex(8)
            called = "x" if what == "tool" else mark
            call = {"type": "function", "id": "call00000", "function": {"name": called}}
            content = "x" if what == "calls beside content" else None
            calls = {"role": "assistant", "content": content, "tool_calls": [call]}
            output = {"role": "tool", "tool_call_id": "call00000", "name": "x", "content": "x"}
            probes: dict[str, list[Message]] = {
                "developer": [{"role": "developer", "content": mark}, _USER],
                "tool": [_USER, calls, output | {"content": mark}],
            }
            probe = check_messages(probes.get(what, [_USER, calls, output]))
            try:
                text = self._processes[name].render(
                    {"messages": probe.messages},
                    self._own(True, False),
                    {},
                    [astuple(item) for item in probe.arguments],
                    probe.without_text,
                )
                self._shown[name, what] = mark in text
            except (ParameterError, CheckpointError):
                self._shown[name, what] = None
        return self._shown[name, what]


@dataclass(frozen=True)
class _Begun:
    """An assistant's text that goes on: thoughts, then perhaps an answer, or an answer alone."""

    thoughts: str
    content: str

    def end_of(self, rendered: str, disguise: Disguise) -> str:
        """Return the prompt up to where the text goes on.

        Thoughts come behind the opening of a new turn, as no template keeps those of an earlier
        one; an answer is where the template puts it, which its mark shows.
        """
        if not self.thoughts:
            before, mark, _ = rendered.partition(disguise.mark)
            if not mark:
                raise ParameterError(
                    "this checkpoint's chat template does not end with the last message's content",
                    parameter="continue_last",
                )
            return before
        if not rendered.rstrip().endswith(THINK_START):
            rendered += THINK_START + "\n"
        end = f"\n{THINK_END}\n\n" if rendered.endswith("\n") else THINK_END
        text: str = rendered + disguise.hide(self.thoughts)
        return text + end + disguise.hide(self.content) if self.content else text


def _check_begun(conversation: Conversation, thinking: bool | None) -> _Begun:
    """Return the text of the last message. Raises ParameterError if it cannot go on."""
    last = conversation.messages[-1]
    thoughts, content = last.get("reasoning_content") or "", last["content"]
    problem = ""
    if last["role"] != "assistant" or "tool_calls" in last:
        problem = "needs a last message from the assistant, without tool calls"
    elif not isinstance(thoughts, str) or not (thoughts or content):
        problem = "needs content or reasoning_content, a string, in the last message"
    elif thinking is (not thoughts):
        problem = (
            "needs reasoning_content in the last message where thinking is on"
            if thinking
            else "cannot go on with reasoning_content where thinking is off"
        )
    if problem:
        raise ParameterError(f"continue_last {problem}", parameter="continue_last")
    return _Begun(thoughts, content)


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
