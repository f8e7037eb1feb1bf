"""A directory with fewer layers: stock transformers and this library say the same, interrupted anywhere, or refused."""

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.conversion.convert import convert
from lowvram_lab.engine.load import load
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.slimming.slim_layers import CUT, HEALED, REPAIRED, slim_layers
from tests.helpers.checkpoints import read_state, write_model
from tests.helpers.commands import run_command
from tests.helpers.killed_run import Killed, contents, killer
from tests.helpers.tiny import random_ids

KINDS = ["llama", "qwen2"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def run(source, output, layers, **options):
    return slim_layers(str(source), output, layers, **{"tokens": 2048, "progress": False, **options})


@torch.no_grad()
def stock(directory, ids, without=()):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in without]
    model.model.layers = torch.nn.ModuleList(kept)
    return torch.log_softmax(model(ids, use_cache=False).logits, -1)


def kl(found, expected):
    return F.kl_div(found, expected, reduction="batchmean", log_target=True).item() / found.shape[1]


def test_cut_alone_is_the_stock_model_without_those_layers(source, tmp_path):
    made = run(source, tmp_path / "out", [1], repaired=False)
    ids = random_ids(60)
    assert made.removed == (1,) and set(made.kl) == {CUT} and made.explained == {}
    assert torch.equal(stock(tmp_path / "out", ids), stock(source, ids, without={1}))
    before, after = read_state(source), read_state(tmp_path / "out")
    assert {tensor.dtype for tensor in before.values()} == {tensor.dtype for tensor in after.values()}
    assert made.source_weight_bytes == sum(tensor.nbytes for tensor in before.values())
    assert made.weight_bytes == sum(tensor.nbytes for tensor in after.values()) < made.source_weight_bytes


def test_repaired_and_healed_are_nearer_on_text_that_neither_has_seen(source, tmp_path):
    made = run(source, tmp_path / "out", 1, healed=True)
    assert list(made.kl) == [CUT, REPAIRED, HEALED]
    assert made.kl[CUT] > made.kl[REPAIRED] and made.kl[CUT] > made.kl[HEALED] > 0
    alone = run(source, tmp_path / "alone", list(made.removed), repaired=False, healed=True)
    assert list(alone.kl) == [CUT, HEALED] and alone.kl[CUT] == pytest.approx(made.kl[CUT])
    assert alone.kl[HEALED] < alone.kl[CUT]  # by healing, and nothing else
    assert len(made.removed) == 1 and made.kl_tokens > 100
    found = json.loads((tmp_path / "out" / "slim.json").read_text())
    assert found["kl"] == made.kl and found["removed"] == list(made.removed)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"without {made.removed[0]}" in card and f"healed | {made.kl[HEALED]:.4f}" in card
    assert made.output in made.summary() and "of it gone" in made.summary()


def test_every_engine_opens_it_and_says_the_same(source, tmp_path):
    run(source, tmp_path / "out", [1])
    found = find_source(str(tmp_path / "out"))
    tokenizer = found.tokenizer()
    model = load(Plan.uniform(found.spec(), "fp32", context=256, dtype="fp32"), open_gpu(None), progress=False)
    ids = random_ids(40)
    with torch.no_grad():
        ours = torch.log_softmax(model(ids).logits, -1)
    assert torch.allclose(ours, stock(tmp_path / "out", ids), atol=1e-4)
    assert isinstance(ChatSession(model, tokenizer, max_new_tokens=4).ask("hello"), str)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello")["input_ids"] == tokenizer("hello")["input_ids"]


def test_killed_at_any_stage_and_resumed_the_bytes_are_the_same(llama, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        calls = killer(patch, "_adopt", 0)
        run(llama, tmp_path / "whole", 1, healed=True)
    expected, stages = contents(tmp_path / "whole"), len(calls)
    assert stages >= 7 and not any(name.startswith("state") for name in expected)
    for count in range(1, stages + 1):
        output = tmp_path / str(count)
        with pytest.MonkeyPatch.context() as patch:
            killer(patch, "_adopt", count)
            with pytest.raises(Killed):
                run(llama, output, 1, healed=True)
        assert not output.exists()
        run(llama, output, 1, healed=True)
        assert contents(output) == expected, count


@pytest.mark.parametrize("layers", [0, 3, -1, [], [3], [1, 1], ["1"], "1", True, [0, 1, 2]])
def test_layers_that_there_are_not_are_refused_at_once(llama, tmp_path, layers):
    with pytest.raises(LowvramError, match="^expected"):
        run(llama, tmp_path / "out", layers)
    assert not list(tmp_path.glob("*out*"))


def test_a_converted_model_is_refused(llama, tmp_path):
    spec = find_source(str(llama)).spec()
    convert(str(llama), tmp_path / "int8", Plan.uniform(spec, "int8", context=128), progress=False)
    with pytest.raises(LowvramError, match="is a converted model; leave layers of the 16-bit original out"):
        run(tmp_path / "int8", tmp_path / "out", 1)


def test_an_occupied_output_and_a_short_text_are_refused(llama, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(LowvramError, match="full"):
        run(llama, tmp_path / "full", 1)
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(LowvramError, match="2048 tokens or more"):
        run(llama, tmp_path / "out", 1, text=tmp_path / "short.txt")
    with pytest.raises(LowvramError, match="2048 tokens of text or more"):
        run(llama, tmp_path / "out", 1, tokens=5)


def test_the_command(capsys, llama, tmp_path):
    words = ("slim", "--input", llama, "--output", tmp_path / "out")
    status, out, _ = run_command(capsys, *words, "--layers", "1,", "--json")
    found = json.loads(out)
    assert status == 0 and found["removed"] == [1] and set(found["kl"]) == {CUT, REPAIRED}
    status, out, _ = run_command(capsys, *words[:-1], tmp_path / "two", "--layers", "1", "--no-repair")
    assert status == 0 and "2 of 3 layers, without" in out and "next: lowvram chat" in out
    for extra, expected in (
        ((), "one of the arguments"),
        (("--layers", "x"), "expected a number of layers"),
        (("--layers", "9"), "expected 1 to 2 layers to leave out"),
        (("--vocab", "text", "--heal"), "--no-repair and --heal go with --layers"),
        (("--layers", "1", "--text", "a", "--text", "b"), "takes one --text"),
        (("--layers", "1", "--vocab", "text"), "not allowed with"),
    ):
        status, out, err = run_command(capsys, *words[:-1], tmp_path / "three", *extra)
        assert status == 2 and out == "" and expected in err and len(err.splitlines()) == 1, err
