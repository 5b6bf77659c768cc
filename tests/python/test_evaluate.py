"""Perplexity and divergence against their definitions in float64."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsfp4 import DeepseekInference
from dsfp4.cli import main
from dsfp4.errors import Dsfp4Error, IoError, ParameterError
from dsfp4.evaluate import compare_rows, evaluate, read_documents

TEXT = "And the king said unto the people: what is this that ye have done? " * 3
TEXTS = [TEXT, "A file system keeps files.\nIt has folders.", ""]


def probabilities(logits: Any) -> Any:
    exact = np.exp(logits.astype(np.float64))
    return exact / exact.sum(axis=-1, keepdims=True)


def test_rows_by_definition() -> None:
    random = np.random.default_rng(3)
    logits, others = random.standard_normal((2, 50, 9)).astype(np.float32) * 3
    targets = random.integers(0, 9, 50)
    p, q = probabilities(logits), probabilities(others)
    rows = compare_rows(logits, targets, others)
    np.testing.assert_allclose(rows["nll"], [-np.log(p[i, t]) for i, t in enumerate(targets)])
    np.testing.assert_allclose(rows["other_nll"], [-np.log(q[i, t]) for i, t in enumerate(targets)])
    np.testing.assert_allclose(rows["divergence"], (q * np.log(q / p)).sum(axis=1))
    assert rows["agreed"].tolist() == (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    same = compare_rows(logits, targets, logits)
    np.testing.assert_allclose(same["divergence"], 0, atol=1e-12)
    assert same["agreed"].all()
    large = compare_rows(logits + np.float32(1000), targets)
    np.testing.assert_allclose(large["nll"], rows["nll"], rtol=1e-3)


@pytest.mark.parametrize(("first", "window"), [(0, 1024), (30, 1024), (0, 16), (17, 8), (2, 2)])
def test_windows_and_positions(demo: DeepseekInference, first: int, window: int) -> None:
    expected: list[tuple[int, float]] = []  # position in its window, -log p
    for text in TEXTS:
        ids = demo.tokenizer.encode(text)
        ids = ids[: first - 1] if first else ids
        for at in range(0, len(ids), window - 1):
            part = [demo.tokenizer.bos_id, *ids[at : at + window - 1]]
            p = probabilities(demo.model.forward(part[:-1]))
            expected += [(i, -np.log(p[i - 1, part[i]])) for i in range(1, len(part))]
    steps: list[tuple[int, int]] = []
    result = evaluate(
        demo, TEXTS, first=first, window=window, progress=lambda *step: steps.append(step)
    )
    assert result.documents == 3
    assert result.total.tokens == len(expected)
    assert steps[-1] == (len(expected), len(expected))
    figures = result.as_dict()
    mean = np.mean([nll for _, nll in expected])
    assert figures["nats_per_token"] == pytest.approx(mean)
    assert figures["perplexity"] == pytest.approx(np.exp(mean))
    assert "kl_divergence" not in figures
    for row in figures["by_position"]:
        values = [nll for at, nll in expected if row["from"] <= at <= row["to"]]
        assert row["tokens"] == len(values)
        assert row["nats_per_token"] == pytest.approx(np.mean(values))
    assert sum(row["tokens"] for row in figures["by_position"]) == len(expected)


def test_against(demo: DeepseekInference) -> None:
    """BF16 activations and an FP8 cache against FP32: close, and not the same."""
    with DeepseekInference("demo", "reference", kv_cache_dtype="fp8") as other:
        result = evaluate(demo, [TEXT], against=other, first=40)
        ids = demo.tokenizer.encode_prompt(TEXT)[:40]
        p = probabilities(demo.model.forward(ids[:-1]))
        q = probabilities(other.model.forward(ids[:-1]))
    figures = result.as_dict()
    assert figures["kl_divergence"] == pytest.approx((q * np.log(q / p)).sum(axis=1).mean())
    assert 1e-6 < figures["kl_divergence"] < 0.2
    assert figures["top1_agreement"] == np.mean(p.argmax(axis=1) == q.argmax(axis=1))
    assert figures["perplexity_ratio"] == pytest.approx(
        figures["perplexity"] / figures["against_perplexity"]
    )


def test_different_tokenizers_are_refused(demo: DeepseekInference) -> None:
    class Other:
        model = demo.model

        class tokenizer:
            bos_id, add_bos_token = 1, True
            encode = staticmethod(lambda text: [5, 6, 7])

    with pytest.raises(Dsfp4Error, match="different tokenizers"):
        evaluate(demo, [TEXT], against=Other())  # type: ignore[arg-type]


def test_nothing_to_predict(demo: DeepseekInference) -> None:
    with pytest.raises(ParameterError) as error:
        evaluate(demo, [""])
    assert error.value.parameter == "file"


def test_documents(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text, "source": "x"}) for text in TEXTS) + "\n\n"
    separators = json.dumps({"text": "a\u2028b\x0cc"}, ensure_ascii=False)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "s.jsonl").write_text(separators)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert read_documents(tmp_path / "a.txt") == read_documents(tmp_path / "b.txt.gz") == [TEXT]
    assert read_documents(tmp_path / "a.jsonl") == TEXTS
    assert read_documents(tmp_path / "a.jsonl.gz") == TEXTS
    assert read_documents(tmp_path / "s.jsonl") == ["a\u2028b\x0cc"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"text": "a"}\n{', "line 2 of"),
        (b'{"text": 3}', "line 1 of"),
        (b'["text"]', "line 1 of"),
        (b"[" * 100_000, "line 1 of"),
        (b'{"text": "\xff"}', "not UTF-8 text at byte 10"),
        (gzip.compress(b'{"text": "abc"}', mtime=0)[:-6], "not sound gzip"),
        (b"\x1f\x8bxxxxxxxxxxxx", "not sound gzip"),
    ],
)
def test_malformed_documents(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ParameterError, match=problem) as error:
        read_documents(path)
    assert error.value.parameter == "file"


def test_a_small_file_that_unpacks_to_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsfp4.evaluate._MOST_BYTES", 1 << 20)
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    assert read_documents(tmp_path / "a.gz") == ["\0" * (1 << 20)]
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes((1 << 20) + 1)))
    with pytest.raises(ParameterError, match="unpacks to more than 1048576 bytes"):
        read_documents(tmp_path / "a.gz")


def test_logits_are_taken_in_windows(
    demo: DeepseekInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(demo, [TEXT])

    def forward(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("takes memory for the logits of all tokens")

    monkeypatch.setattr(demo.model, "forward", forward)
    assert evaluate(demo, [TEXT]) == expected


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(IoError) as error:
        read_documents(tmp_path / "none.txt")
    assert error.value.file == str(tmp_path / "none.txt")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    arguments = ["eval", "demo", str(path), "--first", "30"]
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert (figures["documents"], figures["tokens"], err) == (1, 29, "")
    assert main([*arguments, "--against", "demo", "--plot"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("1 documents, 29 tokens: ")
    assert f"{figures['nats_per_token']:.4f} nats/token" in lines[0]
    assert "MODEL's is +0.00 % from it" in lines[1]
    assert lines[2].startswith("KL divergence 0 nats/token, the same likeliest token at 100.00 %")
    assert [row.split()[0] for row in lines[5:10]] == ["1", "2-3", "4-7", "8-15", "16-31"]
    assert out.count("█" * 40) >= 6  # the longest bars: one of nats, and agreement everywhere
    assert err.startswith("29 tokens in ")
    assert err.endswith(" tokens/s on cpu\n")
