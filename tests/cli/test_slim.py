"""``lowvram slim``: the promised JSON; every mistake one line, nothing left behind."""

import json

import pytest

from lowvram_lab.packaged import sample_text
from tests.helpers.commands import run_command as run
from tests.slimming.tiny import ROWS, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text(sample_text(), encoding="utf-8")
    write(place / "model", "Qwen's", "qwen2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(place / "cache"))
        yield place


def slim(capsys, folder, output, *words, text="text.txt", source="model"):
    return run(capsys, "slim", "--input", folder / source, "--output", output, "--text", folder / text, *words)


def test_it_prints_one_document_and_prose_beside_it(folder, tmp_path, capsys):
    status, out, err = slim(capsys, folder, tmp_path / "out", "--vocab", "text", "--json")
    found = json.loads(out)
    promised = "output vocab_before vocab_after weight_bytes source_weight_bytes needed_tokens tokens_of_text seconds"
    assert status == 0 and set(f"{promised} peak_rss_bytes reduction".split()) <= set(found)
    assert f"{found['vocab_after']:,} of {ROWS:,} tokens" in err and f"next: lowvram chat {tmp_path}" in err


def test_without_json_prose_is_on_stdout(folder, tmp_path, capsys):
    status, out, err = slim(capsys, folder, tmp_path / "out", "--vocab", "1.625k")
    assert (status, err) == (0, "") and "1,664 of 1,984 tokens" in out


def test_several_texts_are_one(folder, tmp_path, capsys):
    (folder / "more.txt").write_text("ZEBRA")
    slim(capsys, folder, tmp_path / "out", "--vocab", "text", "--text", folder / "more.txt")
    said = json.loads((tmp_path / "out" / "slim.json").read_text("utf-8"))
    assert [text["name"] for text in said["texts"]] == ["text.txt", "more.txt"]


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (["--vocab", "many"], {}, "expected a whole number of tokens above zero"),
        (["--vocab", "0"], {}, "expected a whole number of tokens above zero"),
        ([], {}, "one of the arguments --vocab --layers --weight-bytes is required"),
        (["--vocab", "64"], {}, "tokens, found 64; ask for"),
        (["--vocab", "16k"], {}, "there is nothing to remove"),
        (["--vocab", "text"], {"text": "nowhere.txt"}, "expected a text in UTF-8"),
        (["--vocab", "text"], {"source": "nowhere"}, "no such file or directory"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, words, options, said):
    status, out, err = slim(capsys, folder, tmp_path / "out", *words, **options)
    assert (status, out) == (2, "") and said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
