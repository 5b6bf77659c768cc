"""Cancelling a generation at any point leaves nothing behind."""

import numpy as np
import pytest

import dsfp4

TOKENS = 24


@pytest.fixture(scope="module")
def model():
    return dsfp4.Model("demo")


def run(model, prompt=range(3, 11), **options):
    return model.generate(prompt, max_tokens=TOKENS, temperature=0.9, seed=7, **options)


def cancel_after(count):
    seen = []

    def on_token(token):
        seen.append(token)
        return len(seen) < count

    return on_token


def check_cancellations(model, times):
    whole = run(model, stop_ids=[]).tokens
    assert len(whole) == TOKENS
    for after in np.random.default_rng(times).integers(1, TOKENS, times):
        result = run(model, stop_ids=[], on_token=cancel_after(after))
        assert result.finish_reason == "cancelled"
        assert result.tokens == whole[:after]
    assert run(model, stop_ids=[]).tokens == whole


def test_cancelled_at_random_tokens(model):
    check_cancellations(model, 20)


@pytest.mark.full
def test_cancelled_a_thousand_times(model):
    check_cancellations(model, 1000)


def test_cancelled_during_prefill(model):
    whole = run(model, range(3, 300)).tokens
    seen = []
    assert run(model, range(3, 300), on_prefill=lambda *step: seen.append(step)).tokens == whole
    assert sorted(set(seen)) == [(0, 297), (192, 297), (297, 297)]
    assert len(seen) > 20  # asked between layers and groups of experts, not once a chunk
    for last in (1, 2, 5, len(seen) - 1):
        steps = []

        def on_prefill(done, total, steps=steps, last=last):
            steps.append((done, total))
            return len(steps) < last

        result = run(model, range(3, 300), on_prefill=on_prefill)
        assert result.finish_reason == "cancelled"
        assert result.tokens == []
        assert steps == seen[:last]
    assert run(model, range(3, 300)).tokens == whole


def test_exception_of_a_callback_reaches_the_caller(model):
    def fail(token):
        raise KeyError(token)

    before = run(model).tokens
    with pytest.raises(KeyError):
        run(model, on_token=fail)
    assert run(model).tokens == before


def test_callbacks_may_return_nothing(model):
    seen = []
    assert run(model, on_token=seen.append).tokens == seen
