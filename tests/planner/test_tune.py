"""tune: one load, a few splits and thread counts, measured beside forecast; and the command."""

import json
import re

import pytest
import torch

from lowvram_lab import timing
from lowvram_lab.cli import main as cli
from lowvram_lab.errors import PlanError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.planner import tune as tune_module
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.tune import tune
from lowvram_lab.rates import machine as measuring
from tests.helpers.checkpoints import write_model
from tests.helpers.machines import Made
from tests.helpers.tiny import DictCheckpoint, tiny_plan, tiny_state


def measured(**options):
    plan = tiny_plan("qwen2", "int8")
    given = {"workload": Workload(8, 3), "checkpoint": DictCheckpoint(tiny_state("qwen2")), "machine": Made()}
    return tune(plan, open_gpu("64MiB"), progress=False, **{**given, **options})


def test_every_split_with_every_thread_count(monkeypatch):
    loads = []
    real = tune_module.load
    monkeypatch.setattr("lowvram_lab.planner.tune.load", lambda *a, **k: (loads.append(1), real(*a, **k))[1])
    threads = torch.get_num_threads()
    table = measured(threads=[1, 2])
    assert len(loads) == 1
    assert torch.get_num_threads() == threads
    assert [*zip(table["gpu_layers"], table["threads"], strict=True)] == [(n, t) for n in (0, 1, 3) for t in (1, 2)]
    assert (table["tokens_per_s"] > 0).all()
    assert (table["ttft_s"] > 0).all()
    assert table["peak_gpu_bytes"].is_monotonic_increasing
    best = table.loc[table["tokens_per_s"].idxmax()]
    assert table.loc[table["tokens_per_s"].idxmax(), "frontier"]
    for row in table.itertuples():
        beaten = ((table["tokens_per_s"] > row.tokens_per_s) & (table["peak_gpu_bytes"] <= row.peak_gpu_bytes)).any()
        assert row.frontier != beaten
    assert best["forecast_tokens_per_s"] > 0


def test_splits_that_do_not_fit_are_left_out():
    whole = measured(gpu_layers=[3], threads=[1])["peak_gpu_bytes"].tolist()[0]
    plan = tiny_plan("qwen2", "int8")
    checkpoint = DictCheckpoint(tiny_state("qwen2"))
    with pytest.raises(PlanError, match=r"none of \[3\] layers on the GPU fits"):
        tune(plan, open_gpu(whole - 1), gpu_layers=[3], checkpoint=checkpoint, machine=Made())


def test_the_command_prints_a_row_for_each(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    for name, value in {"COPIES_BYTES": 2**20, "LARGE": 512, "PRODUCT_BITS": (10, 18), "DEEP": 6}.items():
        monkeypatch.setattr(measuring, name, value)
    monkeypatch.setattr(timing, "ROUND_S", 0.002)
    monkeypatch.setattr(timing, "ATTEMPTS", 1)
    directory = write_model(tmp_path / "model", "llama")
    words = ["tune", str(directory), "--gpu", "64MiB", "--format", "int8", "--context", "128", "--threads", "1"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["gpu_layers"] for row in found["rows"]] == [0, 1, 3]
    assert all(row["threads"] == 1 for row in found["rows"])
    assert "simulated" in found["gpu"] or torch.cuda.is_available()
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert "tokens_per_s" in out
    assert re.search(r"fastest: --gpu-layers \d --threads 1 \(frontier: no row", err)
    assert len(out.splitlines()) == 4
    assert cli.main(["plan", *words[1:4], "--context", "128", "--gpu-layers", "1", "--explain", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["speed"]["decode_tokens_per_s"] > 0
    assert planned["speed"]["origin"] == "forecast"
    places = {entry["device"] for name, entry in planned["plan"]["modules"].items() if ".layers.2." in name}
    assert places == {"gpu"}
    assert {entry["device"] for name, entry in planned["plan"]["modules"].items() if ".layers.1." in name} == {"cpu"}
    assert (
        cli.main(["plan", *words[1:4], "--context", "128", "--prefer", "fidelity", "--ram", "1GiB", "--explain"]) == 0
    )
    assert "ms a token" in capsys.readouterr().out
