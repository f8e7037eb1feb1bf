"""What begins a text, read off tokenizers of every kind; windows that begin with it."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from lowvram_lab.repository.text import begins_with, equal_windows, first_ids, plain_ids, windows_in_words
from lowvram_lab.weights.calibration import LEAST_TOKENS, calibration_windows
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.trained import TRAINED, write_tokenizer

NAMES = ["<unk>", "<s>", "</s>", "[gMASK]", "<sop>"]
TEMPLATE = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BYTES = processors.ByteLevel(trim_offsets=False)


def opened(folder, processor=None, **config):
    """A tokenizer of bytes, opened from a directory with this post-processor and these settings."""
    alphabet = [*NAMES, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(NAMES)
    if processor is not None:
        backend.post_processor = processor
    backend.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return AutoTokenizer.from_pretrained(folder)


KINDS = {
    "none, as GPT-2 and Qwen": (None, {}, []),
    "bytes alone": (BYTES, {}, []),
    "a template": (TEMPLATE, {}, [1]),
    "a template among others, as Llama 3": (processors.Sequence([BYTES, TEMPLATE]), {}, [1]),
    "a template whatever the settings say": (TEMPLATE, {"add_bos_token": False}, [1]),
    "settings alone": (None, {"add_bos_token": True}, [1]),
    "settings beside a step that adds nothing": (BYTES, {"add_bos_token": True}, [1]),
    "settings without a token": (None, {"add_bos_token": True, "bos_token": None}, []),
    "settings against it": (None, {"add_bos_token": False}, []),
    "a class that passes over the template": (TEMPLATE, {"tokenizer_class": "GPTNeoXTokenizer"}, [1]),
    "such a class, a template among others": (
        processors.Sequence([BYTES, TEMPLATE]),
        {"tokenizer_class": "GPTNeoXTokenizer"},
        [1],
    ),
    "two tokens, as GLM": (
        processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 3), ("<sop>", 4)]),
        {"bos_token": None},
        [3, 4],
    ),
    "one before and one after": (
        processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
        {"eos_token": "</s>"},
        [1],
    ),
    "one after alone, as T5": (
        processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]),
        {"eos_token": "</s>"},
        [],
    ),
    "as RoBERTa": (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), {}, [1]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_begins_a_text(tmp_path, kind):
    processor, config, expected = KINDS[kind]
    tokenizer = opened(tmp_path, processor, **config)
    assert first_ids(tokenizer) == expected
    assert begins_with(tokenizer) == ("".join(NAMES[index] for index in expected) or None)


def test_what_the_opened_tokenizer_does_comes_first(tmp_path):
    """A user's own switch, and files that are gone."""
    tokenizer = opened(tmp_path)
    assert first_ids(tokenizer) == []
    tokenizer.add_bos_token = True
    assert first_ids(tokenizer) == [1]
    tokenizer.add_bos_token = False
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    assert first_ids(tokenizer) == []
    assert begins_with(tiny_tokenizer()) is None  # made in memory


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Kind → tokenizer as stock transformers opens it, each with BOS in its post-processor or in its settings."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in TRAINED:
        write_tokenizer(folder / kind, kind, begins=True)
    return {kind: AutoTokenizer.from_pretrained(folder / kind) for kind in TRAINED}


@given(st.sampled_from(sorted(TRAINED)), st.text(max_size=60).filter(str.strip))
@settings(max_examples=300, deadline=None)
def test_a_texts_ids_are_stock_transformers_own_with_bos_taken_off(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    whole = tokenizer(text)["input_ids"]
    assert first_ids(tokenizer) == [1]
    assert plain_ids(tokenizer, text).tolist() == (whole if kind == "mistral" else whole[1:])


@given(st.integers(1, 300), st.integers(0, 2), st.integers(3, 64))
@settings(max_examples=300, deadline=None)
def test_windows_of_equal_length_each_begin_anew(length, begun, window):
    ids, first = torch.arange(10, 10 + length), [1, 2][:begun]
    rows = equal_windows(ids, first, window)
    body = min(window - begun, length)
    assert rows.shape == (length // body, begun + body)
    assert rows.dtype == torch.int64
    assert rows[:, :begun].tolist() == [first] * len(rows)
    assert rows[:, begun:].flatten().tolist() == ids[: length // body * body].tolist()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_calibration_begins_each_window_as_the_checkpoint_says(tokenizers, tmp_path, kind):
    text = "Some words to calibrate on, and some more of them. " * 200
    ids = plain_ids(tokenizers[kind], text)
    windows = calibration_windows(tokenizers[kind], text, 10**6, 128)
    assert windows.shape == (len(ids) // 127, 128)
    assert set(windows[:, 0].tolist()) == {1}
    assert windows[:, 1:].flatten().tolist() == ids[: len(ids) // 127 * 127].tolist()
    few = calibration_windows(tokenizers[kind], text, LEAST_TOKENS, 128)
    assert few.shape == (LEAST_TOKENS // 128, 128)
    write_tokenizer(tmp_path, kind, begins=False)
    without = calibration_windows(AutoTokenizer.from_pretrained(tmp_path), text, 10**6, 128)
    assert without.flatten().tolist() == ids[: len(ids) // 128 * 128].tolist()


def test_what_a_figure_says_of_its_windows():
    assert windows_in_words(512, "<s>") == "in windows of 512 with <s> before each"
    assert windows_in_words(128, None) == "in windows of 128 with nothing before each"
