"""DeepseekInference on the demo model, and the package that it comes in."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import dsfp4
from dsfp4 import DeepseekInference
from dsfp4.errors import CheckpointError, Dsfp4Error, ParameterError, UnsupportedError
from dsfp4.sampling import Sampling, recommended_sampling
from dsfp4.text import Text

PROMPT = "And the king said unto"


def test_importing_the_package_is_cheap() -> None:
    program = "import dsfp4, sys; print({'numpy', 'tokenizers', 'jinja2'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_the_package_has_no_other_attributes() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        dsfp4.no_such_name  # noqa: B018


def test_text_is_the_decoded_tokens(demo: DeepseekInference) -> None:
    text = demo.generate(PROMPT, max_tokens=12, temperature=0, raw=True)
    ids = demo.tokenizer.encode_prompt(PROMPT)
    assert text == demo.tokenizer.decode(demo.model.generate(ids, max_tokens=12).tokens)


def test_streamed_pieces_join_to_the_text(demo: DeepseekInference) -> None:
    options: dict[str, Any] = {"max_tokens": 16, "temperature": 1.0, "seed": 7}
    stream = demo.generate(PROMPT, stream=True, **options, raw=True)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == demo.generate(PROMPT, **options, raw=True)
    assert stream.result is not None
    assert demo.tokenizer.decode(stream.result.tokens) == "".join(pieces)


def test_ids_are_used_as_they_are(demo: DeepseekInference) -> None:
    ids = demo.tokenizer.encode_prompt(PROMPT)
    assert demo.generate(ids, 8, 0) == demo.generate(PROMPT, 8, 0, raw=True)


def test_seeds(demo: DeepseekInference) -> None:
    texts = [demo.generate(PROMPT, 24, 1.5, seed=seed, raw=True) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert demo.generate(PROMPT, 24, 1.5, raw=True) != demo.generate(PROMPT, 24, 1.5, raw=True)


def test_the_checkpoint_recommends_how_to_sample(demo: DeepseekInference, demo_model: Path) -> None:
    assert recommended_sampling(demo_model) == Sampling(temperature=0.7, top_k=0, top_p=0.95)
    explicit = demo.generate(PROMPT, 16, 0.7, top_k=0, top_p=0.95, seed=3, raw=True)
    assert demo.generate(PROMPT, 16, seed=3, raw=True) == explicit


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, Sampling()),
        ({}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.95}, Sampling(0.6, 0, 0.95)),
        ({"temperature": 0.6, "do_sample": False, "top_k": 50}, Sampling(0.0, 50, 1.0)),
        ({"temperature": None}, Sampling()),
    ],
)
def test_recommendations(tmp_path: Path, config: Any, expected: Sampling) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert recommended_sampling(tmp_path) == expected


@pytest.mark.parametrize("bad", [{"temperature": "hot"}, {"top_p": 2}, {"top_k": -1}])
def test_bad_recommendations_are_named(tmp_path: Path, bad: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(bad))
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as error:
        recommended_sampling(tmp_path)
    assert error.value.tensor in bad


def test_closing_a_stream_leaves_the_model_usable(demo: DeepseekInference) -> None:
    expected = demo.generate(PROMPT, 8, 0, raw=True)
    with demo.generate(PROMPT, 2000, 1.0, seed=1, stream=True, raw=True) as stream:
        next(stream)
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"
    assert demo.generate(PROMPT, 8, 0, raw=True) == expected


def test_generating_while_a_stream_is_open(demo: DeepseekInference) -> None:
    expected = demo.generate(PROMPT, 8, 0, raw=True)
    stream = demo.generate(PROMPT, 8, 0, stream=True, raw=True)
    first = next(stream)
    assert demo.generate(PROMPT, 8, 0, raw=True) == expected
    assert first + "".join(stream) == expected


def test_several_threads(demo: DeepseekInference) -> None:
    expected = demo.generate(PROMPT, 12, 1.0, seed=4, raw=True)
    texts: list[str] = []

    def work() -> None:
        texts.append(demo.generate(PROMPT, 12, 1.0, seed=4, raw=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 4


BAD_ARGUMENTS = [
    {"temperature": -1},
    {"temperature": float("nan")},
    {"temperature": 10**400},
    {"top_p": 0},
    {"top_p": 1.5},
    {"top_k": -1},
    {"top_k": 1.5},
    {"max_tokens": -1},
    {"max_tokens": 2**63},
    {"max_tokens": True},
    {"seed": -1},
    {"seed": 2**64},
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS, ids=repr)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_arguments(demo: DeepseekInference, arguments: dict[str, Any], stream: bool) -> None:
    with pytest.raises(ParameterError) as error:
        "".join(demo.generate(PROMPT, stream=stream, **arguments, raw=True))
    assert error.value.parameter == next(iter(arguments))
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("prompt", [[], [4096], [-1], [0.5], "\ud800"], ids=repr)
def test_bad_prompts(demo: DeepseekInference, prompt: Any) -> None:
    with pytest.raises(ParameterError):
        demo.generate(prompt, 4)


def test_an_empty_prompt_without_a_begin_token(demo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"add_bos_token": False})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    with DeepseekInference(folder) as model, pytest.raises(ParameterError, match="empty") as error:
        model.generate("", raw=True)
    assert error.value.parameter == "prompt"


def test_close_ends_everything(demo_model: Path) -> None:
    with DeepseekInference(demo_model, max_context=4095) as model:
        assert model.model.max_context == 4095
        stream = model.generate(PROMPT, 4000, 1.0, seed=1, stream=True, raw=True, stop_ids=[])
        next(stream)
    assert list(stream) == []
    with pytest.raises(Dsfp4Error, match="closed"):
        model.generate(PROMPT, raw=True)
    model.close()


def test_close_is_an_error_for_who_waits_in_another_thread(demo_model: Path) -> None:
    model = DeepseekInference(demo_model)
    errors: list[BaseException] = []
    first_token = threading.Event()

    def work() -> None:
        try:
            model.generate(PROMPT, 4000, 1.0, raw=True, stop_ids=[])
        except BaseException as error:
            errors.append(error)

    generate = model.model.generate

    def seen(ids: Any, *, on_token: Any, **options: Any) -> Any:
        return generate(ids, on_token=lambda id: (first_token.set(), on_token(id))[1], **options)

    model.model.generate = seen  # type: ignore[method-assign]
    thread = threading.Thread(target=work)
    thread.start()
    assert first_token.wait(60)
    model.close()
    thread.join(60)
    assert [type(error) for error in errors] == [Dsfp4Error]
    assert "closed" in str(errors[0])


def test_close_ends_streams_that_wait_for_their_turn(demo_model: Path) -> None:
    with DeepseekInference(demo_model) as model:
        # The first holds the turn until its callback, which waits for the end of the second.
        second_ended = threading.Event()
        first_runs = threading.Event()
        waited: list[bool] = []

        def hold(id: int) -> bool:
            first_runs.set()
            waited.append(second_ended.wait(60))
            return False

        holder = threading.Thread(
            target=model.model.generate, args=([1, 2],), kwargs=dict(max_tokens=4, on_token=hold)
        )
        holder.start()
        assert first_runs.wait(60)
        second = model.generate(PROMPT, 8, raw=True, stream=True)
        model.close()
        second_ended.set()
        holder.join()
    assert waited == [True]
    assert second.result is not None
    assert second.result.finish_reason == "cancelled"


QUESTION = "What is a file system?"


def test_a_string_is_a_users_turn(demo: DeepseekInference) -> None:
    text = demo.generate(QUESTION, 24, seed=3)
    assert isinstance(text, Text)
    assert text == demo.chat([{"role": "user", "content": QUESTION}], 24, seed=3)
    prompt = f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜><think>\n"
    ids = demo.tokenizer.encode(prompt)
    recommended = {"temperature": 0.7, "top_p": 0.95}
    result = demo.model.generate(ids, max_tokens=24, seed=3, **recommended)
    assert text.tokens == result.tokens
    assert text.prompt_tokens == len(ids)
    assert text.finish_reason == result.finish_reason
    thoughts, _, answer = demo.tokenizer.decode(result.tokens).partition("</think>")
    assert (text, text.reasoning) == (answer.lstrip(), thoughts.strip())
    assert text.prefill_seconds > 0 < text.decode_seconds


def let_it_think(model: DeepseekInference) -> dict[str, Any]:
    """Options by which `model` closes its thoughts sooner or later."""
    return {"max_tokens": 40, "temperature": 1.0, "seed": 2, "logit_bias": {4095: 12.0}}


def test_reasoning_is_beside_the_answer(demo: DeepseekInference) -> None:
    options = let_it_think(demo)
    text = demo.generate(QUESTION, **options)
    assert 4095 in text.tokens
    thoughts, _, answer = demo.tokenizer.decode(text.tokens).partition("</think>")
    assert (text.reasoning, text) == (thoughts.strip(), answer.lstrip())
    with demo.generate(QUESTION, stream=True, **options) as stream:
        pieces = list(stream)
    assert "".join(piece for piece in pieces if piece.kind == "answer") == text == stream.result
    assert "".join(piece for piece in pieces if piece.kind == "reasoning") == text.reasoning
    assert stream.result is not None and stream.result.reasoning == text.reasoning


def test_stop_strings_do_not_end_thoughts(demo: DeepseekInference) -> None:
    options = let_it_think(demo) | {"logit_bias": None}
    thoughts = demo.generate(QUESTION, **options).reasoning
    assert demo.generate(QUESTION, stop=thoughts[:5], **options).reasoning == thoughts


def test_a_list_of_prompts(demo: DeepseekInference) -> None:
    prompts = [PROMPT, "In the", PROMPT]
    texts = demo.generate(prompts, 8, 0, raw=True)
    assert texts == [demo.generate(prompt, 8, 0, raw=True) for prompt in prompts]
    assert [demo.generate([QUESTION], 8, 0)[0].reasoning] == [
        demo.generate(QUESTION, 8, 0).reasoning
    ]
    with pytest.raises(ParameterError, match="streamed"):
        demo.generate(prompts, stream=True)  # type: ignore[call-overload]
    with pytest.raises(ParameterError, match=r"prompt\[1\]"):
        demo.generate(["a", 3])  # type: ignore[list-item]


def test_logprobs_come_with_the_text(demo: DeepseekInference) -> None:
    text = demo.generate(PROMPT, 12, 0, raw=True, logprobs=3)
    assert [entry.id for entry in text.logprobs] == text.tokens
    assert all(entry.top[0] == (entry.id, entry.logprob) for entry in text.logprobs)
    assert all(len(entry.top) == 3 for entry in text.logprobs)
    assert demo.generate(PROMPT, 12, 0, raw=True).logprobs == []
    stop = text[8:14]
    stopped = demo.generate(PROMPT, 12, 0, raw=True, logprobs=3, stop=stop)
    assert [entry.id for entry in stopped.logprobs] == stopped.tokens


def test_the_options_reach_the_sampler(demo: DeepseekInference) -> None:
    greedy = demo.generate(PROMPT, 12, 0, raw=True)
    first = greedy.tokens[0]
    forbidden = demo.generate(PROMPT, 12, 0, raw=True, logit_bias={first: float("-inf")})
    assert first not in forbidden.tokens
    assert demo.generate(PROMPT, 12, 2.0, raw=True, min_p=1.0) == greedy
    assert demo.generate(PROMPT, 12, 0, raw=True, stop_ids=[first]).tokens == []
    assert demo.generate(PROMPT, 12, 0, raw=True, repetition_penalty=100.0) != greedy


def test_ctrl_c_leaves_the_model_usable(demo: DeepseekInference) -> None:
    expected = demo.generate(PROMPT, 8, 0, raw=True)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            demo.generate(PROMPT, 2000, 1.0, raw=True, stop_ids=[])
    timer.join()
    assert demo.generate(PROMPT, 8, 0, raw=True) == expected


def test_bad_conversations_and_switches(demo: DeepseekInference) -> None:
    with pytest.raises(ParameterError, match=r"messages\[1\]\.role"):
        demo.chat([{"role": "user", "content": "a"}, {"role": "king", "content": "b"}])
    for prompt, options in ((PROMPT, {"raw": True}), ([5, 6], {})):
        with pytest.raises(ParameterError, match="chat template"):
            demo.generate(prompt, thinking=True, **options)
    with pytest.raises(ParameterError, match="cannot switch"):
        demo.generate(PROMPT, thinking=False)


def test_without_a_chat_template(demo_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with DeepseekInference(folder, kv_cache_dtype="fp8") as model:
        assert model.chat_template is None
        assert model.generate(PROMPT, 8, 0) == model.generate(PROMPT, 8, 0, raw=True)
        with pytest.raises(UnsupportedError, match="chat_template"):
            model.chat([{"role": "user", "content": "a"}])
    with pytest.raises(ParameterError, match="kv_cache_dtype"):
        DeepseekInference(folder, kv_cache_dtype="int4")
