"""``lowvram cache``, and the options of other commands that remember prompts: what is printed, mistakes in one line."""

import json

import pytest

from lowvram_lab.model.source import Source
from lowvram_lab.prefixes import listing
from tests.helpers.checkpoints import write_model
from tests.helpers.commands import run_command as run
from tests.helpers.tiny import letters_state

CARD = ("--gpu", "100MiB", "--context", 1024, "--format", "bf16")
DISK = ("--remember", "64MiB")
SYSTEM = "You keep plants. " * 20
LINES = [
    {"system": SYSTEM},
    {"system": SYSTEM, "document": "Ferns like shade. " * 10},
    {"system": SYSTEM, "question": "what is a fern?"},
    {"system": SYSTEM, "question": "and a moss?", "answer": "also a plant"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "m", "qwen2", letters_state())


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOWVRAM_SALT", raising=False)
    return tmp_path / "cache" / "prefixes"


@pytest.fixture
def nothing_fetched(monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(Source, "fetch", fetch)


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, LINES)) + "\n")
    return file


def found(capsys, *words):
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def warmed(capsys, model, lines, *words):
    return found(capsys, "cache", "warm", model, lines, *CARD, *DISK, "--max-new-tokens", 4, *words)


def explained(capsys, model, *words, system=SYSTEM):
    return found(capsys, "cache", "explain", model, *CARD, "--prompt", "what is a fern?", "--system", system, *words)


def refused(capsys, *words):
    status, out, err = run(capsys, *words)
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    return err


def test_an_empty_cache_is_listed_and_cleared_and_not_made(capsys, cache):
    assert found(capsys, "cache", "list") == {"entries": [], "bytes": 0, "folder": str(cache)}
    assert found(capsys, "cache", "clear") == {"bytes": 0, "models": {}, "folder": str(cache)}
    assert run(capsys, "cache", "list")[1] == f"0.0 MiB in {cache}\n"
    assert not cache.exists()


def test_prompts_that_were_read_before_are_put_back_in_chats(capsys, model, lines):
    made = warmed(capsys, model, lines)
    sums = {"prompts", "tokens", "blocks_added", "blocks_without_room", "bytes", "seconds", "answers"}
    assert set(made) == {"rows", "folder", *sums}
    system, document, question, answered = made["rows"]
    assert system["blocks_added"] == system["tokens"] // 128 == 2
    assert document["blocks_added"] == document["tokens"] // 128 - 2 > 0
    assert system["answer_tokens"] == document["answer_tokens"] == 0
    assert question["answer_tokens"] == 0  # made here, where it could not be verified: it is not remembered
    assert answered["answer_tokens"] > 0 and made["answers"] == 1
    assert made["blocks_added"] == sum(row["blocks_added"] for row in made["rows"])
    words = ("chat", model, *CARD, *DISK, "--system", SYSTEM, "--max-new-tokens", 4, "--prompt")
    turn = found(capsys, *words, "a question of whom nobody thought")
    assert turn["remembered_tokens"] == 256
    _, _, err = run(capsys, *words, "another question of whom nobody thought")
    assert f"256 of {turn['prompt_tokens'] + 6} prompt tokens remembered" in err
    assert turn["missed"] == "not read before" and "remembered (not read before)" in err
    again = warmed(capsys, model, lines)
    assert again["blocks_added"] == 0 and again["rows"][1]["cached_tokens"] > 0


def test_the_table_of_what_was_read_is_on_stdout(capsys, model, lines):
    status, out, _ = run(capsys, "cache", "warm", model, lines, *CARD, *DISK, "--max-new-tokens", 4)
    assert status == 0
    head, *rows, last = out.splitlines()
    assert head.split()[:2] == ["prompt", "tokens"] and len(rows) == len(LINES)
    assert last.startswith("4 prompts, ") and "blocks added" in last and "no room" not in last


def test_where_there_is_no_room_that_is_said(capsys, model, lines):
    words = ("cache", "warm", model, lines, *CARD, "--remember", "100KiB", "--max-new-tokens", 4)
    status, out, _ = run(capsys, *words)
    assert status == 0 and "no room for" in out.splitlines()[-1]


def test_pinned_prompts_are_listed_as_such_and_stay(capsys, model, lines):
    warmed(capsys, model, lines, "--pin")
    (entry,) = found(capsys, "cache", "list")["entries"]
    assert entry["pinned"] == entry["blocks"]
    assert "found 'none'" in refused(capsys, "cache", "unpin", "--model", "none")
    assert found(capsys, "cache", "unpin", "--model", model)["blocks"] == entry["blocks"]
    assert run(capsys, "cache", "unpin")[1].startswith("0 blocks in ")
    (loose,) = found(capsys, "cache", "list")["entries"]
    assert loose == {**entry, "pinned": 0}


def test_the_list_has_a_row_for_each_model_and_root(capsys, tmp_path, model, lines, cache):
    made = warmed(capsys, model, lines)
    other = write_model(tmp_path / "other", "llama")
    warmed(capsys, other, lines)
    warmed(capsys, other, lines, "--kv", "int8")
    listed = found(capsys, "cache", "list")
    assert listed["folder"] == str(cache)
    assert listed["bytes"] == sum(file.stat().st_size for file in cache.iterdir())
    rows = {(row["model"], row["kv_format"]): row for row in listed["entries"]}
    assert set(rows) == {(str(model), "bf16"), (str(other), "bf16"), (str(other), "int8")}
    row = rows[str(model), "bf16"]
    assert row["blocks"] == made["blocks_added"] and row["tokens"] == 128 * row["blocks"]
    assert row["pinned"] == 0 and row["answers"] == 1  # given: what is made here could not be verified
    assert row["salted"] is False and row["unusable"] is None
    assert row["bytes"] > made["bytes"]  # tokens and a header, too
    _, out, _ = run(capsys, "cache", "list")
    assert str(other) in out and "MiB" in out and out.splitlines()[-1].endswith(f" in {cache}")


def test_what_this_machine_cannot_use_is_listed_with_the_reason(capsys, monkeypatch, model, lines, cache):
    warmed(capsys, model, lines)
    now = listing.machine_fields()
    monkeypatch.setattr(listing, "machine_fields", lambda: {**now, "torch": "9.9"})
    (entry,) = found(capsys, "cache", "list")["entries"]
    assert entry["unusable"] == f"torch: {now['torch']} then, 9.9 now"
    for file in cache.glob("*.safetensors"):
        file.write_bytes(b"no header")
    (entry,) = found(capsys, "cache", "list")["entries"]
    assert entry["unusable"] == "its files cannot be read: damaged"


def test_one_model_is_cleared_or_all(capsys, monkeypatch, tmp_path, model, lines, cache):
    warmed(capsys, model, lines)
    other = write_model(tmp_path / "other", "llama")
    warmed(capsys, other, lines, "--pin")
    rows = {row["model"]: row["bytes"] for row in found(capsys, "cache", "list")["entries"]}
    err = refused(capsys, "cache", "clear", "--model", "none")
    assert str(model) in err and "found 'none'" in err
    monkeypatch.chdir(tmp_path)
    cleared = found(capsys, "cache", "clear", "--model", "other")
    assert cleared["bytes"] == rows[str(other)] and cleared["models"] == {str(other): rows[str(other)]}
    assert [row["model"] for row in found(capsys, "cache", "list")["entries"]] == [str(model)]
    status, out, _ = run(capsys, "cache", "clear")
    assert status == 0 and out.startswith(f"{model}: ") and "freed in" in out
    assert found(capsys, "cache", "list")["entries"] == [] and not list(cache.glob("*.safetensors"))


def test_an_explanation_names_the_first_token_that_differs(capsys, model, lines):
    warmed(capsys, model, lines)
    whole = explained(capsys, model)
    assert whole["hit_tokens"] == 256 and whole["places"] == ["disk", "disk"]
    assert whole["reason"] is whole["differs_at"] is None and whole["answer_tokens"] == 0
    given = LINES[3]
    words = ("cache", "explain", model, *CARD, "--prompt", given["question"], "--system", SYSTEM)
    assert " of an answer; the rest is at most a block" in run(capsys, *words)[1]
    other = explained(capsys, model, system=SYSTEM[:200] + "Never" + SYSTEM[205:])
    begun = len("#system\n")  # a token each; the first stands for <|im_start|>
    assert other["hit_tokens"] == 128 and other["differs_at"] == begun + 200 and other["differs_text"] == "N"
    words = ("cache", "explain", model, *CARD, "--prompt", "x", "--system", SYSTEM[:200] + "Never" + SYSTEM[205:])
    _, out, _ = run(capsys, *words)
    assert out.startswith("128 of ") and "1 on disk" in out and "token 208" in out and "'N'" in out


def test_an_explanation_names_what_else_differs(capsys, model, lines):
    warmed(capsys, model, lines)
    assert explained(capsys, model, "--kv", "int8")["reason"] == "kv_format: bf16 then, int8 now"
    assert explained(capsys, model, "--format", "int8")["reason"] == "formats: bf16 then, int8 now"
    assert explained(capsys, model, "--gpu-layers", 1)["reason"].startswith("places: ")
    assert found(capsys, "cache", "list")["entries"][0]["formats"] == "bf16"
    assert explained(capsys, model, "--prefill-chunk", 64)["reason"].startswith("pieces: ")


def test_a_salt_is_read_from_a_file_or_the_environment(capsys, monkeypatch, tmp_path, model, lines):
    monkeypatch.setenv("LOWVRAM_SALT", "a long secret")
    warmed(capsys, model, lines)
    assert [row["salted"] for row in found(capsys, "cache", "list")["entries"]] == [True]
    assert explained(capsys, model)["hit_tokens"] == 256
    file = tmp_path / "salt"
    file.write_text("another\n")
    assert explained(capsys, model, "--salt-file", file)["hit_tokens"] == 0
    monkeypatch.delenv("LOWVRAM_SALT")
    assert explained(capsys, model)["reason"] == "salt: what this model remembers is under another salt, or none"
    file.write_text("a long secret\n")
    assert explained(capsys, model, "--salt-file", file)["hit_tokens"] == 256


WRONG_LINES = {
    "empty": ("\n\n", "expected a line of JSON or more, found an empty file"),
    "no JSON": ('{"system": "a"}\n{"system"\n', "prompts.jsonl, line 2: expected a JSON object, found no JSON ("),
    "an empty line": ('{"system": "a"}\n\n{"system": "b"}\n', "line 2: expected a JSON object"),
    "a list": ("[]", "line 1: expected a JSON object, found '[]'"),
    "an unknown key": ('{"system": "a", "prompt": "b"}', "line 1: expected keys of system, document, question, answer"),
    "no key": ("{}", "line 1: expected one of system, document, question, answer or more, found none"),
    "no text": ('{"system": 3}', "line 1: expected system as a text that is not empty, found 3"),
    "an empty text": ('{"document": " "}', "line 1: expected document as a text that is not empty"),
    "no text in any encoding": ('{"document": "\\ud800"}', "line 1: expected document in UTF-8"),
    "an answer to nothing": ('{"system": "a", "answer": "b"}', "line 1: expected a question beside the answer"),
}


@pytest.mark.parametrize("text, expected", WRONG_LINES.values(), ids=WRONG_LINES)
def test_a_wrong_line_is_named_before_anything_is_loaded(capsys, model, lines, nothing_fetched, text, expected):
    lines.write_text(text)
    assert expected in refused(capsys, "cache", "warm", model, lines, *CARD, *DISK)


def test_a_prompt_too_long_is_named_before_the_first_is_read(capsys, model, lines, cache):
    status, _, err = run(capsys, "cache", "warm", model, lines, *CARD[:2], "--context", 512, *CARD[4:], *DISK)
    assert status == 2 and "prompt 2: " in err.splitlines()[-1] and "context is 512" in err.splitlines()[-1]
    assert not list(cache.glob("*.safetensors"))


MISTAKES = {
    "no action": (("cache",), "ACTION"),
    "warm without room": (("cache", "warm", "MODEL", "LINES", *CARD), "needs --remember SIZE"),
    "warm in RAM alone": (("cache", "warm", "MODEL", "LINES", *CARD, "--remember-ram", "1GiB"), "needs --remember"),
    "warm without a file": (("cache", "warm", "MODEL", "missing.jsonl", *CARD, *DISK), "missing.jsonl"),
    "no prompt": (("cache", "explain", "MODEL", *CARD, "--prompt", " "), "expected a prompt"),
    "a size without a unit": (("chat", "MODEL", *CARD, "--remember", "2"), "did you mean 2GiB?"),
    "a size in two words": (("chat", "MODEL", *CARD, "--remember", "2", "GiB"), "write --remember 2GiB"),
    "a size of RAM in bits": (("chat", "MODEL", *CARD, "--remember-ram", "2Gb"), "lower-case b means bits"),
    "less than a block": (("chat", "MODEL", *CARD, "--remember", "4KiB"), "a block of 128 tokens takes"),
    "all of the RAM": (
        ("plan", "MODEL", "--gpu", "100MiB", "--ram", "1MiB", "--remember-ram", "1MiB"),
        "leaves nothing of --ram 1MiB",
    ),
    "more than the RAM": (
        ("plan", "MODEL", *CARD, "--ram", "4MiB", "--remember-ram", "3.9MiB", "--gpu-layers", 0),
        "of RAM, found --ram 4MiB",
    ),
    "a salt for nothing": (("chat", "MODEL", *CARD, "--salt-file", "LINES"), "give --remember SIZE as well"),
    "no salt": (("chat", "MODEL", *CARD, *DISK, "--salt-file", "missing"), "missing: expected a text"),
    "an empty salt": (("chat", "MODEL", *CARD, *DISK, "--salt-file", "EMPTY"), "expected a salt, found an empty file"),
}


@pytest.mark.parametrize("words, expected", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_loaded(
    capsys, tmp_path, model, lines, nothing_fetched, words, expected
):
    (tmp_path / "empty").write_text("\n")
    places = {"MODEL": model, "LINES": lines, "EMPTY": tmp_path / "empty"}
    assert expected in refused(capsys, *(places.get(word, word) for word in words))


def test_a_forecast_says_what_remembering_takes(capsys, model):
    words = ("forecast", model, *CARD, "--remember-ram", "1MiB", "--remember", "2GiB")
    made = found(capsys, *words)
    assert made["remembered_ram_bytes"] == made["remembered_bytes"] == (1 << 20) // 98304 * 98304
    assert made["remembered_disk_bytes"] == 2 << 30
    _, out, _ = run(capsys, *words)
    assert "remembered prompts take 0.9 MiB of RAM (10 blocks of 128 tokens) and at most 2.00 GiB of disk" in out
    _, out, _ = run(capsys, *words[:-4])
    assert "remembered" not in out


def test_a_plan_that_is_chosen_remembers(capsys, tmp_path, model):
    file = tmp_path / "plan.json"
    words = ("--gpu", "100MiB", "--context", 1024, *DISK, "--remember-ram", "1MiB")
    status, out, _ = run(capsys, "plan", model, *words, "--output", file)
    assert status == 0 and "prompts that are remembered are read 128 tokens at a time: peak" in out
    saved = json.loads(file.read_text())
    assert (saved["remember"], saved["remember_ram"]) == (64 << 20, 1 << 20)
    turn = found(capsys, "chat", model, "--gpu", "100MiB", "--plan", file, "--prompt", SYSTEM, "--max-new-tokens", 2)
    again = found(capsys, "chat", model, "--gpu", "100MiB", "--plan", file, "--prompt", SYSTEM, "--max-new-tokens", 2)
    assert (turn["remembered_tokens"], again["remembered_tokens"]) == (0, 256) and turn["text"] == again["text"]


def test_completions_are_remembered_too(capsys, model):
    words = ("complete", model, *CARD, *DISK, "--prompt", SYSTEM, "--max-new-tokens", 2)
    assert [found(capsys, *words)["remembered_tokens"] for _ in range(2)] == [0, 256]
