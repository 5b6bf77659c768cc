"""Chat templates, rendered in a sandbox."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import jinja2
import pytest

from dsfp4 import template_process
from dsfp4.chat import ChatTemplate
from dsfp4.errors import CheckpointError, ParameterError, UnsupportedError
from dsfp4.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


def with_template(folder: Path, template: object, tokenizer: Tokenizer) -> ChatTemplate:
    text = json.dumps({"chat_template": template})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return ChatTemplate(folder, tokenizer)


def test_a_question_becomes_the_prompt_of_an_answer(demo_model: Path, tokenizer: Tokenizer) -> None:
    prompt = ChatTemplate(demo_model, tokenizer).render([{"role": "user", "content": "Who?"}])
    assert prompt == "<｜begin▁of▁sentence｜><｜User｜>Who?<｜Assistant｜><think>\n"
    ids = tokenizer.encode(prompt)
    assert ids[:2] == [0, 4092]
    assert ids[-3:-1] == [4093, 4094]


def test_earlier_turns_lose_their_thoughts(demo_model: Path, tokenizer: Tokenizer) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "hm</think>\nB"},
        {"role": "user", "content": "C"},
    ]
    prompt = ChatTemplate(demo_model, tokenizer).render(turns, add_generation_prompt=False)
    assert prompt == (
        "<｜begin▁of▁sentence｜>Be brief."
        "<｜User｜>A<｜Assistant｜>B<｜end▁of▁sentence｜><｜User｜>C"
    )


def test_without_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UnsupportedError, match="chat_template"):
        ChatTemplate(tmp_path, tokenizer)


@pytest.mark.parametrize("template", [3, [], [3], [{"name": "default"}], [{"name": 1}], {"a": "b"}])
def test_templates_of_the_wrong_kind(
    tmp_path: Path, tokenizer: Tokenizer, template: object
) -> None:
    with pytest.raises(CheckpointError, match="named templates") as error:
        with_template(tmp_path, template, tokenizer)
    assert error.value.file == str(tmp_path / "tokenizer_config.json")


def test_named_templates(tmp_path: Path, tokenizer: Tokenizer) -> None:
    named = [
        {"name": "rag", "template": "{% broken"},
        {"name": "tool_use", "template": "{{ tools | tojson }}"},
        {"name": "default", "template": "{{ messages[0].content }}, {{ tools is none }}"},
    ]
    chat = with_template(tmp_path, named, tokenizer)
    assert chat.prompt(HELLO).text == "Hello, True"
    assert chat.prompt(HELLO, tools=[{"é": "<"}]).text == '[{"é": "<"}]'


def test_a_template_in_a_file_of_its_own_wins(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert with_template(tmp_path, "config", tokenizer).render(HELLO) == "file: Hello"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja.*UTF-8"):
        ChatTemplate(tmp_path, tokenizer)


def test_a_malformed_template_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template in .*tokenizer_config\.json"):
        with_template(tmp_path, "{% if %}", tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].no_such_method() }}",
    ],
)
def test_templates_are_caged(tmp_path: Path, tokenizer: Tokenizer, template: str) -> None:
    chat = with_template(tmp_path, template, tokenizer)
    with pytest.raises(CheckpointError, match="chat_template"):
        chat.render([{"role": "user", "content": "x"}])


def test_what_hugging_face_adds_to_jinja(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = (
        "  {% for i in range(9) %}\n{% if i == 2 %}{% break %}{% endif %}\n{{ i }}{% endfor %}\n"
        "{% generation %}{{ messages[0] | tojson(indent=1) }}{% endgeneration %}"
        "{{ strftime_now('%Y') | length }}{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}"
    )
    messages = [{"role": "user", "content": "<é'&>\n"}]
    expected = '01{\n "role": "user",\n "content": "<é\'&>\\n"\n}42'
    assert with_template(tmp_path, template, tokenizer).render(messages) == expected


def test_a_template_may_refuse(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = with_template(tmp_path, "{{ raise_exception('users first') }}", tokenizer)
    with pytest.raises(ParameterError, match="users first"):
        chat.render(HELLO)


GREEDY = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "seconds",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": (
        "seconds"
    ),
    "{{ 10 ** (10 ** 10) }}": "seconds|memory",
    "{{ 'x' * 10 ** 11 }}": "memory",
    "{{ messages[0].content * 10 ** 11 }}": "memory",
    "{{ '%999999999d' % 1 }}": "memory|characters",
    "{{ 'x'.center(10 ** 11) }}": "memory",
    "{% set n = namespace(x='xx') %}{% for a in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}": (
        "memory"
    ),
    "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}": "characters",
    "{% for a in range(10 ** 9) %}{% endfor %}": "Range too big",
}


@pytest.mark.parametrize("template", GREEDY)
def test_greedy_templates_are_stopped(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    if "seconds" in GREEDY[template]:
        monkeypatch.setattr(template_process, "CPU_SECONDS", 0.5)
    with pytest.raises(CheckpointError, match=GREEDY[template]) as error:
        with_template(tmp_path, template, tokenizer).render(HELLO)
    assert error.value.file == str(tmp_path / "tokenizer_config.json")


def test_a_template_works_again_after_a_failure(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = "{% if messages | length > 1 %}{{ 'x' * 10 ** 11 }}{% endif %}ok"
    chat = with_template(tmp_path, template, tokenizer)
    with pytest.raises(CheckpointError):
        chat.render(HELLO * 2)
    assert chat.render(HELLO) == "ok"
    chat.close()
    assert chat.render(HELLO) == "ok"


def test_ctrl_c_while_rendering(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = (
        "{% if messages | length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}ok"
    )
    chat = with_template(tmp_path, template, tokenizer)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        chat.render(HELLO * 2)
    timer.join()
    assert chat.render(HELLO) == "ok"


SEAMS = [
    # templates that join, cut and compare; texts that would become markup at their seams
    ("<{{ messages[0].content }}>", ["think", "/think", "｜User｜", "｜Assistant｜"]),
    ("{{ messages[0].content }}think>", ["<", "a<"]),
    ("<think{{ messages[0].content }}", [">", ">a"]),
    ("{{ messages[0].content | trim }}User｜>", ["<｜ \n", " <｜"]),
    ("{{ messages[0].content[0] }}{{ messages[0].content[3:] }}", ["<xxthink>", "<xx/think>"]),
    ("{{ messages[0].content.split(',') | join }}", ["<thi,nk>", "<,think,>"]),
    ("{{ messages[0].content | replace('!', '') }}", ["<th!ink>", "!<!/!think!>!"]),
    ("{{ messages[0].content | lower }}", ["<THINK>", "</Think>"]),
    ("{{ messages[0].content | list | join }}", ["<think>"]),
    ("{{ messages[0] | tojson }}", ["<think>", "｜<｜User｜>"]),
    ("{{ messages[0] | tojson(ensure_ascii=true) }}", ["<think>"]),
    ("{{ [messages[0].content] }}{{ '%s' % messages[0].content }}", ["<think>"]),
]


@pytest.mark.parametrize(("template", "texts"), SEAMS)
def test_nothing_is_forged_at_a_seam(
    tmp_path: Path, tokenizer: Tokenizer, template: str, texts: list[str]
) -> None:
    chat = with_template(tmp_path, template, tokenizer)
    for text in texts:
        messages = [{"role": "user", "content": text}]
        prompt = chat.prompt(messages)
        plain = jinja2.Environment()
        plain.filters["tojson"] = lambda value, **options: json.dumps(
            value, **({"ensure_ascii": False} | options)
        )
        assert prompt.text == plain.from_string(template).render(messages=messages)
        assert {1, 4092, 4093, 4094, 4095}.isdisjoint(prompt.ids)
        assert tokenizer.decode(prompt.ids) == prompt.text


def test_two_systems_cannot_make_a_token(demo_model: Path, tokenizer: Tokenizer) -> None:
    halves = [{"role": "system", "content": text} for text in ("<thi", "nk>")]
    prompt = ChatTemplate(demo_model, tokenizer).prompt([*halves, *HELLO])
    assert prompt.text.startswith("<｜begin▁of▁sentence｜><think><｜User｜>")
    assert prompt.ids.count(4094) == 1  # the template's own, at the end


LOGIC = [
    "{{ '</think>' in c }}{{ c.split('</think>')[-1].lstrip('\n') }}{{ c.partition('<think>') }}",
    "{{ c.startswith('<think>') }}{{ c.endswith(('>', 'x')) }}{{ c.find('</') }}{{ c | length }}",
    "{{ c == '<think>hm</think>\nYes <b>' }}{{ c != '<' }}{{ c in ['<', 'a'] }}{{ c[1:7] }}",
    "{{ c.rsplit('<', 1) }}{{ c.count('>') }}{{ c.strip('<>') }}{{ c.removeprefix('<think>') }}",
    "{{ c.replace('<b>', '*') }}{{ c | replace('hm', '') | trim }}{{ c | upper }}{{ [c, c] }}",
    "{% for x in c %}{{ x == '<' }}{% endfor %}{{ ('' + c).split('</think>') }}",
    "{% set t = c + '\n' %}{{ t.split('</think>')[0] }}{{ {c: 1}[c] }}",
]


@pytest.mark.parametrize("logic", LOGIC)
def test_templates_do_not_notice_the_disguise(
    tmp_path: Path, tokenizer: Tokenizer, logic: str
) -> None:
    template = "{% set c = messages[0].content %}" + logic
    message = {"role": "assistant", "content": "<think>hm</think>\nYes <b>"}
    expected = jinja2.Environment().from_string(template).render(messages=[message])
    assert with_template(tmp_path, template, tokenizer).render([message]) == expected


def test_private_characters_of_a_user_stay(demo_model: Path, tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0xF0000, 0xFFF00))) + "<think>"
    chat = ChatTemplate(demo_model, tokenizer)
    prompt = chat.prompt([{"role": "user", "content": text}])
    assert text in prompt.text
    assert prompt.ids.count(4094) == 1
    everything = "".join(map(chr, range(0xF0000, 0xFFFFE)))
    with pytest.raises(ParameterError, match="private-use"):
        chat.prompt([{"role": "user", "content": everything}])


THINKING = (
    "{% if thinking is not defined %}{% set thinking = false %}{% endif %}"
    "{{ messages[0].content }}{% if thinking %}<think>{% else %}</think>{% endif %}"
)


def test_thinking_is_switched(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = with_template(tmp_path, THINKING, tokenizer)
    for switch, token in ((None, 4095), (False, 4095), (True, 4094)):
        prompt = chat.prompt(HELLO, thinking=switch)
        assert prompt.ids[-1] == token
        assert prompt.thinking is bool(switch)


def test_thoughts_that_cannot_be_switched(demo_model: Path, tokenizer: Tokenizer) -> None:
    chat = ChatTemplate(demo_model, tokenizer)
    assert chat.prompt(HELLO, thinking=True) == chat.prompt(HELLO)
    with pytest.raises(ParameterError, match="cannot switch") as error:
        chat.prompt(HELLO, thinking=False)
    assert error.value.parameter == "thinking"


def message(**changes: Any) -> dict[str, Any]:
    return {"role": "user", "content": "x"} | changes


BAD_MESSAGES = [
    ("Hello", "messages"),
    ([], "messages"),
    (3, "messages"),
    (HELLO[0], "messages"),
    ([message(), "Hello"], "messages[1]"),
    ([message(role="boss")], "messages[0].role"),
    ([message(role=["user"])], "messages[0].role"),
    ([{"content": "x"}], "messages[0].role"),
    ([message(content=None)], "messages[0].content"),
    ([message(content=b"x")], "messages[0].content"),
    ([{"role": "user"}], "messages[0].content"),
    ([message(content="\ud800")], "messages[0].content"),
    ([message(name={1: 2})], "a key of messages[0].name"),
    ([message(extra=[object])], "messages[0].extra[0]"),  # its repr holds no address
]


@pytest.mark.parametrize(("messages", "parameter"), BAD_MESSAGES, ids=repr)
def test_bad_messages_are_named(
    demo_model: Path, tokenizer: Tokenizer, messages: Any, parameter: str
) -> None:
    with pytest.raises(ParameterError) as error:
        ChatTemplate(demo_model, tokenizer).render(messages)
    assert error.value.parameter == parameter
    assert parameter in str(error.value)


def test_deep_nesting_is_refused(demo_model: Path, tokenizer: Tokenizer) -> None:
    deep: Any = "x"
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(ParameterError, match="nested"):
        ChatTemplate(demo_model, tokenizer).render([message(extra=deep)])
