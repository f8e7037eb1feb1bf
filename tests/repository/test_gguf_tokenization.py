"""Texts in tokens by the tokenizer that is read from a GGUF file, beside llama.cpp's own on the same file."""

import unicodedata

import pytest

from lowvram_lab.conversion.gguf_export import export_gguf
from lowvram_lab.errors import CheckpointError
from lowvram_lab.model.source import find_source
from lowvram_lab.repository.builtin import default_file
from lowvram_lab.repository.gguf_header import read_gguf_header
from lowvram_lab.repository.gguf_tokenizer import OTHER_NAMES, PRE_TOKENIZERS, UNNAMED, read_tokenizer
from tests.conversion.test_gguf_export import byte_level, make_model, open_in_llama_cpp, sentencepiece
from tests.slimming.tiny import texts

FEW, MANY = 200, 10_000
NAMES = [*PRE_TOKENIZERS.values(), UNNAMED]
OTHERS = [*(name for names in OTHER_NAMES.values() for name in names), "tekken", "gpt-4o", "llama3", "deepseek-r1-qwen"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    """A file whose text is split as GPT-2's."""
    folder = tmp_path_factory.mktemp("tokens")
    export_gguf(
        make_model(folder / "m", "llama", byte_level("gpt-2")), folder / "m.gguf", tensor_type="q8_0", progress=False
    )
    return (folder / "m.gguf").read_bytes()


def splitting(written: bytes, name: str, path):
    """The same file with another name of a pre-tokenizer. Of its tensors nothing is read, so they may lie elsewhere."""
    key = b"tokenizer.ggml.pre"
    at = written.index(key) + len(key) + 4  # behind the value's type
    old = int.from_bytes(written[at : at + 8], "little")
    new = len(name).to_bytes(8, "little") + name.encode()
    path.write_bytes(written[:at] + new + written[at + 8 + old :] + bytes(64))
    return path


def differing(path, count: int) -> list[str]:
    """Texts that llama.cpp reads as other tokens."""
    theirs = open_in_llama_cpp(path, vocab_only=True)
    ours = read_tokenizer(read_gguf_header(path), path)
    read = (unicodedata.normalize("NFC", text) for text in texts(count, seed=5))  # GGUF has no word of normalising
    return [t for t in read if theirs.tokenize(t.encode(), add_bos=True, special=True) != ours(t)["input_ids"]]


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_each_way_to_split_a_text_is_llama_cpps(written, tmp_path, name, count):
    pytest.importorskip("llama_cpp")
    assert differing(splitting(written, name, tmp_path / "m.gguf"), count) == []


@pytest.mark.parametrize("name", OTHERS)
def test_so_are_their_other_names(written, tmp_path, name):
    pytest.importorskip("llama_cpp")
    assert differing(splitting(written, name, tmp_path / "m.gguf"), FEW) == []


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_sentencepieces_are_llama_cpps(tmp_path, count):
    pytest.importorskip("llama_cpp")
    model = make_model(tmp_path / "m", tokenizer=sentencepiece(), vocab_size=2048, eos_token_id=2)
    export_gguf(model, tmp_path / "m.gguf", tensor_type="q8_0", progress=False)
    assert differing(tmp_path / "m.gguf", count) == []


@pytest.mark.slow
@pytest.mark.integration
def test_the_built_in_models_tokens_are_llama_cpps():
    pytest.importorskip("llama_cpp")
    path = default_file(False)
    assert differing(path, MANY) == []
    theirs, ours = open_in_llama_cpp(path, vocab_only=True), find_source(path).tokenizer()
    for text in texts(FEW, seed=6):
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == ours(text)["input_ids"], text


def test_a_way_to_split_that_is_not_known_is_refused_by_its_name(written, tmp_path):
    path = splitting(written, "of tomorrow", tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="m.gguf: its text is split as 'of tomorrow' asks for, .* not known here"):
        read_tokenizer(read_gguf_header(path), path)


def test_a_file_that_names_none_is_warned_of(written, tmp_path, caplog):
    path = splitting(written, UNNAMED, tmp_path / "m.gguf")
    tokenizer = read_tokenizer(read_gguf_header(path), path)
    assert tokenizer.decode(tokenizer("a 12")["input_ids"]) == "a 12"
    assert "m.gguf: names no pre-tokenizer: text is split as llama.cpp does then" in caplog.text
