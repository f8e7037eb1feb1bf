"""Tokens, layers and bits together: within the bytes, never behind one tool alone, opened, resumed, refused."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.packaged import calibration_text, sample_text
from lowvram_lab.slimming.joint import slim_to_size
from lowvram_lab.slimming.search import BITS, JOINT, SLIM_ALONE
from lowvram_lab.slimming.slim import choose_tokens
from tests.helpers.checkpoints import read_state
from tests.helpers.commands import run_command
from tests.helpers.killed_run import Killed, contents, killer
from tests.slimming.tiny import write


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Short and repetitive: it needs few tokens."""
    file = tmp_path_factory.mktemp("texts") / "mine.txt"
    file.write_text("\n".join([sample_text()[:1500]] * 12), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory, text):
    """A model with a layer that does nothing, and tokens that it never says: those that the text has no use for."""
    folder = write(tmp_path_factory.mktemp("joint") / "source", "Qwen's", "qwen2")
    found, state = find_source(str(folder)), read_state(folder)
    kept = choose_tokens(found, found.spec(), [text.read_text("utf-8")], None, progress=False).kept
    for name in state:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            state[name][0] = 0  # the first channel is that of the embedding, all the way
            state[name] *= 0 if ".1." in name else 1
    state["model.embed_tokens.weight"][:, 0] = 5
    state["lm_head.weight"][:, 0] = -4
    state["lm_head.weight"][kept, 0] = 0
    save_file(state, folder / "model.safetensors")
    return folder


def run(source, output, size, **options):
    return slim_to_size(str(source), output, size, **{"progress": False, "most_layers": 1, **options})


@pytest.fixture(scope="module")
def made(source, text, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("LOWVRAM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    found = run(source, tmp_path_factory.mktemp("made") / "out", "0.45MiB", texts=text)
    patch.undo()
    return found


def test_it_keeps_to_the_bytes_and_is_the_closest_of_what_was_made(made):
    assert made.weight_bytes <= int(0.45 * 2**20) < made.source_weight_bytes
    plan = Plan.uniform(find_source(made.output).spec(), "stored", context=64)
    assert plan.weight_bytes() == made.weight_bytes
    tried = made.table.dropna(subset="kl")
    assert made.kl == tried["kl"].min() and {BITS, JOINT} <= set(tried["kind"])
    assert made.kl < tried[tried["kind"] == BITS]["kl"].min()  # what of bytes is of no use goes first
    assert made.vocab_after < made.vocab_before and (made.table["weight_bytes"] <= int(0.45 * 2**20)).all()
    assert list(made.table["estimated"]) == sorted(made.table["estimated"])
    assert "bits alone" in made.summary() and made.output in made.summary()
    assert json.loads(json.dumps(made.to_dict()))["table"][0]["kind"] in (BITS, JOINT, SLIM_ALONE)
    assert "bits alone" in made._repr_html_()


@torch.no_grad()
def test_stock_transformers_opens_it_and_it_is_as_far_as_was_said(made, source, text):
    facts = json.loads((Path(made.output) / "slim.json").read_text())
    assert facts["kl"] == made.kl and facts["source"] == "source"
    rows = torch.tensor(facts["kept_ids"])
    assert len(rows) == made.vocab_after < made.vocab_before and made.removed == (1,)
    before, after = (AutoTokenizer.from_pretrained(path) for path in (source, made.output))
    held_out = text.read_text("utf-8")[-(len(text.read_text("utf-8")) // 8) :]
    old, new = (t(held_out, add_special_tokens=False)["input_ids"] for t in (before, after))
    assert before.convert_ids_to_tokens(old) == after.convert_ids_to_tokens(new)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    found = find_source(made.output)
    ours = load(Plan.uniform(found.spec(), "stored", context=256, dtype="fp32"), open_gpu(None), progress=False)
    count = made.kl_tokens // 128
    ids = [torch.tensor(each[: count * 128]).view(count, 128) for each in (old, new)]
    left = torch.log_softmax(whole(ids[0]).logits, -1)[..., rows]
    share = left.logsumexp(-1, keepdim=True)
    theirs = torch.log_softmax(torch.cat([ours(each[None]).logits for each in ids[1]]), -1)
    expected = F.kl_div(theirs, left - share, reduction="none", log_target=True).sum(-1).mean() - share.mean()
    assert made.kl == pytest.approx(expected.item(), rel=0.05)


def test_the_card_says_what_was_made_and_nothing_of_folders(made):
    card = (Path(made.output) / "README.md").read_text("utf-8")
    assert 'base_model: "source"' in card and f"| {made.vocab_after:,} of {made.vocab_before:,} |" in card
    assert "| bits alone |" in card and ".parts" not in card
    assert not list(Path(made.output).parent.glob(".out.*"))
    recipe = Path(made.output) / "recipe.json"
    assert not recipe.is_file() or json.loads(recipe.read_text("utf-8"))["source"] == "source"


def test_killed_and_resumed_the_bytes_are_the_same(source, text, made, tmp_path):
    expected = contents(Path(made.output))
    for count in (4, 11):
        output = tmp_path / str(count) / "out"
        output.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            killer(patch, "_adopt", count)
            with pytest.raises(Killed):
                run(source, output, "0.45MiB", texts=text)
        assert not output.exists()
        run(source, output, "0.45MiB", texts=text)
        assert contents(output) == expected, count


def test_no_layer_goes_where_none_may(source, tmp_path):
    made = run(source, tmp_path / "out", "0.9MiB", most_layers=0)
    assert (made.table["layers"] == 3).all() and made.removed == () and "without" not in made.summary()


@pytest.mark.parametrize(
    ("size", "options", "error", "said"),
    [
        ("1GiB", {}, LowvramError, "there is nothing to remove"),
        ("10KiB", {}, BudgetError, "nothing of source is as small as"),
        ("0.45MiB", {"most_layers": 9}, LowvramError, "expected 0 to 2 layers that may go, found 9"),
        ("0.45MiB", {"most_layers": True}, LowvramError, "expected 0 to 2 layers"),
    ],
)
def test_what_cannot_be_is_refused(source, tmp_path, size, options, error, said):
    with pytest.raises(error, match=said):
        run(source, tmp_path / "out", size, **options)
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_to_measure_on_is_refused(source, tmp_path):
    (tmp_path / "short.txt").write_text(calibration_text()[:3000])
    with pytest.raises(LowvramError, match="tokens"):
        run(source, tmp_path / "out", "0.45MiB", texts=tmp_path / "short.txt")


def test_the_command(capsys, source, text, tmp_path):
    words = ("slim", "--input", source, "--output", tmp_path / "out", "--weight-bytes", "0.45MiB", "--text", text)
    status, out, _ = run_command(capsys, *words, "--json")
    found = json.loads(out)
    assert status == 0 and found["weight_bytes"] <= int(0.45 * 2**20) and found["table"]
    status, out, err = run_command(capsys, *words[:4], tmp_path / "two", *words[5:], "--no-referee")
    assert status == 2 and out == "" and "--no-referee goes with --vocab and --layers" in err
