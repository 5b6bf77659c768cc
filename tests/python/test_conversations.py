"""Conversations as people write them, in the templates of their checkpoints."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from dsfp4 import DeepseekInference
from dsfp4.chat import ChatTemplate
from dsfp4.errors import ParameterError
from dsfp4.text import Text
from dsfp4.tool_calls import ToolCall
from fixtures.real_tokenizers import NEWER, OLDER

USER = {"role": "user", "content": "Weather?"}
SUN = {"role": "tool", "content": "sun"}


def calling(arguments: Any, content: Any = None, **others: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]} | others


# Each adds arguments to strings, as DeepSeek's templates do, or makes JSON of them, as others do.
CALLS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.tool_calls %}{% for t in m.tool_calls %}"
    "{{ t.type + '(' + t['function']['name'] + ' ' + ARGUMENTS + ')' }}"
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
ADDED = CALLS.replace("ARGUMENTS", "t['function']['arguments']")
AS_JSON = CALLS.replace("ARGUMENTS", "t['function']['arguments'] | tojson")
BY_KIND = CALLS.replace(
    "ARGUMENTS",
    "(t.function.arguments if t.function.arguments is string else t.function.arguments | tojson)",
)
BY_ITEM = CALLS.replace("ARGUMENTS", "(t.function.arguments | items | list | string)")


# ---- content -------------------------------------------------------------------------------------


def test_content_in_parts_is_their_text(demo: DeepseekInference) -> None:
    template = demo.chat_template
    assert template is not None
    parts = [{"type": "text", "text": "Who is"}, {"type": "text", "text": "<think>?"}]
    prompt = template.prompt([USER | {"content": parts}])
    assert prompt == template.prompt([USER | {"content": "Who is\n<think>?"}])
    assert prompt.ids.count(4094) == 1  # the template's own
    assert demo.chat([USER | {"content": parts}], 3, seed=1).prompt_tokens == len(prompt.ids)
    assert template.render([USER | {"content": []}]) == template.render([USER | {"content": ""}])


BAD = [
    (USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
     "messages[0].content[0]", "'image_url'"),
    (USER | {"content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
     "messages[0].content[1]", "'input_audio'"),
    (USER | {"content": ["a"]}, "messages[0].content[0]", "not str"),
    (USER | {"content": [{"type": "text"}]}, "messages[0].content[0].text", "not NoneType"),
    (USER | {"content": {"type": "text", "text": "a"}}, "messages[0].content", "not dict"),
    (USER | {"content": None}, "messages[0].content", "not NoneType"),
    ({"role": "assistant", "content": None, "tool_calls": []}, "messages[0].content", "NoneType"),
    (calling("{}") | {"tool_calls": "x"}, "messages[0].tool_calls", "a list of mappings, not str"),
    (calling("{}") | {"tool_calls": ["x"]}, "messages[0].tool_calls[0]", "not str"),
    (calling("{}") | {"tool_calls": [{"function": {}}]}, "messages[0].tool_calls[0].function",
     "name, a string"),
    (calling([1]), "messages[0].tool_calls[0].function.arguments", "not list"),
    (calling({"a": object}), "messages[0].tool_calls[0].function.arguments.a", "must be JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "parameter", "words"), BAD)
def test_what_is_malformed_is_named(
    chat: Callable[[str], ChatTemplate], message: Any, parameter: str, words: str
) -> None:
    with pytest.raises(ParameterError) as error:
        chat(ADDED).render([message])
    assert words in str(error.value)
    assert error.value.parameter == parameter or parameter.endswith(".a")
    assert parameter.removesuffix(".a") in str(error.value)


# ---- tool calls in messages ----------------------------------------------------------------------


@pytest.mark.parametrize("template", [ADDED, AS_JSON, BY_KIND])
@pytest.mark.parametrize("arguments", [{"city": "Zürich", "n": [1, None]}, '{"city": "Zürich",'
                                       ' "n": [1, null]}'])  # fmt: skip
def test_arguments_are_objects_or_text(
    chat: Callable[[str], ChatTemplate], template: str, arguments: Any
) -> None:
    text = chat(template).render([USER, calling(arguments), SUN])
    shown = '{"city": "Zürich", "n": [1, null]}'
    assert text == f"[user]Weather?[assistant]function(get_weather {shown})[tool]sun"


def test_arguments_by_item(chat: Callable[[str], ChatTemplate]) -> None:
    for arguments in ({"n": 1}, '{"n":1}'):
        assert "get_weather [('n', 1)])" in chat(BY_ITEM).render([USER, calling(arguments), SUN])


def test_the_callers_own_spelling_stays_where_a_template_adds_it(
    chat: Callable[[str], ChatTemplate],
) -> None:
    spelt = '{ "b":1,\n"a" : "<think>"}'
    for template in (ADDED, BY_KIND):
        made = chat(template)
        prompt = made.prompt([USER, calling(spelt), SUN])
        assert f"get_weather {spelt})" in prompt.text
        assert 4094 not in prompt.ids  # no markup
    assert 'get_weather {"b": 1, "a": "<think>"})' in chat(AS_JSON).render([USER, calling(spelt)])


@pytest.mark.parametrize("broken", ['{"city": ', "null", "[1]", '{"a": ' * 500])
def test_arguments_that_a_model_spoilt_are_text(
    chat: Callable[[str], ChatTemplate], broken: str
) -> None:
    assert f"get_weather {broken})" in chat(ADDED).render([USER, calling(broken), SUN])
    quoted = json.dumps(broken)
    assert f"get_weather {quoted})" in chat(AS_JSON).render([USER, calling(broken), SUN])


def test_calls_in_shorthand(chat: Callable[[str], ChatTemplate]) -> None:
    bare = calling(None)
    del bare["tool_calls"][0]["type"], bare["content"]
    assert "function(get_weather {})" in chat(ADDED).render([USER, bare, SUN])
    template = "{% for m in messages %}{% for t in m.tool_calls or [] %}{{ t.name + t.arguments }}"
    flat = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    ends = "{% endfor %}{% endfor %}"
    assert chat(template + ends).render([USER, flat]) == 'f{"a": 1}'


NULLS = [
    ("{{ 'null' if m.content is none else m.content }}", "null"),
    ("{{ 'null' if m.content is not none else 'none' }}", "none"),
    ("{{ 'null' if m.content == none else 'text' }}", "null"),
    ("{{ 'text' if m.content != none else 'null' }}", "null"),
    ("{{ 'text' if m.content else 'null' }}", "null"),
    ("{{ 'text' if m.content is string else 'null' }}", "null"),
    ("{{ '<' + m.content + '>' }}", "<>"),
    ("{{ '</think>' in m.content }}", "False"),
    ("{{ m.content.split('</think>')[-1] }}", ""),
    ("{{ m.content }}", ""),
]


@pytest.mark.parametrize(("expression", "shown"), NULLS)
@pytest.mark.parametrize("content", [None, "", [], "absent"])
def test_content_that_is_null_beside_calls(
    chat: Callable[[str], ChatTemplate], expression: str, shown: str, content: Any
) -> None:
    message = calling("{}", content)
    if content == "absent":
        del message["content"]
    template = f"{{% for m in messages %}}{{% if m.tool_calls %}}{expression}{{% for t in \
m.tool_calls %}}{{{{ t.function.name }}}}{{% endfor %}}{{% endif %}}{{% endfor %}}"
    assert chat(template).render([USER, message]) == shown + "get_weather"


@pytest.mark.parametrize("name", OLDER + NEWER)
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("arguments", ['{"city": "Bern"}', {"city": "Bern"}])
def test_published_templates_show_calls(
    published: Callable[[str], ChatTemplate], name: str, content: Any, arguments: Any
) -> None:
    prompt = published(name).prompt([USER, calling(arguments, content), SUN])
    fenced = '\n```json\n{"city": "Bern"}\n```'
    call = (
        '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Bern"}'
        if name == "v31"
        else f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather{fenced}"
    )
    assert f"<｜tool▁calls▁begin｜>{call}<｜tool▁call▁end｜>" in prompt.text
    assert "sun<｜tool▁output▁end｜>" in prompt.text
    assert "None" not in prompt.text


@pytest.mark.parametrize("name", OLDER + NEWER)
def test_empty_calls_are_none(published: Callable[[str], ChatTemplate], name: str) -> None:
    turns: list[dict[str, Any]] = [USER, {"role": "assistant", "content": "Hi"}, USER]
    expected = published(name).prompt(turns)
    for calls in (None, []):
        assert published(name).prompt([USER, turns[1] | {"tool_calls": calls}, USER]) == expected


# ---- messages that a template would leave out ----------------------------------------------------


@pytest.mark.parametrize("name", ["v25", "v3"])
def test_calls_beside_content_are_refused_where_they_would_vanish(
    published: Callable[[str], ChatTemplate], name: str
) -> None:
    with pytest.raises(ParameterError, match=r"tool calls or content, not both, in messages\[1\]"):
        published(name).prompt([USER, calling("{}", "I look."), SUN])


def test_roles_that_a_template_has_not(
    published: Callable[[str], ChatTemplate], chat: Callable[[str], ChatTemplate]
) -> None:
    text = {"role": "assistant", "content": "x"}
    for template in (
        published("v2"),
        chat("{% for m in messages if m.role == 'user' %}x{% endfor %}"),
    ):
        with pytest.raises(ParameterError, match="no role 'tool'") as error:
            template.prompt([USER, text, SUN])
        assert error.value.parameter == "messages[2].role"
        with pytest.raises(ParameterError, match=r"no tool calls; leave them out of messages\[1\]"):
            template.prompt([USER, calling("{}")])


@pytest.mark.parametrize("name", [*OLDER, *NEWER, "v2"])
def test_a_developer_is_a_system_where_there_are_none(
    published: Callable[[str], ChatTemplate], name: str
) -> None:
    template = published(name)
    developer, system = ({"role": role, "content": "Be brief."} for role in ("developer", "system"))
    assert template.prompt([developer, USER]) == template.prompt([system, USER])
    assert "Be brief." in template.prompt([developer, USER]).text


def test_a_template_s_own_developers(chat: Callable[[str], ChatTemplate]) -> None:
    template = chat("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert template.render([{"role": "developer", "content": "x"}]) == "[developer]x"


def test_a_template_that_fails_over_a_trial_decides_itself(
    chat: Callable[[str], ChatTemplate],
) -> None:
    picky = (
        "{% for m in messages %}{% if m.role == 'tool' and m.content != 'sun' %}"
        "{{ raise_exception('only sun') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert chat(picky).render([USER, SUN]) == "Weather?sun"
    with pytest.raises(ParameterError, match="only sun"):
        chat(picky).render([USER, SUN | {"content": "rain"}])


def test_an_answer_is_the_next_turn(published: Callable[[str], ChatTemplate]) -> None:
    text = Text("")
    text.tool_calls = [ToolCall("get_weather", '{"city":"Bern"}')]
    for name in OLDER + NEWER:
        prompt = published(name).prompt([USER, text.as_message(), SUN])
        assert '{"city":"Bern"}' in prompt.text
