"""Every place of a model's files that holds token ids: found, and changed."""

from lowvram_lab.slimming.tokenizer_cut import (
    cut_tokenizer,
    ids_found,
    with_added_ids,
    with_setting_ids,
    with_tokenizer_ids,
)

SETTINGS = {
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": -1,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 4,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[8], [9, 10]],
    "force_words_ids": [[[11], [12]], [13]],
    "forced_decoder_ids": [[1, 14], [2, None]],
    "sequence_bias": [[[15, 16], -2.5]],
    "text_config": {"image_token_id": 17, "hidden_size": 18},
    "max_new_tokens": 19,
    "use_cache": True,
    "vocab_size": 20,
}


def test_settings():
    assert ids_found(with_setting_ids, SETTINGS) == set(range(1, 18))
    changed = with_setting_ids(SETTINGS, lambda index: index + 100)
    assert changed == {
        "bos_token_id": 101,
        "eos_token_id": [102, 103],
        "pad_token_id": -1,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 104,
        "suppress_tokens": [105, 106],
        "begin_suppress_tokens": [107],
        "bad_words_ids": [[108], [109, 110]],
        "force_words_ids": [[[111], [112]], [113]],
        "forced_decoder_ids": [[1, 114], [2, None]],
        "sequence_bias": [[[115, 116], -2.5]],
        "text_config": {"image_token_id": 117, "hidden_size": 18},
        "max_new_tokens": 19,
        "use_cache": True,
        "vocab_size": 20,
    }
    assert with_setting_ids({"forced_decoder_ids": None, "sequence_bias": None}, hash) == {
        "forced_decoder_ids": None,
        "sequence_bias": None,
    }


def tokenizer(**changes) -> dict:
    template = {"type": "TemplateProcessing", "single": [], "pair": []}
    special = {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}}
    roberta = {"type": "RobertaProcessing", "sep": ["</s>", 5], "cls": ["<s>", 4]}
    steps = [{"type": "ByteLevel"}, {**template, "special_tokens": special}, roberta]
    return {
        "added_tokens": [{"id": 5, "content": "</s>"}, {"id": 4, "content": "<s>"}],
        "post_processor": {"type": "Sequence", "processors": steps},
        "padding": {"pad_id": 5, "pad_token": "</s>"},
        "model": {"vocab": {"a": 0, "b": 1, "ab": 2, "aab": 3}, "merges": ["a b", "a ab"]},
        **changes,
    }


def test_the_tokenizer_is_cut_everywhere():
    assert ids_found(with_tokenizer_ids, tokenizer()) == {4, 5}
    found = cut_tokenizer(tokenizer(), {0: 0, 1: 1, 2: 2, 4: 3, 5: 4})
    assert found["model"] == {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    assert found["added_tokens"] == [{"id": 3, "content": "<s>"}, {"id": 4, "content": "</s>"}]
    _, template, roberta = found["post_processor"]["processors"]
    assert template["special_tokens"] == {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}
    assert (roberta["sep"], roberta["cls"]) == (["</s>", 4], ["<s>", 3])
    assert found["padding"] == {"pad_id": 4, "pad_token": "</s>"}


def test_pairs_stay_pairs():
    model = {"vocab": {"a": 0, "b": 1, "ab": 2, "aab": 3}, "merges": [["a", "b"], ["a", "ab"]]}
    found = cut_tokenizer(tokenizer(model=model, post_processor=None, padding=None), {0: 0, 1: 1, 2: 2, 4: 3, 5: 4})
    assert found["model"]["merges"] == [["a", "b"]]
    assert found["post_processor"] is found["padding"] is None


def test_added_tokens_go_by_their_ids():
    config = {"added_tokens_decoder": {"4": {"content": "<s>"}}, "bos_token": "<s>"}
    assert ids_found(with_added_ids, config) == {4}
    assert with_added_ids(config, {4: 3}.get) == {"added_tokens_decoder": {"3": {"content": "<s>"}}, "bos_token": "<s>"}
    assert with_added_ids({"bos_token": "<s>"}, {}.get) == {"bos_token": "<s>"}
