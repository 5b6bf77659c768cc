"""Conversations as people write them, in the templates of their checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsfp4 import DeepseekInference
from dsfp4.chat import ChatTemplate
from dsfp4.errors import ParameterError
from dsfp4.tokenizer import Tokenizer
from fixtures.real_tokenizers import chat_template, write_tokenizer

USER = {"role": "user", "content": "Weather?"}
SUN = {"role": "tool", "content": "sun"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
Render = Callable[..., str]


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


@pytest.fixture
def chat(demo_model: Path, tmp_path: Path) -> Callable[[str], ChatTemplate]:
    def make(template: str) -> ChatTemplate:
        text = json.dumps({"chat_template": template})
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="utf-8")
        return ChatTemplate(tmp_path, Tokenizer(demo_model))

    return make


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ChatTemplate]:
    """Return a published template with the tokenizer that has its markup; may skip."""
    made: dict[str, ChatTemplate] = {}

    def make(name: str) -> ChatTemplate:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            write_tokenizer(name if name in ("r1", "v31") else "v31", folder)
            path = folder / "tokenizer_config.json"
            config = json.loads(path.read_text()) | {"chat_template": chat_template(name)}
            path.write_text(json.dumps(config))
            made[name] = ChatTemplate(folder, Tokenizer(folder))
        return made[name]

    return make


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


NEWER = ["r1-0528", "v31"]
OLDER = ["r1", "r1-prefilled", "v25", "v3"]


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


# ---- tools, and options of the template ----------------------------------------------------------


def test_tools_without_a_place_are_refused(published: Callable[[str], ChatTemplate]) -> None:
    for name in OLDER + NEWER:
        with pytest.raises(ParameterError, match="no place for tools; describe them") as error:
            published(name).prompt([USER], tools=TOOLS)
        assert error.value.parameter == "tools"
        assert published(name).prompt([USER], tools=[]) == published(name).prompt([USER])


def test_tools_reach_the_template(chat: Callable[[str], ChatTemplate]) -> None:
    template = chat("{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}")
    assert template.prompt([USER], tools=TOOLS).text == json.dumps(TOOLS) + "Weather?"


SWITCH = "{{ messages[0].content }}{% if NAME is defined and NAME == ON %}<think>{% endif %}"
SWITCHES = {
    "thinking": SWITCH.replace("NAME", "thinking").replace("ON", "true"),
    "enable_thinking": SWITCH.replace("NAME", "enable_thinking").replace("ON", "true"),
    "thinking_mode": SWITCH.replace("NAME", "thinking_mode").replace("ON", "'thinking'"),
}
ON: dict[str, Any] = {"thinking": True, "enable_thinking": True, "thinking_mode": "thinking"}
OFF: dict[str, Any] = {"thinking": False, "enable_thinking": False, "thinking_mode": "chat"}


@pytest.mark.parametrize("own", SWITCHES)
def test_each_name_of_the_switch_means_the_templates_own(
    chat: Callable[[str], ChatTemplate], own: str
) -> None:
    template = chat(SWITCHES[own])
    assert not template.prompt([USER]).thinking
    for values, thinking in ((ON, True), (OFF, False)):
        assert template.prompt([USER], thinking=thinking).thinking is thinking
        for name, value in values.items():
            assert template.prompt([USER], options={name: value}).thinking is thinking
            assert template.prompt([USER], options={name: value}, thinking=thinking)
            with pytest.raises(ParameterError, match="contradicts"):
                template.prompt([USER], options={name: value}, thinking=not thinking)
    with pytest.raises(ParameterError, match="contradicts"):
        template.prompt([USER], options={"enable_thinking": True, "thinking_mode": "chat"})


def test_v31_switches_by_any_name(published: Callable[[str], ChatTemplate]) -> None:
    for values, tag in ((ON, "<think>"), (OFF, "</think>")):
        for name, value in values.items():
            text = published("v31").prompt([USER], options={name: value}).text
            assert text.endswith("<｜Assistant｜>" + tag)
    with pytest.raises(ParameterError, match="cannot switch thoughts to False"):
        published("r1-prefilled").prompt([USER], options={"enable_thinking": False})


def test_options_reach_the_template_and_cannot_forge(chat: Callable[[str], ChatTemplate]) -> None:
    template = chat("{{ messages[0].content }}{{ effort | default('none') }}")
    assert template.render([USER]) == "Weather?none"
    prompt = template.prompt([USER], options={"effort": "<think>"})
    assert prompt.text == "Weather?<think>"
    assert 4094 not in prompt.ids
    assert chat(SWITCHES["thinking_mode"]).prompt([USER], options={"thinking_mode": "deep"})


@pytest.mark.parametrize(
    ("options", "parameter", "words"),
    [
        ({"effrt": 1}, "template_options['effrt']", "no option 'effrt'; it has effort"),
        ({"messages": []}, "template_options['messages']", "no option 'messages'"),
        ({"bos_token": "x"}, "template_options['bos_token']", "no option 'bos_token'"),
        ({3: 1}, "template_options[3]", "no option 3"),
        ({"effort": object}, "template_options.effort", "must be JSON"),
        ({"thinking_mode": "maybe"}, "template_options['thinking_mode']", "'chat' or 'thinking'"),
        ({"enable_thinking": 3}, "template_options['enable_thinking']", "not 3"),
        ([1], "template_options", "must be a mapping, not list"),
    ],
)
def test_options_that_it_has_not_are_named(
    chat: Callable[[str], ChatTemplate], options: Any, parameter: str, words: str
) -> None:
    with pytest.raises(ParameterError) as error:
        chat("{{ messages[0].content }}{{ effort }}").prompt([USER], options=options)
    assert error.value.parameter == parameter
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("template", "has"),
    [
        ("{% if effort is defined %}{% set own = effort %}{% endif %}{{ own }}", "it has effort"),
        ("{% set effort = effort | default(1) %}{{ effort }}", "it has effort"),
        ("{% if messages %}{% set own = 1 %}{% endif %}{{ own }}", "has none to set"),
        ("{% for m in messages %}{{ loop.index }}{% endfor %}{{ bos_token }}", "has none to set"),
        ("{% macro show(m) %}{{ m + effort }}{% endmacro %}", "it has effort"),
    ],
)
def test_options_are_what_a_template_reads_before_it_sets_it(
    chat: Callable[[str], ChatTemplate], template: str, has: str
) -> None:
    with pytest.raises(ParameterError) as error:
        chat(template).prompt([USER], options={"own": 1})
    assert str(error.value).endswith(has)


def test_a_template_without_options_says_so(demo: DeepseekInference) -> None:
    with pytest.raises(ParameterError, match="no option 'effort', and has none to set"):
        demo.chat([USER], 1, template_options={"effort": 1})
    with pytest.raises(ParameterError, match="thinking must be True, False or None, not 'yes'"):
        demo.chat([USER], 1, thinking="yes")  # type: ignore[arg-type]


# ---- going on with an assistant's text -----------------------------------------------------------


def begun(content: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content} | others


@pytest.mark.parametrize(
    ("name", "message", "end", "thinking"),
    [
        ("r1", begun("The sky "), "<｜Assistant｜>The sky ", False),
        ("r1-prefilled", begun("The sky "), "<｜Assistant｜>The sky ", False),
        ("r1-0528", begun("The sky "), "<｜Assistant｜>The sky ", False),
        ("v3", begun("The sky "), "<｜Assistant｜>The sky ", False),
        ("v31", begun("The sky "), "<｜Assistant｜></think>The sky ", False),
        ("v2", begun("The sky "), "\n\nAssistant: The sky ", False),
        ("r1", begun(None, reasoning_content="hm, "), "<｜Assistant｜><think>\nhm, ", True),
        ("r1-prefilled", begun("", reasoning_content="hm, "), "<think>\nhm, ", True),
        ("v31", begun("", reasoning_content="hm, "), "<｜Assistant｜><think>hm, ", True),
        ("r1-prefilled", begun("Yes", reasoning_content="hm"), "<think>\nhm\n</think>\n\nYes",
         False),
        ("v31", begun("Yes", reasoning_content="hm"), "<｜Assistant｜><think>hm</think>Yes", False),
    ],
)  # fmt: skip
def test_an_assistants_text_goes_on(
    published: Callable[[str], ChatTemplate],
    name: str,
    message: dict[str, Any],
    end: str,
    thinking: bool,
) -> None:
    prompt = published(name).prompt([USER, message], continue_last=True)
    assert prompt.text.endswith("Weather?" + end) or prompt.text.endswith(end)
    assert prompt.text.count("Weather?") == 1
    assert (prompt.thinking, prompt.continued) == (thinking, True)
    assert not published(name).prompt([USER]).continued


def test_a_text_that_goes_on_forges_nothing(published: Callable[[str], ChatTemplate]) -> None:
    marks = "<｜User｜></think><｜end▁of▁sentence｜>"
    template = published("v31")
    plain = template.prompt([USER, begun("x", reasoning_content="y")], continue_last=True)
    forged = template.prompt([USER, begun(marks, reasoning_content=marks)], continue_last=True)
    added = {token["id"] for token in json.loads(
        (Path(template._tokenizer._path)).read_text()  # the tokenizer's own file
    )["added_tokens"]}  # fmt: skip
    assert [id for id in forged.ids if id in added] == [id for id in plain.ids if id in added]
    assert forged.text.endswith(f"<think>{marks}</think>{marks}")


@pytest.mark.parametrize(
    ("messages", "thinking", "words"),
    [
        ([USER], None, "last message from the assistant"),
        ([USER, calling("{}")], None, "without tool calls"),
        ([USER, begun("")], None, "needs content or reasoning_content"),
        ([USER, begun("x", reasoning_content=3)], None, "reasoning_content, a string"),
        ([USER, begun("x")], True, "needs reasoning_content in the last message"),
        ([USER, begun("", reasoning_content="x")], False, "where thinking is off"),
    ],
)
def test_what_cannot_go_on_is_said(
    demo: DeepseekInference, messages: Any, thinking: Any, words: str
) -> None:
    with pytest.raises(ParameterError, match="continue_last") as error:
        demo.chat(messages, 1, continue_last=True, thinking=thinking)
    assert words in str(error.value)
    assert error.value.parameter == "continue_last"


def test_a_template_that_drops_the_last_text(chat: Callable[[str], ChatTemplate]) -> None:
    template = chat("{{ messages[0].content }}")
    with pytest.raises(ParameterError, match="does not end with the last message's content"):
        template.prompt([USER, begun("x")], continue_last=True)


def test_the_model_goes_on_where_the_text_ends(demo: DeepseekInference) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "stop_ids": []}
    turn = [USER, begun(None, reasoning_content="I should")]
    text = demo.chat(turn, 12, continue_last=True, **options)
    template = demo.chat_template
    assert template is not None
    ids = template.prompt(turn, continue_last=True).ids
    assert text.tokens == demo.model.generate(ids, max_tokens=12, **options).tokens
    written = demo.tokenizer.decode(text.tokens)
    assert text.reasoning == written.partition("</think>")[0].rstrip()
    assert text.reasoning[0] == " "  # no gap is lost
    with demo.chat(turn, 12, continue_last=True, stream=True, **options) as stream:
        pieces = list(stream)
    assert "".join(piece for piece in pieces if piece.kind == "reasoning") == text.reasoning


def test_an_answer_is_the_next_turn(published: Callable[[str], ChatTemplate]) -> None:
    from dsfp4.text import Text
    from dsfp4.tool_calls import ToolCall

    text = Text("")
    text.tool_calls = [ToolCall("get_weather", '{"city":"Bern"}')]
    for name in OLDER + NEWER:
        prompt = published(name).prompt([USER, text.as_message(), SUN])
        assert '{"city":"Bern"}' in prompt.text
