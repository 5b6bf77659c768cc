"""Tools, options and the switch of thoughts: variables of chat templates."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from dsfp4 import DeepseekInference
from dsfp4.chat import ChatTemplate
from dsfp4.errors import ParameterError
from fixtures.real_tokenizers import NEWER, OLDER

USER = {"role": "user", "content": "Weather?"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


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
