"""Renders a chat template in a process of its own, which the kernel stops where it goes too far.

A template is code from a stranger. jinja2's sandbox keeps it from the machine, but not from endless
loops and endless strings; this process has so much CPU time for each answer, so much memory, writes
no files, and dies when it wants more. It speaks JSON lines: settings with the template first, then
requests; each has one answer, {"text": ...} or {"error": ...}. The text of the first answer is the
JSON list of the variables that the template reads.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsfp4.template_fields import as_fields, escape_non_ascii, set_disguise
from dsfp4.template_values import is_mapping, is_none, is_string, put_values

_MEMORY = 512 * 2**20  # bytes beyond those in use when the template arrives


class _Refused(jinja2.TemplateError):
    """The template itself refused the conversation."""


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without names that could reach Python's insides."""

    def __init__(*arguments: Any, **attributes: Any) -> None:
        self, *rest = arguments
        values = dict(*rest, **attributes)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}: marks what an assistant wrote, for training; here its body is all."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return escape_non_ascii(text) if ensure_ascii else text


def _compile(source: str) -> tuple[jinja2.Template, list[str]]:
    """Return the template, and the names of the variables that it reads."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.tests.update(none=is_none, string=is_string, mapping=is_mapping)
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace
    )
    tree = environment.parse(source)
    first: dict[str, str] = {}
    for name, access in _uses(tree):
        first.setdefault(name, access)
    # One that is set in a branch and read behind it counts as undeclared, too.
    undeclared = jinja2.meta.find_undeclared_variables(tree)
    variables = [name for name in undeclared if first.get(name) == "load"]
    return environment.from_string(source), sorted(variables)


def _uses(node: jinja2.nodes.Node) -> Iterator[tuple[str, str]]:
    """Yield the names in `node` with "load" or "store", in the order in which they are used."""
    if isinstance(node, jinja2.nodes.Name):
        yield node.name, node.ctx
    children = list(node.iter_child_nodes())
    if isinstance(node, jinja2.nodes.Assign):
        children.reverse()  # the target stands first
    for child in children:
        yield from _uses(child)


def _render(template: jinja2.Template, request: dict[str, Any], most: int) -> str:
    set_disguise(request["disguise"])
    conversation = as_fields(request["conversation"])
    put_values(conversation["messages"], request["arguments"], request["without_text"])
    pieces, size = [], 0
    for piece in template.generate(**request["own"], **conversation):
        size += len(piece)
        if size > most:
            raise jinja2.TemplateError(f"writes more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def _confine() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        data_pages = int(file.read().split()[5])
    memory = data_pages * resource.getpagesize() + _MEMORY
    allowed = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if allowed == resource.RLIM_INFINITY or memory < allowed:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def _answer(work: Callable[[], str], seconds: float) -> dict[str, str]:
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return {"text": work()}
    except _Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"error": "needs too much memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Serve the parent until it closes the pipe."""
    requests = iter(sys.stdin.buffer)
    settings = json.loads(next(requests))
    seconds, most = settings["seconds"], settings["characters"]
    _confine()
    template: jinja2.Template | None = None

    def compiled() -> str:
        nonlocal template
        template, variables = _compile(settings["template"])
        return json.dumps(variables)

    def send(answer: dict[str, str]) -> None:
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()

    send(_answer(compiled, seconds))
    if template is None:
        os._exit(0)
    ready = template
    for line in requests:
        send(_answer(partial(_render, ready, json.loads(line), most), seconds))
