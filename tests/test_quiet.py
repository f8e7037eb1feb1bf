"""One progress bar at a time: transformers' bars and chatter are off while ours run, and come back as they were."""

import logging
import re
import threading

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, modeling_gguf_pytorch_utils
from transformers.utils import logging as chatter

from lowvram_lab.model.source import find_source
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.repository.gguf import convert_gguf
from tests.helpers.checkpoints import write_model
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import tiny_config
from tests.model.test_source import LLAMA

NESTED = "\x1b[A"  # what tqdm writes to leave the line of an inner bar


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def outspoken():
    """transformers as talkative as a user may have made it."""
    before = chatter.get_verbosity()
    chatter.set_verbosity_info()
    chatter.enable_propagation()
    yield
    chatter.disable_propagation()
    chatter.set_verbosity(before)


def bars(text: str) -> set[str]:
    """Names of the progress bars in what was written on stderr."""
    return set(re.findall(r"([^\r\n|]+?):?\s+\d+%\|", text))


def tiny_gguf(folder):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).to(torch.bfloat16).float()
    write_gguf(folder / "tiny.gguf", model)
    return folder / "tiny.gguf"


def test_converting_a_gguf_shows_one_bar(tmp_path, capfd, caplog, outspoken):
    (tmp_path / "out").mkdir()
    caplog.set_level(logging.DEBUG, logger="")
    file = tiny_gguf(tmp_path)
    capfd.readouterr()
    caplog.clear()
    convert_gguf(file, tmp_path / "out")
    out, err = capfd.readouterr()
    assert bars(err) == {"converting GGUF"} and NESTED not in err
    assert out == ""
    assert [record for record in caplog.records if record.name.startswith("transformers")] == []
    assert len(find_source(tmp_path / "out").tokenizer()) == 260  # what was kept quiet was done


def test_opening_a_tokenizer_shows_nothing(tmp_path, capfd, outspoken):
    source = find_source(write_model(tmp_path / "m"))
    capfd.readouterr()
    source.tokenizer()
    assert capfd.readouterr() == ("", "")


def test_saving_a_model_shows_nothing(tmp_path, capfd):
    model = LlamaForCausalLM(tiny_config("llama"))
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert capfd.readouterr() == ("", "")
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert bars(capfd.readouterr().err) == {"Loading weights"}  # on again


def settings():
    bars = chatter.is_progress_bar_enabled(), chatter._tqdm_hook, modeling_gguf_pytorch_utils.tqdm
    return chatter.get_verbosity(), *bars


@pytest.mark.parametrize("bars_on", [True, False])
@pytest.mark.parametrize("verbosity", [logging.DEBUG, logging.WARNING, logging.CRITICAL])
def test_the_users_own_settings_come_back(bars_on, verbosity):
    first, hub = settings(), are_progress_bars_disabled()
    try:
        chatter.set_verbosity(verbosity)
        (chatter.enable_progress_bar if bars_on else chatter.disable_progress_bar)()
        mine, hubs = settings(), are_progress_bars_disabled()
        with pytest.raises(KeyError), quiet_transformers(), quiet_transformers():
            assert chatter.get_verbosity() == logging.ERROR
            raise KeyError
        assert settings() == mine and are_progress_bars_disabled() == hubs
    finally:
        chatter.set_verbosity(first[0])
        (chatter.disable_progress_bar if hub else chatter.enable_progress_bar)()


def test_of_two_threads_the_last_one_to_end_restores():
    before = settings()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with quiet_transformers():
            first_in.set()
            second_in.wait(30)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(30)
    with quiet_transformers():
        second_in.set()
        first_out.wait(30)
        assert chatter.get_verbosity() == logging.ERROR and settings() != before
    thread.join()
    assert settings() == before
