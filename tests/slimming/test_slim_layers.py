"""A directory with fewer layers: stock transformers and this library say the same, interrupted anywhere, or refused."""

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.conversion.convert import convert
from lowvram_lab.engine.load import load
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.slimming import slim_layers as module
from lowvram_lab.slimming.heal import PASSES, heal
from lowvram_lab.slimming.slim_layers import CUT, HEALED, REPAIRED, slim_layers
from tests.helpers.checkpoints import read_state, write_model
from tests.helpers.commands import run_command
from tests.helpers.killed_run import Killed, contents, killer
from tests.helpers.tiny import SIZES, random_ids, tiny_state, tiny_tokenizer

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
    made = run(source, tmp_path / "out", [1], stage=CUT)
    ids = random_ids(60)
    assert made.removed == (1,) and set(made.kl) == {CUT} and made.explained == {}
    assert torch.equal(stock(tmp_path / "out", ids), stock(source, ids, without={1}))
    before, after = read_state(source), read_state(tmp_path / "out")
    assert {tensor.dtype for tensor in before.values()} == {tensor.dtype for tensor in after.values()}
    assert made.source_weight_bytes == sum(tensor.nbytes for tensor in before.values())
    assert made.weight_bytes == sum(tensor.nbytes for tensor in after.values()) < made.source_weight_bytes


def test_repaired_and_healed_are_nearer_on_text_that_neither_has_seen(source, tmp_path):
    made = run(source, tmp_path / "out", 1, stage=HEALED)
    assert list(made.kl) == list(made.kl_interval) == [CUT, REPAIRED, HEALED]
    assert made.kl[CUT] > made.kl[REPAIRED] and made.kl[CUT] > made.kl[HEALED] > 0
    assert all(low <= made.kl[stage] <= high for stage, (low, high) in made.kl_interval.items())
    assert len(made.removed) == 1 and made.kl_tokens > 100
    found = json.loads((tmp_path / "out" / "slim.json").read_text())
    assert found["kl"] == made.kl and found["removed"] == list(made.removed)
    assert len(found["healing"]["kl_while_learning"]) == PASSES and found["healing"]["tokens"] == found["text_tokens"]
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
        run(llama, tmp_path / "whole", 1, stage=HEALED)
    expected, stages = contents(tmp_path / "whole"), len(calls)
    assert stages >= 7 and not any(name.startswith("state") for name in expected)
    for count in range(1, stages + 1):
        output = tmp_path / str(count)
        with pytest.MonkeyPatch.context() as patch:
            killer(patch, "_adopt", count)
            with pytest.raises(Killed):
                run(llama, output, 1, stage=HEALED)
        assert not output.exists()
        run(llama, output, 1, stage=HEALED)
        assert contents(output) == expected, count


def test_no_room_for_what_healing_keeps_is_said_before_it_begins(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "state_bytes", lambda *_: 2**60)
    monkeypatch.setattr(module, "heal", lambda *_, **__: pytest.fail("begun"))
    with pytest.raises(LowvramError, match="the state of healing needs"):
        run(llama, tmp_path / "out", 1, stage=HEALED)


def test_what_is_written_is_what_was_learnt_added_to_the_weights(llama, tmp_path, monkeypatch):
    learnt = []
    monkeypatch.setattr(module, "heal", lambda *args, **options: learnt.append(heal(*args, **options)) or learnt[0])
    run(llama, tmp_path / "repaired", [1], referee=False)
    run(llama, tmp_path / "out", [1], stage=HEALED, referee=False)
    repaired, healed = read_state(tmp_path / "repaired"), read_state(tmp_path / "out")
    changes = {name.replace("layers.2", "layers.1"): change for name, change in learnt[0].changes.items()}
    assert len(changes) == 14
    for name, weight in repaired.items():
        if name not in changes:
            assert torch.equal(healed[name], weight), name
        else:
            expected = changes[name].added_to(weight)
            assert not torch.equal(healed[name], weight)
            rounded = 2**-8 * (weight.float().abs() + expected.abs())  # as repaired, and as healed
            assert bool(((healed[name].float() - expected).abs() <= rounded).all()), name


@pytest.mark.parametrize("layers", [0, 3, -1, [], [3], [1, 1], ["1"], [1, "0"], "1", True, [0, 1, 2]])
def test_layers_that_there_are_not_are_refused_at_once(llama, tmp_path, layers):
    with pytest.raises(LowvramError, match="^expected"):
        run(llama, tmp_path / "out", layers)
    assert not list(tmp_path.glob("*out*"))


def test_a_stage_that_there_is_not_is_refused(llama, tmp_path):
    with pytest.raises(LowvramError, match="expected a stage of cut, repaired, healed, found 'both'"):
        run(llama, tmp_path / "out", 1, stage="both")


def test_the_referee_measures_both_on_the_text_that_the_stages_are_measured_on(llama, tmp_path):
    made = run(llama, tmp_path / "out", [1])
    found, rival = made.referee, made.referee["rival"]
    assert found["kl"] == made.kl[REPAIRED] and found["tokens"] == rival["tokens"] == made.kl_tokens
    assert found["weight_bytes"] == made.weight_bytes >= rival["weight_bytes"]
    assert found["winner"] == "quantising" and rival["kl"] < found["kl"]  # a third of a model of random weights
    assert made.summary().endswith(": quantising wins") and found["summary"] in made.summary()
    assert found["summary"] in (tmp_path / "out" / "README.md").read_text()
    alone = run(llama, tmp_path / "alone", [1], referee=False)
    assert alone.referee is None and alone.kl == made.kl and "wins" not in alone.summary()


def test_what_was_chosen_and_fitted_is_of_use_in_another_way(llama, tmp_path, monkeypatch):
    expected = {}
    for stage in (CUT, REPAIRED):
        run(llama, tmp_path / stage, 1, stage=stage)
        expected[stage] = contents(tmp_path / stage)
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, "publish", 1)
        with pytest.raises(Killed):
            run(llama, tmp_path / "out", 1)
    monkeypatch.setattr(module, "choose_layers", lambda *_, **__: pytest.fail("chosen once more"))
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, "publish", 1)
        with pytest.raises(Killed):
            run(llama, tmp_path / "out", 1, stage=CUT)
    assert contents(tmp_path / ".out.partial").keys() >= {"state/repair.safetensors", "model.safetensors"}
    monkeypatch.setattr(module, "repair", lambda *_, **__: pytest.fail("fitted once more"))
    run(llama, tmp_path / "out", 1)
    assert contents(tmp_path / "out") == expected[REPAIRED] != expected[CUT]


def test_what_a_class_derives_from_a_layers_index_stays_with_the_layer(tmp_path):
    """SmolLM3 leaves rotary positions out of every fourth layer, and need not say of which."""
    sizes = {**SIZES, "num_hidden_layers": 5, "tie_word_embeddings": True, "use_sliding_window": False}
    config = AutoConfig.for_model("smollm3", **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "smollm3", torch_dtype=torch.float32)
    tiny_tokenizer().save_pretrained(tmp_path / "smollm3")
    file = tmp_path / "smollm3" / "config.json"
    values = json.loads(file.read_text())
    for key in ("no_rope_layers", "layer_types"):
        values.pop(key, None)
    file.write_text(json.dumps(values))
    run(tmp_path / "smollm3", tmp_path / "out", [1], stage=CUT)
    ids = random_ids(60)
    expected = stock(tmp_path / "smollm3", ids, without={1})
    assert torch.equal(stock(tmp_path / "out", ids), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["no_rope_layers"] == [1, 1, 0, 1]


def idle(folder):
    """A model whose second layer adds nothing."""
    state = tiny_state("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.1.{name}.weight"] = torch.zeros_like(state[f"model.layers.1.{name}.weight"])
    return write_model(folder / "idle", "llama", state=state)


def test_a_repair_that_changes_nothing_is_not_sought_again(tmp_path, monkeypatch):
    source = idle(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "rival_of", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(source, tmp_path / "out", [1])
    monkeypatch.setattr(module, "repair", lambda *_, **__: pytest.fail("sought again"))
    assert run(source, tmp_path / "out", [1]).explained == {0: 0.0}


def test_a_layer_that_adds_nothing_costs_nothing_and_needs_no_repair(tmp_path):
    source = idle(tmp_path)
    made = run(source, tmp_path / "out", [1])
    assert made.kl == {CUT: 0.0, REPAIRED: 0.0} and made.explained == {0: 0.0}
    assert "cut 0.0000, repaired 0.0000" in made.summary()
    before, after = read_state(source), read_state(tmp_path / "out")
    assert torch.equal(after["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"])


def test_a_text_that_is_none_is_refused_before_weights_are_fetched(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "checkpoint", lambda *_: pytest.fail("weights were fetched"))
    with pytest.raises(LowvramError, match="expected a text in UTF-8"):
        run(llama, tmp_path / "out", 1, text=tmp_path / "nowhere.txt")


def test_layers_that_cannot_be_repaired_are_refused_before_any_is_chosen(tmp_path, monkeypatch):
    """Gemma 2 norms what its last linear module says."""
    sizes = {**SIZES, "head_dim": 32, "final_logit_softcapping": None, "layer_types": ["full_attention"] * 3}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **sizes))
    model.save_pretrained(tmp_path / "gemma2")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma2")
    monkeypatch.setattr(module, "choose_layers", lambda *_, **__: pytest.fail("chosen first"))
    with pytest.raises(LowvramError, match="scaled or normed first; leave the repair out"):
        run(tmp_path / "gemma2", tmp_path / "out", 1)
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
    status, out, _ = run_command(capsys, *words[:-1], tmp_path / "two", "--layers", "1", "--no-repair", "--no-referee")
    assert "referee" not in out
    assert status == 0 and "2 of 3 layers, without" in out and "next: lowvram chat" in out
    for extra, expected in (
        ((), "one of the arguments"),
        (("--layers", "x"), "expected a number of layers"),
        (("--layers", "9"), "expected 1 to 2 layers to leave out"),
        (("--vocab", "text", "--heal"), "--no-repair and --heal go with --layers"),
        (("--layers", "1", "--heal", "--no-repair"), "not allowed with"),
        (("--layers", "1", "--text", "a", "--text", "b"), "takes one --text"),
        (("--layers", "1", "--vocab", "text"), "not allowed with"),
    ):
        status, out, err = run_command(capsys, *words[:-1], tmp_path / "three", *extra)
        assert status == 2 and out == "" and expected in err and len(err.splitlines()) == 1, err
