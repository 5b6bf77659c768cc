"""A conversation in a terminal: what was said, how answers are made, and the /commands."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dsfp4.cli.options import add_sampling_flags, sampling, switch
from dsfp4.errors import Dsfp4Error
from dsfp4.inference import DeepseekInference
from dsfp4.stream import TextStream

MAX_TOKENS = 2048  # of an answer, thoughts included, unless the user says otherwise

COMMANDS = {
    "help": ("", "this list"),
    "reset": ("", "forget the conversation"),
    "retry": ("", "another answer to the last question"),
    "system": (
        "[TEXT]",
        "set the system prompt and forget the conversation; without TEXT, show it",
    ),
    "think": ("[on|off|auto]", "switch the model's thoughts, where its template can"),
    "thoughts": ("", "show the thoughts behind the last answer"),
    "set": ("[NAME VALUE]", "change how text is made; without a name, show the settings"),
    "quit": ("", "leave; Ctrl-D does too"),
}


class WrongCommand(Dsfp4Error):
    """A /command that cannot be carried out; the message says why."""


class _SettingParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongCommand(message.removeprefix("argument ").removeprefix("--"))


def _setting_parser() -> argparse.ArgumentParser:
    parser = _SettingParser(add_help=False, allow_abbrev=False)
    add_sampling_flags(parser, max_tokens=MAX_TOKENS)
    return parser


@dataclass
class Session:
    """A conversation with `model`. `options` are generate()'s keywords."""

    model: DeepseekInference
    options: dict[str, Any]
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    thoughts: str = ""  # behind the last answer
    finished: bool = False

    def ask(self, question: str) -> TextStream:
        """Start the answer to `question`; answered() or dropped() must follow."""
        self.turns.append({"role": "user", "content": question})
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.model.chat([*system, *self.turns], stream=True, **self.options)

    def answered(self, answer: str, thoughts: str) -> None:
        """Keep an answer; the model does not see its thoughts again."""
        self.turns.append({"role": "assistant", "content": answer})
        self.thoughts = thoughts

    def dropped(self) -> None:
        """Forget the question that was not answered."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def command(self, line: str) -> tuple[str, str | None]:
        """Carry out a /command; return what to say and, for /retry, the question to ask again.

        Raises WrongCommand.
        """
        name, _, rest = line.removeprefix("/").strip().partition(" ")
        name = "quit" if name == "exit" else name
        if name not in COMMANDS:
            raise WrongCommand(f"there is no /{name}; /help lists what there is")
        if name == "retry":
            return "", self._last_question()
        handlers: Mapping[str, Callable[[str], str]] = {
            "help": lambda _: help_text(),
            "reset": lambda _: self._reset("the conversation is forgotten"),
            "system": self._set_system,
            "think": self._set_thinking,
            "thoughts": lambda _: self.thoughts.strip() or "there were none",
            "set": self._set,
            "quit": self._quit,
        }
        return handlers[name](rest.strip()), None

    def _last_question(self) -> str:
        if len(self.turns) < 2:
            raise WrongCommand("nothing was asked yet")
        self.turns.pop()
        return self.turns.pop()["content"]

    def _reset(self, words: str) -> str:
        self.turns.clear()
        self.thoughts = ""
        return words

    def _set_system(self, text: str) -> str:
        if not text:
            return "no system prompt" if self.system is None else self.system
        self.system = text
        return self._reset("the system prompt is set, the conversation is forgotten")

    def _set_thinking(self, text: str) -> str:
        if not text:
            state = {True: "on", False: "off", None: "auto"}[self.options["thinking"]]
            return f"thoughts: {state}"
        try:
            thinking = switch(text)
            template = self.model.chat_template
            if template is not None:
                template.prompt([{"role": "user", "content": ""}], thinking=thinking)
        except (argparse.ArgumentTypeError, Dsfp4Error) as error:
            raise WrongCommand(str(error)) from error
        self.options["thinking"] = thinking
        return f"thoughts: {text}"

    def _set(self, text: str) -> str:
        if not text:
            return "\n".join(f"{name} {value}" for name, value in self.options.items())
        name, _, value = (part.strip() for part in text.partition(" "))
        name = name.replace("-", "_")
        if name not in self.options or not value:
            raise WrongCommand(
                "/set NAME VALUE, or default for VALUE; NAME is one of " + ", ".join(self.options)
            )
        flag = "--stop-id" if name == "stop_ids" else "--" + name.replace("_", "-")
        given = [] if value == "default" else [f"{flag}={value}"]
        self.options[name] = sampling(_setting_parser().parse_args(given))[name]
        return f"{name} {self.options[name]}"

    def _quit(self, _: str) -> str:
        self.finished = True
        return ""


def help_text() -> str:
    """Return the list of commands."""
    rows = [(f"/{name} {arguments}".strip(), text) for name, (arguments, text) in COMMANDS.items()]
    width = max(len(command) for command, _ in rows)
    return "\n".join(
        [
            *(f"{command:<{width}}  {text}" for command, text in rows),
            "Ctrl-C stops an answer. A line that ends with \\ goes on in the next one.",
            "A message that begins with a slash gets another in front: //",
        ]
    )
