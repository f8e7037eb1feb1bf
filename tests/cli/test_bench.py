"""``lowvram bench``: a grid of lengths and batch sizes; mistakes are one line before anything is fetched or run."""

import json

import pytest

from lowvram_lab.model.source import Source
from tests.helpers.checkpoints import write_model
from tests.helpers.commands import run_command as run

MISTAKES = {
    "no prompt": (["--prompt-tokens", "0"], "number of tokens above zero"),
    "text": (["--prompt-tokens", "64,many"], "found 'many'"),
    "a comma too many": (["--prompt-tokens", "64,"], "found ''"),
    "no sequence": (["--batch", "0"], "expected a whole number above zero, found '0'"),
    "one of two": (["--batch", "1,x"], "found 'x'"),
    "far too many": (["--batch", "100000"], "expected batch_size from 1 to 1024, found 100000"),
    "longer than the model": (
        ["--prompt-tokens", "64,4k"],
        "a prompt of 4096 tokens and 82 behind it go beyond the 1024",
    ),
    "an answer longer than the model": (["--new-tokens", "2k"], "ask for fewer new tokens"),
    "longer than the context": (["--prompt-tokens", "256", "--context", "128"], "--context 128 is too short"),
    "no rounds": (["--rounds", "0"], "above zero"),
    "no such type": (["--against", "llama.cpp", "--gguf", "Q9_9"], "Q4_0"),
    "no such engine": (["--against", "vllm"], "unknown engine 'vllm'"),
    "a type for nobody": (["--against", "none", "--gguf", "Q4_0"], "is for llama.cpp"),
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return write_model(tmp_path / "model", "llama")


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_anything_slow(capsys, monkeypatch, model, words, said):
    monkeypatch.setattr(Source, "fetch", lambda *_: pytest.fail("fetched in vain"))
    status, out, err = run(capsys, "bench", model, "--format", "int8", *words)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert said in err


def test_a_grid(capsys, model):
    words = ["--format", "int8", "--against", "none", "--rounds", 1, "--new-tokens", 2, "--threads", 1]
    words += ["--prompt-tokens", "4, 8", "--batch", "1,2"]
    status, out, _ = run(capsys, "bench", model, *words, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["prompt_tokens"], found["batch_size"]) == ([4, 8], [1, 2])
    cells = [(row["prompt_tokens"], row["batch_size"]) for row in found["rows"] if row["engine"] == "lowvram"]
    assert cells == [(4, 1), (8, 1), (4, 2), (8, 2)]
    figures = {"prefill_tokens_per_s", "ttft_s", "decode_tokens_per_s", "total_tokens_per_s", "peak_rss_bytes"}
    for row in found["rows"]:
        assert row["reason"] == ""
        assert all(row[name] > 0 for name in figures)
