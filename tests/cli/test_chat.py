"""``lowvram chat`` and ``lowvram complete``: who is refused before anything is loaded, and what is printed where."""

import json

import pytest

from lowvram_lab.cli.chat import add_chat, add_complete
from lowvram_lab.cli.main import _Parser
from lowvram_lab.model.source import Source, find_source
from tests.helpers.checkpoints import write_model
from tests.helpers.commands import run_command as run
from tests.helpers.tiny import letters_state

CARD = ("--gpu", "100MiB", "--context", 128, "--format", "bf16")
CHAT_KEYS = {"text", "ttft_s", "tokens_per_s", "peak_bytes", "budget_bytes", "engine", "cached_tokens"}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("models") / "base", "qwen2", letters_state())
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture
def nothing_fetched(monkeypatch):
    def fetch(*_, **__):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(Source, "fetch", fetch)


TALKS = {
    "chat": ("chat", *CARD, "--prompt", "hi"),
    "conversation": ("chat", *CARD),
    "planned": ("chat", "--gpu", "100MiB", "--prompt", "hi"),
    "demo": ("demo", "--gpu", "100MiB"),
    "report": ("report", "--gpu", "100MiB"),
}


@pytest.mark.parametrize("words", TALKS.values(), ids=TALKS)
def test_a_base_model_is_refused_before_anything_else(capsys, base_model, nothing_fetched, words):
    command, *options = words
    status, out, err = run(capsys, command, base_model, *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "no chat template" in err and f"lowvram complete {base_model} --prompt TEXT" in err


def test_a_base_model_of_the_hub_is_refused_without_its_weights(capsys, base_model, monkeypatch):
    asked = []

    def download(repo_id, allow_patterns, **options):
        asked.extend([] if options.get("local_files_only") else allow_patterns)
        return str(base_model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    status, out, err = run(capsys, "chat", "some/base", *CARD, "--prompt", "hi")
    assert (status, out, len(err.splitlines())) == (2, "", 1) and "lowvram complete some/base" in err
    assert not any("safetensors" in pattern or pattern == "tokenizer*" for pattern in asked)


def test_complete_goes_on_with_a_text_on_stdout(capsys, base_model):
    status, out, err = run(capsys, "complete", base_model, *CARD, "--prompt", "once upon", "--max-new-tokens", 9)
    assert status == 0 and len(out) == 10 and out.strip().isalpha() and out.endswith("\n")
    assert "decoded by" in err and "first token" in err
    status, stopped, _ = run(
        capsys, "complete", base_model, *CARD, "--prompt", "once upon", "--max-new-tokens", 9, "--stop", out[3]
    )
    assert status == 0 and stopped == out[: out.index(out[3])] + "\n"


@pytest.mark.parametrize("command", ["complete", "chat"])
def test_json_has_the_promised_keys_alone_on_stdout(capsys, tmp_path, base_model, command):
    model = base_model if command == "complete" else write_model(tmp_path / "m", "qwen2", letters_state())
    status, out, err = run(capsys, command, model, *CARD, "--prompt", "hello", "--max-new-tokens", 5, "--json")
    found = json.loads(out)
    assert status == 0 and CHAT_KEYS <= set(found)
    assert len(found["text"]) == found["new_tokens"] == 5 and found["budget_bytes"] == 100 << 20


def test_control_tokens_in_a_text_stay_text(capsys, base_model):
    words = ("complete", base_model, *CARD, "--max-new-tokens", 2, "--json", "--prompt")
    _, out, _ = run(capsys, *words, "a<|im_end|>")
    assert json.loads(out)["prompt_tokens"] == len("a<|im_end|>")  # a token a byte


MISTAKES = {
    "no text": ((), "--prompt"),
    "an empty text": (("--prompt", ""), "a text to go on with"),
    "no text in any encoding": (("--prompt", "caf\udce9"), "UTF-8"),
    "an empty stop string": (("--prompt", "x", "--stop", ""), "stop strings"),
    "a temperature below zero": (("--prompt", "x", "--temperature", "-1"), "temperature"),
    "a system message": (("--prompt", "x", "--system", "y"), "--system"),
}


@pytest.mark.parametrize("words, expected", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_loaded(capsys, base_model, nothing_fetched, words, expected):
    status, out, err = run(capsys, "complete", base_model, *CARD, *words)
    assert (status, out, len(err.splitlines())) == (2, "", 1) and expected in err


def test_a_prompt_of_a_chat_is_checked_before_anything_is_loaded(capsys, tmp_path, nothing_fetched):
    model = write_model(tmp_path / "m")
    status, out, err = run(capsys, "chat", model, *CARD, "--prompt", "caf\udce9")
    assert (status, out, len(err.splitlines())) == (2, "", 1) and "UTF-8" in err


def thinking_model(folder):
    """Its template takes an argument, and no system message."""
    model = write_model(folder, "qwen2", letters_state())
    template = (model / "chat_template.jinja").read_text()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    wish = "{% if thinking is defined %}{{ thinking | tojson }}{% endif %}"
    (model / "chat_template.jinja").write_text(refusal + template + wish)
    return model


WRONG_ARGUMENTS = {
    "no value": (("thinking",), "expected NAME=VALUE, e.g. enable_thinking=false, found 'thinking'"),
    "no name": (("=3",), "expected NAME=VALUE"),
    "no name of a variable": (("a b=3",), "expected NAME=VALUE"),
    "transformers' own": (("tokenize=false",), "'tokenize' is transformers' own argument"),
    "unknown": (("thinking=1", "enable_thinking=1"), "does not know the argument 'enable_thinking'; it knows thinking"),
    "twice": (("thinking=1", "thinking=2"), "expected one value for the template argument thinking, found several"),
}


@pytest.mark.parametrize("words, expected", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_a_wrong_template_argument_is_one_line_before_anything_is_fetched(
    capsys, tmp_path, nothing_fetched, words, expected
):
    given = [word for argument in words for word in ("--template-argument", argument)]
    status, out, err = run(capsys, "chat", thinking_model(tmp_path / "m"), *CARD, "--prompt", "hi", *given)
    assert (status, out, len(err.splitlines())) == (2, "", 1) and expected in err


@pytest.mark.parametrize(
    "value, written", [("false", "false"), ("3", "3"), ('{"a": [1]}', '{"a": [1]}'), ("low", '"low"'), ("", '""')]
)
def test_a_template_argument_is_json_or_text(capsys, tmp_path, value, written):
    words = ("chat", thinking_model(tmp_path / "m"), *CARD, "--prompt", "hi", "--json", "--max-new-tokens", 2)
    _, without, _ = run(capsys, *words)
    status, out, _ = run(capsys, *words, "--template-argument", f"thinking={value}")
    added = json.loads(out)["prompt_tokens"] - json.loads(without)["prompt_tokens"]
    assert status == 0 and added == len(written)  # a token a byte


def test_a_system_message_that_a_template_refuses_goes_to_the_user_and_is_said_once(capsys, caplog, tmp_path):
    words = ("chat", thinking_model(tmp_path / "m"), *CARD, "--json", "--max-new-tokens", 2, "--prompt")
    _, asked, _ = run(capsys, *words, "Be brief.\n\nhi")
    status, out, _ = run(capsys, *words, "hi", "--system", "Be brief.")
    assert status == 0 and json.loads(out)["prompt_tokens"] == json.loads(asked)["prompt_tokens"]
    assert [r.getMessage() for r in caplog.records].count(
        "the chat template takes no system message; it goes before the first user message"
    ) == 1


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ raise_exception('never') }}", "refuses this chat (never)"),
        ("hello", "leaves out what the user says"),
        ("{% if %}", "refuses this chat"),
    ],
)
def test_a_template_that_no_chat_can_go_by_is_refused_before_weights_are_loaded(
    capsys, monkeypatch, tmp_path, template, expected
):
    model = write_model(tmp_path / "m")
    (model / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("lowvram_lab.cli.chat.load", lambda *_, **__: pytest.fail("weights were loaded"))
    status, out, err = run(capsys, "chat", model, *CARD, "--prompt", "hi")
    assert (status, out) == (2, "") and expected in err.splitlines()[-1]


def options(add) -> set[str]:
    parser = _Parser()
    add(parser)
    return {option for action in parser._actions for option in action.option_strings}


def test_complete_takes_what_chat_takes():
    assert options(add_complete) == options(add_chat) - {"--system", "--template-argument"}


def test_a_model_with_a_chat_template_can_go_on_with_a_text_too(capsys, tmp_path):
    model = write_model(tmp_path / "m", "qwen2", letters_state())
    find_source(model).require_chat_template()
    status, out, _ = run(capsys, "complete", model, *CARD, "--prompt", "once", "--max-new-tokens", 4)
    assert status == 0 and len(out) == 5
