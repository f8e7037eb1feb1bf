"""bench: made-up peers whose figures are known, the real engines on tiny models, the command."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import psutil
import pytest
import torch

from lowvram_lab.cli import bench as cli_bench
from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source
from lowvram_lab.peers import contest
from lowvram_lab.peers import others as bench_peers
from lowvram_lab.peers import process as bench_process
from lowvram_lab.peers.bench import BenchSettings, bench
from lowvram_lab.peers.engines import Engine, Question, Task
from lowvram_lab.peers.process import ChildEngine, EngineError, LocalEngine
from tests.helpers.checkpoints import directory_spec, write_model
from tests.helpers.tiny import tiny_stock

PROMPT, NEW = 12, 4
LENGTH = NEW + 1


class FakeEngine(Engine):
    """A peer of known speed: a second to the first token, ``SECONDS`` for the rest, half of that in the last round."""

    name, note = "fake", "made up"
    weight_bytes, read_bytes = 3000, 2000
    SECONDS = 2.0
    TOKENS = (7,) * LENGTH
    calls: Counter = Counter()

    def __init__(self, task):
        self.task = task
        self.calls[self.name, "opened"] += 1

    def kv_bytes(self, question):
        return 500 * question.batch_size

    def forget(self, batch_size):
        self.calls[self.name, "forgot", batch_size] += 1

    def answer(self, ids, count):
        self.calls[self.name, "warmed", len(ids)] += 1

    def turn(self, question):
        self.calls[self.name, "turn"] += 1
        self.calls[self.name, question.prompt_tokens, question.batch_size] += 1
        seconds = self.SECONDS / 2 if self.calls[self.name, "turn"] == 5 else self.SECONDS
        tokens = [list(self.TOKENS) for _ in question.prompts]
        return {"ttft_s": 1.0, "decode_s": seconds, "follow_up_s": 0.25, "tokens": tokens}

    def likeliest(self, question, answers):
        assert question in self.task.questions
        return [[*answer[:-1], -1] for answer in answers]


class FailingEngine(FakeEngine):
    """Works until its third round, the first that counts."""

    name = "failing"

    def turn(self, question):
        if self.calls[self.name, "turn"] == 2:
            raise ValueError("out of\nluck")
        return super().turn(question)


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "model", "llama")


@pytest.fixture
def fakes(monkeypatch):
    """Two peers that ``bench`` knows, and their calls."""
    monkeypatch.setattr(FakeEngine, "calls", Counter())
    for kind in (FakeEngine, FailingEngine):
        monkeypatch.setitem(bench_peers.ENGINES, kind.name, kind)
    monkeypatch.setattr("shutil.which", lambda name: None)  # nothing is compiled
    return FakeEngine.calls


def measured(model, against=(), **options):
    """A bench of three short rounds in this process; options of ``bench`` and of ``BenchSettings``."""
    given = {"prompt_tokens": PROMPT, "new_tokens": NEW, "rounds": 3, "threads": 1, "processes": False, "batch_size": 1}
    given |= {name: options.pop(name) for name in list(options) if name in given}
    return bench(model, against=against, settings=BenchSettings(**given), progress=False, **options)


def question_of(tokens=PROMPT, batch_size=1) -> Question:
    """Each sequence with a prompt of its own."""
    prompts = tuple(tuple(range(3 + each, 3 + each + tokens)) for each in range(batch_size))
    return Question(prompts, ((5, 6),) * batch_size, NEW)


def task_for(folder, *questions, **changes) -> Task:
    spec = directory_spec(folder)
    plan = Plan.uniform(spec, "int8", context=64)
    values = {
        "model": str(folder), "directory": str(folder), "plan": plan.to_json(), "budget": None,
        "questions": questions or (question_of(),), "threads": 1,
    }  # fmt: skip
    return Task(**{**values, **changes})


def test_figures_of_a_peer_are_the_medians_of_its_rounds(folder, fakes):
    found = measured(folder, ("fake",))
    row = found.row("fake")
    # two rounds are not counted; then 2, 2 and 1 seconds for four tokens
    assert row.rounds == (2.0, 2.0, 4.0)
    assert fakes["fake", "turn"] == 5
    assert (row.decode_tokens_per_s, row.prefill_tokens_per_s) == (2.0, PROMPT)
    assert (row.ttft_s, row.follow_up_s) == (1.0, 0.25)
    assert row.decode_p10 == pytest.approx(2.0)
    assert row.decode_p90 == pytest.approx(3.6)
    assert (row.weight_bytes, row.bytes_per_token) == (3000, 2500)
    assert row.bandwidth_share == pytest.approx(2500 * 2.0 / found.read_bytes_per_s)
    assert row.note == "made up"
    assert row.peak_rss_bytes is None
    mine = found.rows[0]
    ratios = sorted(a / b for a, b in zip(row.rounds, mine.rounds, strict=True))
    assert row.ratio == pytest.approx(ratios[1])
    assert mine.ratio == 1.0


def test_our_rows(folder, fakes):
    found = measured(folder, plan=Plan.uniform(directory_spec(folder), "int8", context=64))
    lean, modules = found.rows
    assert [lean.engine, modules.engine] == ["lowvram", "lowvram (modules)"]
    plan = Plan.uniform(directory_spec(folder), "int8", context=64)
    for row in found.rows:
        assert row.reason == ""
        assert row.weight_bytes == plan.weight_bytes()  # the embedding is the head: all of it is read
        assert row.bytes_per_token == row.weight_bytes + plan.kv_bytes(PROMPT + NEW // 2)
        assert row.peak_bytes > row.weight_bytes
        assert len(row.rounds) == 3
        assert min(row.ttft_s, row.follow_up_s, *row.rounds) > 0
    # greedy ties aside, both run the same weights; float32 between the lean layers may turn one of the last tokens
    assert lean.agreement >= 0.8
    assert modules.agreement == modules.equal_tokens == 1.0
    assert found.text_reference == "lowvram (modules)"
    assert f"of {LENGTH} tokens of its answer are the modules'" in lean.note
    assert "simulated" in found.gpu or torch.cuda.is_available()


def test_an_untied_embedding_is_not_read_for_a_token(tmp_path, fakes):
    folder = write_model(tmp_path / "model", "qwen2")
    spec, plan = directory_spec(folder), Plan.uniform(directory_spec(folder), "bf16", context=64)
    row = measured(folder, plan=plan, rounds=1).row("lowvram (modules)")
    table = spec.vocab_size * spec.hidden_size * 2
    assert row.weight_bytes - table == row.bytes_per_token - plan.kv_bytes(PROMPT + NEW // 2)


def test_texts_are_held_against_transformers(folder, fakes):
    plan = Plan.uniform(directory_spec(folder), "bf16", context=64)
    found = measured(folder, ("fake", "transformers"), plan=plan, rounds=1)
    assert found.text_reference == "transformers"
    assert found.row("transformers").equal_tokens == found.row("transformers").agreement == 1.0
    assert found.row("lowvram (modules)").equal_tokens == found.row("lowvram (modules)").agreement == 1.0
    assert found.row("fake").agreement == pytest.approx(1 - 1 / LENGTH)  # it errs in the last position
    assert found.row("fake").equal_tokens < 1
    assert found.row("transformers").weight_bytes == found.row("lowvram (modules)").weight_bytes


def test_the_end_of_a_text_is_ignored(tmp_path):
    ids = list(range(3, 3 + PROMPT))
    with torch.no_grad():
        first = int(tiny_stock("llama", dtype=torch.bfloat16)(torch.tensor([ids])).logits[0, -1].argmax())
    folder = write_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": first}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first], "repetition_penalty": 1.5}))
    (tokens,) = bench_peers.Transformers(task_for(folder)).turn(question_of())["tokens"]
    assert tokens[0] == first
    assert len(tokens) == LENGTH


def test_bitsandbytes_on_this_machine(folder):
    engine = LocalEngine(bench_peers.BitsAndBytes, task_for(folder))
    spec = directory_spec(folder)
    linear = sum(m.weight_shape[0] * m.weight_shape[1] for m in spec.modules if m.kind == "linear" and not m.tied_to)
    # half a byte a weight, a float32 scale for 64 of them, and the 16 values of nf4 for every module
    count = sum(m.kind == "linear" and not m.tied_to for m in spec.modules)
    rest = sum(
        2 * torch.Size(shape).numel()
        for m in spec.modules if m.kind != "linear"
        for shape in m.parameters.values()
    )  # fmt: skip
    assert engine.facts["weight_bytes"] == linear // 2 + linear // 64 * 4 + count * 64 + rest
    assert len(engine.likeliest(0, [[3] * LENGTH])[0]) == LENGTH


def test_a_peer_that_fails_is_a_row_with_the_reason(folder, fakes):
    found = measured(folder, ("failing", "fake"))
    row = found.row("failing")
    assert row.reason == "ValueError: out of luck"
    assert row.decode_tokens_per_s is None
    assert found.row("fake").rounds == (2.0, 2.0, 4.0)
    assert "out of luck" in found.table()["remark"].tolist()[2]


def test_engines_that_cannot_run_say_why(folder, fakes, monkeypatch):
    monkeypatch.setattr(bench_peers.LlamaCpp, "package", ("no_such_module", "llama-cpp-python"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = measured(folder, ("llama.cpp", "accelerate", "fake"), rounds=1)
    assert found.row("llama.cpp").reason == "llama-cpp-python is not installed"
    assert found.row("accelerate").reason.startswith("not applicable")
    monkeypatch.setattr(contest, "_weight_bytes", lambda name, *rest: 2**60 if name == "fake" else 0)
    assert "of RAM, found" in measured(folder, ("fake",), rounds=1).row("fake").reason


def test_what_does_not_fit_the_card_says_so(folder, fakes):
    plan = Plan.uniform(directory_spec(folder), "fp32", context=64)
    found = measured(folder, ("fake",), gpu="1MiB", plan=plan, rounds=1)
    assert all("memory" in row.reason for row in found.rows[:2])
    assert found.row("fake").ratio == 1.0  # the first row that ran
    with pytest.raises(LowvramError, match="no engine could run this: lowvram: "):
        measured(folder, (), gpu="1MiB", plan=plan, rounds=1)


def test_engines_take_turns_and_are_loaded_once(folder, fakes, monkeypatch):
    order = []
    real = LocalEngine.turn
    monkeypatch.setattr(
        LocalEngine, "turn", lambda self, index: (order.append(type(self.engine).name), real(self, index))[1]
    )
    found = measured(folder, ("fake",), rounds=6)
    rounds = [tuple(order[start : start + 3]) for start in range(0, 18, 3)]
    assert all(sorted(each) == ["fake", "lowvram", "lowvram (modules)"] for each in rounds)
    assert len(set(rounds)) > 1  # shuffled
    assert fakes["fake", "opened"] == 1
    assert found.alternated == "loaded together"


def test_engines_that_do_not_fit_together_are_loaded_for_every_round(folder, fakes, monkeypatch):
    monkeypatch.setattr(contest, "PROCESS_BYTES", 2**60)
    found = measured(folder, ("fake",), rounds=2)
    assert fakes["fake", "opened"] == 3  # to meet it, and for each round
    assert found.alternated == "loaded anew for every round"
    assert len(found.row("fake").rounds) == 2


def test_a_grid_opens_each_engine_once(folder, fakes):
    found = measured(folder, ("fake",), prompt_tokens=(PROMPT, 2 * PROMPT), batch_size=[1, 3], rounds=2)
    cells = [(PROMPT, 1), (2 * PROMPT, 1), (PROMPT, 3), (2 * PROMPT, 3)]
    assert found.cells == cells
    assert [(row.engine, row.prompt_tokens, row.batch_size) for row in found.rows] == [
        (engine, *cell) for cell in cells for engine in ("lowvram", "lowvram (modules)", "fake")
    ]
    assert fakes["fake", "opened"] == 1
    assert [fakes[("fake", *cell)] for cell in cells] == [4] * 4  # two that are not counted, two rounds
    assert fakes["fake", "warmed", 3] == 2  # once a round: its KV cache is a new one then
    assert fakes["fake", "warmed", 1] == 2
    row = found.row("fake", 2 * PROMPT, 3)
    assert row.prefill_tokens_per_s == 3 * 2 * PROMPT
    assert row.total_tokens_per_s == 3 * row.decode_tokens_per_s == 3 * 2.0
    assert row.bytes_per_token == round((2000 + 3 * 500) / 3)
    assert row.agreement == pytest.approx(1 - 1 / LENGTH)
    for row in found.rows:
        assert row.reason == ""
        assert len(row.rounds) == 2
    assert found.row("lowvram", batch_size=3).peak_bytes > found.row("lowvram", batch_size=1).peak_bytes
    for cell in cells:
        assert found.row("lowvram (modules)", *cell).agreement == 1.0
        assert found.row("lowvram", *cell).agreement >= 0.8
    with pytest.raises(KeyError):
        found.row("fake", 7)


def test_a_grid_reads_as_table_and_data(folder, fakes):
    found = measured(folder, ("fake",), prompt_tokens=(8, PROMPT), batch_size=(1, 2), rounds=1)
    table = found.table()
    assert list(table["prompt"]) == [8] * 3 + [PROMPT] * 3 + [8] * 3 + [PROMPT] * 3
    assert set(table["batch"]) == {1, 2}
    assert "total/s" in table
    data = json.loads(json.dumps(found.to_dict()))
    assert data["prompt_tokens"] == [8, PROMPT] and data["batch_size"] == [1, 2]
    assert all(row["total_tokens_per_s"] > 0 for row in data["rows"])
    assert [line for line in found.remarks() if line.startswith("fake")] == ["fake: made up"]
    assert f"prompts of 8 and {PROMPT} tokens, batch 1 and 2" in found.summary()
    single = measured(folder, ("fake",), rounds=1)
    assert not {"prompt", "batch", "total/s"} & set(single.table())
    assert (single.to_dict()["prompt_tokens"], single.to_dict()["batch_size"]) == (PROMPT, 1)
    assert "prompt" not in single.summary()


def test_a_question_that_an_engine_fails_at_is_the_only_one_without_figures(folder, fakes, monkeypatch):
    real = FakeEngine.turn

    def turn(self, question):
        if question.batch_size == 2:
            raise LowvramError("one sequence at a time")
        return real(self, question)

    monkeypatch.setattr(FakeEngine, "turn", turn)
    found = measured(folder, ("fake",), batch_size=(1, 2), prompt_tokens=(8, PROMPT), rounds=2)
    assert [found.row("fake", n, 2).reason for n in (8, PROMPT)] == ["one sequence at a time"] * 2
    assert [found.row("fake", n, 1).reason for n in (8, PROMPT)] == ["", ""]
    assert "fake (prompt 8, batch 2; prompt 12, batch 2): one sequence at a time" in found.remarks()


def test_keys_and_values_that_ram_cannot_hold(folder, fakes, monkeypatch):
    plan = Plan.uniform(directory_spec(folder), "bf16", context=64)
    free = 2 * plan.spec.num_parameters + plan.kv_bytes(64) * 8
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    memory = psutil.virtual_memory()._replace(available=free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    found = measured(folder, ("fake",), batch_size=(1, 1024), rounds=1)
    assert [row.ran for row in found.rows] == [True] * 3 + [False] * 3
    assert "of RAM, found" in found.row("lowvram", batch_size=1024).reason


def test_a_batch_answers_as_its_sequences_do(folder):
    """Every engine of this machine: sequences side by side, each beside itself alone."""
    together = question_of(batch_size=3)
    alone = [Question((prompt,), ((5, 6),), NEW) for prompt in together.prompts]
    task = task_for(folder, together, *alone)
    for kind in (bench_peers.Modules, bench_peers.Ours, bench_peers.Transformers):
        engine = LocalEngine(kind, task)
        answers = engine.meet(0)["tokens"]
        assert [engine.meet(index)["tokens"] for index in (1, 2, 3)] == [[answer] for answer in answers]
        assert engine.likeliest(0, answers) == answers
        assert engine.turn(0)["tokens"] == answers


def test_threads_are_everyones_and_set_back(folder, fakes, monkeypatch):
    seen, before = [], torch.get_num_threads()
    monkeypatch.setattr(FakeEngine, "likeliest", lambda *_: (seen.append(torch.get_num_threads()), [[0] * LENGTH])[1])
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    torch.set_num_threads(2)
    try:
        found = measured(folder, ("fake",), threads=1, rounds=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
    assert found.threads == 1
    with pytest.raises(LowvramError, match="expected 1 to 2 threads on this machine, found 3"):
        measured(folder, threads=3)


def test_a_result_reads_as_table_and_data(folder, fakes):
    found = measured(folder, ("fake",))
    data = json.loads(json.dumps(found.to_dict()))
    keys = {"engine", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "peak_bytes", "weight_bytes"}
    assert all(keys <= row.keys() for row in data["rows"])
    assert data["model"] == "model"  # not the path to it
    assert {"torch", "transformers", "python"} <= data["versions"].keys()
    assert len(data["load_average"]) == 2
    assert data["read_bytes_per_s"] == found.read_bytes_per_s > 0
    text, page = repr(found), found._repr_html_()
    for said in ("fake", "made up", "load average", "1 thread", found.date):
        assert said in text
        assert said in page
    assert ("simulated" in text) != torch.cuda.is_available()
    assert str(folder.parent) not in text + page + json.dumps(data)
    assert "kept the cores busy" in repr(replace(found, load_average=(99.0, 0.0)))
    assert "kept the cores busy" not in repr(replace(found, load_average=(0.0, 99.0)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"against": ("fake", "vllm")}, "unknown engine 'vllm': expected some of transformers"),
        ({"against": "fake"}, "expected names of engines"),
        ({"rounds": 0}, "expected rounds of 1 or more, found 0"),
        ({"prompt_tokens": -1}, "expected prompt_tokens of 1 or more"),
        ({"new_tokens": True}, "expected new_tokens of 1 or more"),
        ({"against": ("fake",), "gguf": "x.gguf"}, "for llama.cpp, found fake"),
        (
            {"against": ("llama.cpp",), "gguf": "x.gguf"},
            "expected a .gguf file or a type .*Q4_0.*, found neither in 'x.gguf'",
        ),
        ({"prompt_tokens": 2000}, "a prompt of 2000 tokens and 22 behind it go beyond the 1024 of .*give it 1002"),
        ({"prompt_tokens": (16, 2000)}, "a prompt of 2000 tokens"),
        ({"prompt_tokens": ()}, "expected prompt_tokens of one number or more, found none"),
        ({"prompt_tokens": (16, "x")}, "expected prompt_tokens of 1 or more, found 'x'"),
        ({"batch_size": 0}, "expected batch_size from 1 to 1024, found 0"),
        ({"batch_size": (1, 2000)}, "expected batch_size from 1 to 1024, found 2000"),
    ],
)
def test_mistakes(folder, fakes, monkeypatch, options, said):
    monkeypatch.setattr(Source, "fetch", lambda *_: pytest.fail("fetched in vain"))
    with pytest.raises(LowvramError, match=said) as raised:
        measured(folder, **options)
    assert "\n" not in str(raised.value)
    assert fakes["fake", "opened"] == 0


def test_a_plan_of_another_model_is_refused(folder, tmp_path, fakes):
    other = write_model(tmp_path / "other", "qwen2")
    with pytest.raises(PlanError):
        measured(folder, plan=Plan.uniform(directory_spec(other), "int8", context=64))


def test_llama_cpp_runs_the_very_file(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.helpers.gguf_files import write_gguf
    from tests.model.test_source import LLAMA

    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    file = tmp_path / "tiny.gguf"
    torch.manual_seed(0)
    # weights so large that the likeliest token is so by a margin
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True, initializer_range=0.3))
    write_gguf(file, model, kind="Q8_0")
    found = measured(file, ("transformers", "llama.cpp"), rounds=1)
    row = found.row("llama.cpp")
    assert row.reason == ""
    assert "tiny.gguf" in row.note
    assert row.agreement >= 0.8  # the same weights, multiplied in other ways
    assert row.weight_bytes < found.row("transformers").weight_bytes
    stated = measured(file, ("llama.cpp",), gguf="Q4_0", batch_size=2, rounds=1).row("llama.cpp")
    assert "tiny.gguf-Q4_0.gguf, quantised by llama.cpp to Q4_0 from the same 16-bit weights: " in stated.note
    assert stated.weight_bytes < row.weight_bytes


def test_an_engine_in_a_process_of_its_own(folder):
    task = task_for(folder)
    here = LocalEngine(bench_peers.Modules, task)
    child = ChildEngine(bench_peers.Modules, task, weigh=True)
    try:
        met, other = child.meet(0), here.meet(0)
        tokens = met["tokens"]
        assert met.pop("peak_rss_bytes") > 0
        assert other.pop("peak_rss_bytes") is None
        assert met == other
        assert child.turn(0)["tokens"] == tokens
        assert child.likeliest(0, tokens) == here.likeliest(0, tokens)
        assert child.facts == here.facts
        with pytest.raises(EngineError, match="^ValueError: too many dimensions 'str'$"):
            child.likeliest(0, [["no id", 1]])
        assert child.turn(0)["tokens"] == tokens  # it is none the worse for it
        os.kill(child._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="ended by SIGKILL: the system had no memory left"):
            child.turn(0)
    finally:
        child.close()
    assert child._process.returncode == -signal.SIGKILL


REPLIES = """
import pickle, sys
from lowvram_lab.peers.process import EngineError
pickle.load(sys.stdin.buffer)
pickle.dump(EngineError("no config.json"), sys.stdout.buffer)
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (REPLIES, "^no config.json$"),
        ("raise SystemExit('no such library')", "^its process ended with status 1: no such library$"),
        ("import os; os.kill(os.getpid(), 4)", "ended by SIGILL: it is built for another processor, probably$"),
        ("print('half a reply', end='')", "^its process ended with status 0$"),
    ],
)
def test_a_process_that_cannot_open_its_engine(folder, monkeypatch, program, said):
    monkeypatch.setattr(bench_process, "fresh_python", lambda entry: [sys.executable, "-c", program])
    with pytest.raises(EngineError, match=said):
        ChildEngine(bench_peers.Modules, task_for(folder))


def test_an_engine_that_does_not_open_gives_its_reason(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="safetensors"):
        ChildEngine(bench_peers.Modules, task_for(folder))


SCRIPT = """
import os, sys
from lowvram_lab.peers import others
from lowvram_lab.peers.engines import Question, Task
from lowvram_lab.peers.process import ChildEngine
print("begun")
engine = ChildEngine(others.Modules, {task!r})
print(engine._process.pid, len(engine.meet(0)["tokens"][0]), flush=True)
{last}
"""


@pytest.mark.parametrize("last", ["engine.close()", "sys.exit('gone')", "os.kill(os.getpid(), 9)"])
def test_a_script_without_a_guard_is_not_run_again_and_leaves_no_orphan(folder, tmp_path, last):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(task=task_for(folder), last=last))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    begun, said = done.stdout.splitlines()
    process, tokens = map(int, said.split())
    assert (begun, tokens) == ("begun", LENGTH)
    assert done.stderr in ("", "gone\n")
    with contextlib.suppress(psutil.NoSuchProcess):  # it ends by itself when nobody can ask it any more
        psutil.Process(process).wait(60)


def command(*words):
    """``lowvram bench WORDS``, in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    cli_bench.add_bench(parser)
    return cli_bench.run_bench(parser.parse_args([str(word) for word in words]))


def test_the_command(folder, fakes, monkeypatch, capsys):
    monkeypatch.setattr(contest, "ChildEngine", LocalEngine)
    words = [folder, "--format", "int8", "--against", "fake", "--threads", 1, "--rounds", 3]
    words += ["--prompt-tokens", PROMPT, "--new-tokens", NEW]
    monkeypatch.setattr(LocalEngine, "__init__", _unweighed(LocalEngine.__init__))
    assert command(*words, "--json") == 0
    out, _ = capsys.readouterr()
    data = json.loads(out)
    assert [row["engine"] for row in data["rows"]] == ["lowvram", "lowvram (modules)", "fake"]
    assert data["rows"][2]["rounds"] == [2.0, 2.0, 4.0]
    assert "int8" in data["plan"]
    assert f"context {BenchSettings(PROMPT, NEW).context}" in data["plan"]
    assert command(*words[:4], "none", *words[5:], "--gpu", "64MiB") == 0
    out, err = capsys.readouterr()
    assert "fake" not in out
    assert "decode/s" in out
    assert "load average" in err
    words[words.index("--prompt-tokens") + 1] = f"8,{PROMPT}"
    assert command(*words, "--batch", "1, 2") == 0
    out, _ = capsys.readouterr()
    assert "total/s" in out
    assert out.count("fake: made up") == 1
    assert f"prompts of 8 and {PROMPT} tokens, batch 1 and 2" in out
    with pytest.raises(LowvramError, match="unknown engine 'vllm'"):
        command(folder, "--against", "vllm")
    with pytest.raises(LowvramError, match="--context longest"):
        command(folder, "--gpu", "64MiB", "--context", "longest")


def _unweighed(real):
    """Resident memory of the process that runs the tests is nobody's figure."""
    return lambda self, kind, task, weigh=False: real(self, kind, task)


@pytest.mark.gpu
def test_on_cuda(folder):
    settings = BenchSettings(rounds=1, new_tokens=NEW)
    found = bench(folder, "2GiB", against=("transformers", "accelerate"), settings=settings, progress=False)
    assert not found.simulated
    for row in found.rows[1:]:
        assert row.reason == ""
        assert 0 < row.peak_bytes <= 2 * 2**30
