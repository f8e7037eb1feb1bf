"""A base model is told from small files, before anything large is fetched, converted or loaded."""

import json

import pytest

from lowvram_lab.errors import CheckpointError, LowvramError, SourceError
from lowvram_lab.files import cache_dir
from lowvram_lab.model.source import find_source
from tests.helpers.checkpoints import write_model
from tests.helpers.gguf_files import write_gguf
from tests.model.test_source import tiny  # noqa: F401 (a fixture)

HUB = "some/model"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


def settings(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def refusal(source) -> str:
    with pytest.raises(SourceError, match="no chat template, so it is a base model") as error:
        source.require_chat_template()
    assert "\n" not in str(error.value)
    assert f"lowvram complete {source.name} --prompt TEXT" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("template", ["{{ messages }}", [{"name": "default", "template": "x"}]])
def test_a_template_among_the_tokenizers_settings(tmp_path, template):
    find_source(settings(tmp_path / "m", chat_template=template)).require_chat_template()


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_a_template_in_a_file_of_its_own(tmp_path, file):
    folder = settings(tmp_path / "m")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("{{ messages }}")
    find_source(folder).require_chat_template()


@pytest.mark.parametrize("values", [{}, {"chat_template": None}, {"chat_template": ""}, {"chat_template": []}])
def test_a_directory_without_one(tmp_path, values):
    refusal(find_source(settings(tmp_path / "m", **values)))


def test_what_is_found_is_what_the_tokenizer_has(tmp_path):
    folder = write_model(tmp_path / "m")
    assert find_source(folder).tokenizer().chat_template
    find_source(folder).require_chat_template()
    (folder / "chat_template.jinja").unlink()
    assert not find_source(folder).tokenizer().chat_template
    refusal(find_source(folder))
    (folder / "tokenizer_config.json").unlink()
    refusal(find_source(folder))


def test_named_templates_are_for_chats_where_one_is_the_default(tmp_path):
    named = [{"name": name, "template": f"{{{{ {name}_style }}}}"} for name in ("rag", "default")]
    source = find_source(settings(tmp_path / "m", chat_template=named))
    source.require_chat_template(["default_style"])
    with pytest.raises(LowvramError, match="does not know the argument 'rag_style'; it knows default_style"):
        source.require_chat_template(["rag_style"])
    with pytest.raises(SourceError, match="m has chat templates for rag, and none called default"):
        find_source(settings(tmp_path / "m", chat_template=named[:1])).require_chat_template()
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    with pytest.raises(SourceError, match="templates for tool_use, and none called default"):
        find_source(tmp_path / "m").require_chat_template()
    (tmp_path / "m" / "chat_template.jinja").write_text("x")
    find_source(tmp_path / "m").require_chat_template()


def test_arguments_are_held_to_the_template_wherever_it_lies(tmp_path, tiny, monkeypatch):  # noqa: F811
    template = (
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{% if mood is defined %}{{ mood }}{% endif %}"
    )
    write_gguf(tmp_path / "m.gguf", tiny, template=template)
    folder = settings(tmp_path / "m", chat_template=template)
    asked(monkeypatch, folder)
    for name in (tmp_path / "m.gguf", folder, HUB):
        find_source(name).require_chat_template(["mood"])
        with pytest.raises(LowvramError, match="does not know the argument 'moods'; it knows mood$"):
            find_source(name).require_chat_template(["moods"])
    with pytest.raises(LowvramError, match="'tools' is transformers' own argument"):
        find_source("smollm2-135m").require_chat_template(["tools"])
    with pytest.raises(SourceError, match="is no Jinja template"):
        find_source(settings(tmp_path / "m", chat_template="{% if %}")).require_chat_template(["mood"])


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_tokenizer_that_is_damaged_or_missing_is_for_others_to_name(tmp_path, text):
    folder = settings(tmp_path / "m")
    if text is None:
        (folder / "tokenizer_config.json").unlink()
    else:
        (folder / "tokenizer_config.json").write_text(text)
    find_source(folder).require_chat_template()


@pytest.mark.parametrize("template", ["", None, "{{ messages }}"])
def test_a_gguf_is_asked_for_its_header_alone(tmp_path, tiny, template):  # noqa: F811
    path = tmp_path / "m.gguf"
    write_gguf(path, tiny, template=template)
    source = find_source(path)
    if template:
        source.require_chat_template()
    else:
        refusal(source)
    assert not cache_dir().exists()  # neither hashed nor converted
    assert (source.tokenizer().chat_template or None) == (template or None)


def test_a_damaged_gguf_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 10)
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        find_source(path).require_chat_template()


def test_the_models_known_by_name_are_asked_no_network():
    find_source("smollm2-135m").require_chat_template()


def asked(monkeypatch, folder):
    """The hub, with a folder for a repository; what it is asked for is noted."""
    asked = []

    def download(repo_id, allow_patterns, **options):
        asked.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


@pytest.mark.parametrize("name", [HUB, "qwen1.5-4b"])
def test_a_hub_repository_is_asked_for_its_small_files_alone(monkeypatch, tmp_path, name):
    requests = asked(monkeypatch, settings(tmp_path / "m"))
    refusal(find_source(name))
    hub_id = {HUB: HUB}.get(name, "Qwen/Qwen1.5-4B-Chat")
    assert requests == [(hub_id, ["tokenizer_config.json", "chat_template*"])]
    settings(tmp_path / "m", chat_template="x")
    find_source(name).require_chat_template()


def test_a_repository_that_cannot_be_asked_is_for_fetching_to_name(monkeypatch, tmp_path):
    find_source(HUB).require_chat_template()  # offline
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")  # what a forecast leaves of a repository in the hub's cache
    asked(monkeypatch, tmp_path / "m")
    find_source(HUB).require_chat_template()
