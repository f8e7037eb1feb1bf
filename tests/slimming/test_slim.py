"""Models with fewer tokens: read by stock transformers as before, to the bit; interrupted anywhere, or refused."""

import importlib
import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.conversion.convert import convert
from lowvram_lab.conversion.gguf_export import export_gguf
from lowvram_lab.engine.load import load
from lowvram_lab.errors import CheckpointError, LowvramError, SourceError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, find_source
from lowvram_lab.packaged import sample_text
from lowvram_lab.slimming import rewritten
from lowvram_lab.slimming.slim import slim_vocabulary
from tests.helpers.checkpoints import read_state, spoilt_state, write_model
from tests.helpers.killed_run import Killed, contents, killer
from tests.helpers.tiny import seeded, tiny_spec
from tests.slimming.tiny import KINDS, ROWS, SPECIALS, texts, tokenizer_of, write

module = importlib.import_module("lowvram_lab.slimming.small_files")

MODELS = {"Qwen's": "qwen2", "GPT-2's": "llama", "whole words": "llama", "byte fallback": "llama"}
FEW, MANY = 400, 10_000


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("slim")
    (place / "text.txt").write_text(sample_text(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(place / "cache"))
        yield place


def run(source, output, vocab="text", **options):
    options = {"texts": source.parent / "text.txt", "progress": False, **options}
    return slim_vocabulary(str(source), output, vocab=vocab, **options)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, folder):
    """A model's directory, the one with fewer tokens, and old id → new id."""
    source, output = folder / request.param, folder / f"{request.param} slim"
    write(source, request.param, MODELS[request.param], dtype=torch.float32)
    run(source, output)
    return source, output, new_ids(output)


def new_ids(output) -> dict[int, int]:
    kept = json.loads((output / "slim.json").read_text("utf-8"))["kept_ids"]
    return {old: index for index, old in enumerate(kept)}


def json_of(folder, name) -> dict:
    return json.loads((folder / name).read_text("utf-8"))


def compared(before, after, new, count) -> tuple[int, int]:
    """Reads texts by both; how many have tokens that all stayed, and how many have others."""
    covered = others = 0
    for text in texts(count):
        old, read = before(text)["input_ids"], after(text)["input_ids"]
        if all(index in new for index in old):
            assert read == [new[index] for index in old], text
            covered += 1
        else:
            assert after.decode(read) == before.decode(old), text
            others += 1
    return covered, others


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_texts_whose_tokens_stay_are_read_as_before_and_all_others_whole(pair, count):
    source, output, new = pair
    covered, others = compared(AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(output), new, count)
    assert covered > count / 4 and others > count / 8


def test_the_tokenizers_library_reads_it_so_too(pair):
    source, output, new = pair
    before, after = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (source, output))
    covered = 0
    for text in texts(FEW, seed=1):
        old, read = before.encode(text).ids, after.encode(text).ids
        if all(index in new for index in old):
            assert read == [new[index] for index in old]
            covered += 1
    assert covered > FEW / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_of_what_stays_are_the_same_bits_in_stock_transformers(pair, dtype):
    source, output, new = pair
    before, after = (AutoModelForCausalLM.from_pretrained(place, dtype=dtype).eval() for place in (source, output))
    kept = sorted(new)
    old = torch.tensor([kept[:: len(kept) // 70]])
    read = torch.tensor([[new[index] for index in old[0].tolist()]])
    expected, found = (m(i, output_hidden_states=True) for m, i in ((before, old), (after, read)))
    assert torch.equal(found.logits, expected.logits[..., kept])
    assert torch.equal(found.hidden_states[-1], expected.hidden_states[-1])
    assert found.logits.shape[-1] == len(kept) < ROWS


def test_only_embedding_and_head_lose_rows(pair):
    source, output, new = pair
    before, after = read_state(source), read_state(output)
    assert before.keys() == after.keys()
    cut = [name for name in before if before[name].shape != after[name].shape]
    assert set(cut) == {"model.embed_tokens.weight", "lm_head.weight"} & before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value[sorted(new)] if name in cut else value)
        assert after[name].dtype == value.dtype


def test_texts_and_chats_need_nothing_that_went(pair):
    source, output, new = pair
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(output)
    assert set(before(sample_text())["input_ids"]) <= set(new)
    for system in ([], [{"role": "system", "content": "You are a helpful assistant."}]):
        chat = [*system, {"role": "user", "content": "What is 2 + 2?"}]
        old, read = (t.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for t in (before, after))
        assert read == [new[index] for index in old]


def test_every_id_in_the_files_is_the_same_token_as_before(pair):
    source, output, _ = pair
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(output)
    name_of = after.convert_ids_to_tokens
    for special in SPECIALS:
        assert name_of(after.convert_tokens_to_ids(special)) == special
    assert [t.content for _, t in sorted(after.added_tokens_decoder.items())] == [
        t.content for _, t in sorted(before.added_tokens_decoder.items())
    ]
    config, generation = json_of(output, "config.json"), GenerationConfig.from_pretrained(output)
    stops = {"bos_token_id": "<s>", "eos_token_id": "<|im_end|>", "pad_token_id": "</s>"}
    assert {key: name_of(config[key]) for key in stops} == stops
    assert [name_of(index) for index in generation.eos_token_id] == ["<|im_end|>", "</s>"]
    old = before.convert_ids_to_tokens
    assert [name_of(i) for i in generation.suppress_tokens] == [old(1000), old(1001)]
    assert [[name_of(i) for i in word] for word in generation.bad_words_ids] == [[old(1003), old(1004)]]
    pairs = json_of(output, "generation_config.json")["forced_decoder_ids"]
    assert pairs[1] == [2, None] and pairs[0][0] == 1 and name_of(pairs[0][1]) == old(1002)
    assert generation.max_new_tokens == 77


def test_it_says_what_it_did(folder, pair):
    source, output, new = pair
    made = run(source, folder / f"{source.name} again")
    assert contents(output) == contents(folder / f"{source.name} again")
    assert (made.vocab_before, made.vocab_after) == (ROWS, len(new)) and len(new) % 64 == 0
    assert made.tokens_of_text < made.needed_tokens <= made.vocab_after
    assert made.weight_bytes == sum(value.nbytes for value in read_state(output).values())
    assert made.source_weight_bytes == sum(value.nbytes for value in read_state(source).values())
    assert made.to_dict()["reduction"] == made.reduction > 0.05
    assert f"{made.vocab_after:,} of {ROWS:,}" in made.summary()
    said = json_of(output, "slim.json")
    assert said["texts"][0]["name"] == "text.txt" and len(said["texts"][0]["sha256"]) == 64
    assert f"{made.vocab_after:,} of {ROWS:,}" in (output / "README.md").read_text("utf-8")


def test_it_chats_here(pair):
    _, output, _ = pair
    source = find_source(output)
    gpu = open_gpu("1000MiB")
    loaded = load(Plan.uniform(source.spec(), "bf16", context=512), gpu, checkpoint=source.checkpoint(), progress=False)
    answer = ChatSession(loaded, source.tokenizer(), max_new_tokens=8, progress=False).ask("What is 2 + 2?")
    assert isinstance(answer, str)


def test_it_becomes_a_gguf_file_where_the_original_does(pair, tmp_path):
    source, output, new = pair
    if source.name in ("byte fallback", "whole words"):  # llama.cpp has no name for what splits or merges these
        for place in (source, output):
            with pytest.raises(SourceError, match="cannot be written as GGUF"):
                export_gguf(place, tmp_path / "m.gguf", progress=False)
        return
    made = export_gguf(output, tmp_path / "m.gguf", progress=False)
    assert made.file_bytes == (tmp_path / "m.gguf").stat().st_size > 2 * 128 * len(new)


def test_a_number_is_rounded_up_and_reads_more_texts_as_before(folder, pair):
    source, output, new = pair
    larger = folder / f"{source.name} 1700"
    assert run(source, larger, vocab=1700).vocab_after == 1728
    before = AutoTokenizer.from_pretrained(source)
    few, _ = compared(before, AutoTokenizer.from_pretrained(output), new, FEW)
    more, _ = compared(before, AutoTokenizer.from_pretrained(larger), new_ids(larger), FEW)
    assert more > few


@pytest.fixture
def in_shards(monkeypatch):
    monkeypatch.setattr(rewritten, "SHARD_BYTES", 2**18)


@pytest.fixture(scope="module")
def source(folder):
    """Untied, with biases, in bfloat16."""
    return write(folder / "source", "Qwen's", "qwen2")


def test_killed_at_any_stage_and_resumed_the_bytes_are_the_same(in_shards, source, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        calls = killer(patch, "_adopt", 0)
        run(source, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in expected) > 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for stage, count in [*(("_adopt", n) for n in range(1, len(calls) + 1)), ("publish", 1)]:
        output = tmp_path / f"{stage}-{count}"
        with pytest.MonkeyPatch.context() as patch:
            killer(patch, stage, count)
            with pytest.raises(Killed):
                run(source, output)
        assert not output.exists()
        run(source, output)
        assert contents(output) == expected, (stage, count)


def test_what_is_finished_is_not_written_again(in_shards, source, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        killer(patch, "save_tensors", 3)
        with pytest.raises(Killed):
            run(source, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        calls = killer(patch, "save_tensors", 0)
        run(source, tmp_path / "out")
    assert calls[0][0].startswith("model-00003-of-")


def changed(source, folder, name, **values):
    """A copy of a directory with one JSON file changed."""
    shutil.copytree(source, folder)
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), encoding="utf-8")
    return folder


def changed_model(source, folder, **values):
    model = json_of(source, "tokenizer.json")["model"]
    return changed(source, folder, "tokenizer.json", model={**model, **values})


def refused(source, output, error=LowvramError, **options) -> str:
    """The one line that a call is refused with; nothing is left behind."""
    text = options.pop("texts", None) if "texts" in options else source.parent / "text.txt"
    beside = set(output.parent.iterdir())
    with pytest.raises(error) as found:
        slim_vocabulary(str(source), output, **{"vocab": "text", "texts": text, "progress": False, **options})
    assert set(output.parent.iterdir()) == beside
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("vocab", [0, -64, True, 16.5, "16k", None])
def test_a_number_that_is_none_is_refused(source, tmp_path, vocab):
    assert "expected a number of tokens above zero" in refused(source, tmp_path / "out", vocab=vocab)


def test_fewer_than_the_text_needs_are_refused_with_the_number(source, folder, tmp_path):
    said = refused(source, tmp_path / "out", vocab=512)
    needed = run(source, folder / "needed").needed_tokens
    assert f"{needed} tokens, found 512" in said


def test_more_than_there_are_are_refused(source, tmp_path):
    assert "nothing to remove" in refused(source, tmp_path / "out", vocab=16384)
    assert "nothing to remove" in refused(source, tmp_path / "out", vocab=ROWS)


@pytest.mark.parametrize("text", ["", "   \n" * 1000, "too short"])
def test_a_text_that_says_nothing_is_refused(source, tmp_path, text):
    (tmp_path / "short.txt").write_text(text)
    said = refused(source, tmp_path / "out", texts=[tmp_path / "short.txt"])
    assert "expected a text of 1024 letters or more" in said
    assert "no file" in refused(source, tmp_path / "out", texts=[])


def test_a_text_that_is_none_is_refused(source, tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe" * 1000)
    assert "expected a text in UTF-8" in refused(source, tmp_path / "out", texts=tmp_path / "bytes.txt")
    assert "expected a text in UTF-8" in refused(source, tmp_path / "out", texts=tmp_path / "nowhere.txt")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bytes.txt").write_text("a")
    (tmp_path / "bytes.txt").write_text("a")
    twice = [tmp_path / "bytes.txt", tmp_path / "a" / "bytes.txt"]
    assert "different names" in refused(source, tmp_path / "out", texts=twice)


def test_an_occupied_output_is_refused(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    assert "new or empty directory" in refused(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dropout": 0.1}, "BPE with dropout"),
        ({"end_of_word_suffix": "</w>"}, "BPE with end_of_word_suffix"),
        ({"continuing_subword_prefix": "##"}, "BPE with continuing_subword_prefix"),
        ({"type": "Unigram"}, "Unigram"),
        ({"type": "WordPiece"}, "WordPiece"),
        ({"type": "WordLevel"}, "WordLevel"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_name(source, folder, tmp_path, values, said):
    other = changed_model(source, tmp_path / "other", **values)
    assert said in refused(other, tmp_path / "out", SourceError, texts=folder / "text.txt")


def test_pairs_of_letters_without_bytes_are_refused(source, folder, tmp_path):
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    other = tmp_path / "other"
    shutil.copytree(source, other)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(other)
    assert "expected tokens for bytes" in refused(other, tmp_path / "out", SourceError, texts=folder / "text.txt")


def test_a_directory_without_tokenizer_json_is_refused(source, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "tokenizer.json").rename(other / "tokenizer.model")
    said = refused(other, tmp_path / "out", SourceError, texts=folder / "text.txt")
    assert "expected tokenizer.json, found tokenizer.model" in said


def test_a_converted_model_is_refused(folder, tmp_path):
    original = write_model(tmp_path / "original", "llama")
    plan = Plan.uniform(tiny_spec("llama"), "int8", context=64)
    convert(str(original), tmp_path / "int8", plan, calibration_tokens=2048, solver="rtn", progress=False)
    assert "is a converted model" in refused(tmp_path / "int8", tmp_path / "out", texts=folder / "text.txt")


def test_tokens_beyond_the_rows_are_refused(source, folder, tmp_path):
    beyond = changed(source, tmp_path / "beyond", "generation_config.json", suppress_tokens=[ROWS + 3])
    said = refused(beyond, tmp_path / "out", CheckpointError, texts=folder / "text.txt")
    assert f"token {ROWS + 3} has no row among the embedding's {ROWS}" in said


def test_a_token_that_was_added_without_a_row_is_named(source, folder, tmp_path):
    added = [*json_of(source, "tokenizer.json")["added_tokens"]]
    added.append({**added[-1], "id": ROWS, "content": "<|extra|>"})
    beyond = changed(source, tmp_path / "beyond", "tokenizer.json", added_tokens=added)
    said = refused(beyond, tmp_path / "out", CheckpointError, texts=folder / "text.txt")
    assert f"'<|extra|>' was added to the tokenizer and has no row among the embedding's {ROWS}" in said


@pytest.mark.parametrize("values", [{"model": None}, {"model": []}, {"added_tokens": {}}])
def test_a_tokenizer_json_without_a_model_is_refused(source, folder, tmp_path, values):
    other = changed(source, tmp_path / "other", "tokenizer.json", **values)
    said = refused(other, tmp_path / "out", SourceError, texts=folder / "text.txt")
    assert "tokenizer.json: expected a model and added tokens" in said


def test_a_text_that_does_not_fit_is_refused_before_weights_are_fetched(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "checkpoint", lambda *_: pytest.fail("weights were fetched"))
    assert "found 512" in refused(source, tmp_path / "out", vocab=512)
    assert "nothing to remove" in refused(source, tmp_path / "out", vocab=ROWS)
    assert "expected a text in UTF-8" in refused(source, tmp_path / "out", texts=tmp_path / "nowhere.txt")


def test_damaged_weights_are_refused(folder, tmp_path):
    source = write(tmp_path / "whole", "Qwen's", "qwen2")
    state = spoilt_state(read_state(source), "model.layers.1.mlp.up_proj.weight", None)
    write(tmp_path / "damaged", "Qwen's", "qwen2", state=state)
    said = refused(tmp_path / "damaged", tmp_path / "out", CheckpointError, texts=folder / "text.txt")
    assert "expected a tensor model.layers.1.mlp.up_proj.weight" in said


def test_files_that_hold_the_old_vocabulary_once_more_are_left_out(source, tmp_path):
    """Stock opens tokenizer.json; beside it a reader of the older files would find other ids."""
    other = tmp_path / "other"
    shutil.copytree(source, other)
    shutil.copy(source.parent / "text.txt", tmp_path)
    values = json_of(source, "tokenizer.json")
    (other / "vocab.json").write_text(json.dumps(values["model"]["vocab"]))
    (other / "merges.txt").write_text("\n".join(values["model"]["merges"]))
    added = {token["content"]: token["id"] for token in values["added_tokens"]}
    (other / "added_tokens.json").write_text(json.dumps(added))
    changed_config = json_of(source, "tokenizer_config.json") | {"tokenizer_class": "Qwen2Tokenizer"}
    changed_config["added_tokens_decoder"] = {str(t["id"]): {**t, "id": None} for t in values["added_tokens"]}
    for token in changed_config["added_tokens_decoder"].values():
        del token["id"]
    (other / "tokenizer_config.json").write_text(json.dumps(changed_config))
    run(other, tmp_path / "out")
    assert not {"vocab.json", "merges.txt"} & {file.name for file in (tmp_path / "out").iterdir()}
    before, after = AutoTokenizer.from_pretrained(other), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(after).__name__ == "Qwen2Tokenizer"
    compared(before, after, new_ids(tmp_path / "out"), FEW)
    for token, index in json_of(tmp_path / "out", "added_tokens.json").items():
        assert after.convert_tokens_to_ids(token) == index
        assert (
            json_of(tmp_path / "out", "tokenizer_config.json")["added_tokens_decoder"][str(index)]["content"] == token
        )


def test_tokens_that_only_transformers_adds_get_ids_within_the_rows(source, tmp_path):
    shutil.copy(source.parent / "text.txt", tmp_path)
    other = changed(source, tmp_path / "other", "tokenizer_config.json", pad_token="<|padding|>")
    assert AutoTokenizer.from_pretrained(other).pad_token_id >= 1900
    made = run(other, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.pad_token == "<|padding|>" and found.pad_token_id < made.vocab_after


def test_a_head_that_differs_where_the_config_ties_is_cut_by_itself(folder, tmp_path, caplog):
    shutil.copy(folder / "text.txt", tmp_path)
    source = write(tmp_path / "source", "Qwen's", "qwen2")
    config = changed(source, tmp_path / "tied", "config.json", tie_word_embeddings=True)
    run(config, tmp_path / "out")
    assert json_of(tmp_path / "out", "config.json")["tie_word_embeddings"] is False
    kept = sorted(new_ids(tmp_path / "out"))
    head = read_state(source)["lm_head.weight"]
    assert torch.equal(read_state(tmp_path / "out")["lm_head.weight"], head[kept])


def test_ids_that_the_config_leaves_to_transformers_are_written(folder, tmp_path):
    shutil.copy(folder / "text.txt", tmp_path)
    source = write(tmp_path / "source", "Qwen's", "llama")
    values = json_of(source, "config.json")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.pop(key)
    (source / "config.json").write_text(json.dumps(values))
    (source / "generation_config.json").unlink()
    run(source, tmp_path / "out")
    new, stock = new_ids(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (stock.bos_token_id, stock.eos_token_id) == (new[1], new[2])  # LlamaConfig's own


def test_a_token_that_only_transformers_adds_and_no_row_has_is_left_to_it(folder, tmp_path):
    shutil.copy(folder / "text.txt", tmp_path)
    tokens = len(tokenizer_of("Qwen's"))
    source = write(tmp_path / "source", "Qwen's", "qwen2", rows=tokens)
    other = changed(source, tmp_path / "other", "tokenizer_config.json", pad_token="<|padding|>")
    assert AutoTokenizer.from_pretrained(other).pad_token_id == tokens
    made = run(other, tmp_path / "out")
    assert max(new_ids(tmp_path / "out")) < tokens
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id >= made.vocab_after


OTHERS = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},  # a table of positions
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 8},  # a head with biases
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16},  # scaled embeddings, capped logits
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_other_architectures_compute_the_same_bits(folder, tmp_path, kind):
    sizes = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    sizes = OTHERS[kind] if "n_embd" in OTHERS[kind] else {**sizes, **OTHERS[kind]}
    stops = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=ROWS, **stops, **sizes))
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(seeded(*parameter.shape, seed=number) * 0.05)
    shutil.copy(folder / "text.txt", tmp_path)
    model.save_pretrained(tmp_path / kind)
    tokenizer_of("GPT-2's").save_pretrained(tmp_path / kind)
    run(tmp_path / kind, tmp_path / "out")
    kept = sorted(new_ids(tmp_path / "out"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in (kind, "out"))
    ids = torch.arange(0, len(kept), len(kept) // 60)[None]
    assert torch.equal(after(ids).logits, before(torch.tensor(kept)[ids]).logits[..., kept])


def test_a_repository_s_tokenizer_is_refused_before_its_weights_are_fetched(source, tmp_path, monkeypatch):
    other = changed_model(source, tmp_path / "other", type="Unigram")
    asked = []
    monkeypatch.setattr(module.hub, "snapshot", lambda name, patterns, **_: asked.append(patterns) or other)
    said = refused("some/model", tmp_path / "out", SourceError, texts=source.parent / "text.txt")
    assert "some/model: expected byte-pair merges" in said
    assert not any("*.safetensors" in patterns for patterns in asked[-1:])


@pytest.mark.slow
@pytest.mark.integration
@torch.no_grad()
def test_the_built_in_model(tmp_path):
    source = find_source("smollm2-135m")
    directory = source.fetch(False)
    slim_vocabulary("smollm2-135m", tmp_path / "out", progress=False)
    new = new_ids(tmp_path / "out")
    before, after = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(tmp_path / "out")
    covered, others = compared(before, after, new, MANY)
    assert covered > MANY / 2 and others > MANY / 10
    old = [index for index in before(sample_text())["input_ids"] if index in new][:256]
    for dtype in (torch.float32, torch.bfloat16):
        stock = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        slim = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
        expected = stock(torch.tensor([old])).logits[..., sorted(new)]
        assert torch.equal(slim(torch.tensor([[new[index] for index in old]])).logits, expected)
