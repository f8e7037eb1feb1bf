"""Rates that follow from a profile: bytes over bandwidth and arithmetic over clock and lanes, by hand."""

from dataclasses import replace

import pytest

from lowvram_lab.errors import PlanError
from lowvram_lab.planner.on_target import to_cpu
from lowvram_lab.planner.speed import forecast_speed
from tests.helpers.machines import BOARD
from tests.helpers.tiny import tiny_plan, tiny_spec

MACHINE = BOARD.machine  # 2 cores of 1 GHz and 4 lanes, 4 GB/s, 2 G products a second


@pytest.mark.parametrize(
    ("fmt", "size", "cycles"),
    [
        ("bf16", 2, 3 / 4),
        ("fp32", 4, 1 / 4),
        ("int8", 1 + 2 / 6144, 1.9),
        ("int3", 3 / 8 + 2 / 64, 1.9),
        ("int4", 1 / 2 + 4 / 64, 9 / 4),
        ("nf4", 1 / 2 + 4 / 64, 1.9),
    ],
)
def test_a_weight_takes_its_bytes_and_its_arithmetic(fmt, size, cycles):
    by_hand = size / 4e9 + cycles / (1e9 * 2)
    assert MACHINE.kernel(fmt).weight_s == pytest.approx(by_hand)
    assert MACHINE.product("compiled", fmt, (64, 64)).weight_s == pytest.approx(by_hand)
    alone = size / 4e9 + cycles / 1e9
    assert MACHINE.kernel(fmt, threads=1).weight_s == pytest.approx(alone)


def test_more_threads_than_cores_are_no_faster():
    assert MACHINE.kernel("int8", threads=64) == MACHINE.kernel("int8", threads=2)


def test_a_tied_head_in_int4_is_multiplied_by_our_kernel():
    assert MACHINE.kernel("int4", shared=True).weight_s == pytest.approx((1 / 2 + 4 / 64) / 4e9 + 1.9 / 2e9)


def test_with_avx2_a_weight_takes_vector_operations():
    machine = replace(BOARD, instructions="avx2", lanes=8).machine
    assert machine.kernel("int8").weight_s == pytest.approx((1 + 2 / 6144) / 4e9 + 3.8 / 8 / 2e9)
    assert machine.kernel("int6").weight_s == pytest.approx((6 / 8 + 2 / 64) / 4e9 + 7.8 / 8 / 2e9)


def test_further_tokens_of_a_prompt_are_large_products():
    assert MACHINE.kernel("fp32").row_s == pytest.approx(1 / 2e9)
    assert MACHINE.kernel("int8").row_s == pytest.approx(1 / 0.6e9)  # 16 bits: 30 % of float32's speed
    assert MACHINE.kernel("int4").row_s == pytest.approx(9 / 4 / 2e9)  # torch's kernel, as for one token
    assert MACHINE.rows("int8").row_share == pytest.approx(1 / 4 / 2e9 / MACHINE.kernel("int8").weight_s)


@pytest.mark.parametrize(("kv_format", "size"), [("bf16", 2), ("int8", 1), ("int4", 0.5), ("fp32", 4)])
def test_attention_reads_a_key_and_a_value(kv_format, size):
    rates = MACHINE.attention("compiled", kv_format)
    assert rates.key_s == pytest.approx(2 * size / 4e9)
    assert rates.query_s == pytest.approx(2 * 3 / 4 / 2e9)


def test_there_is_a_disk_and_no_card():
    assert MACHINE.disk().read == 1e8
    assert MACHINE.link() is None and not MACHINE.cuda


def test_the_decoder_does_not_depend_on_this_machines_compiler(monkeypatch):
    tiny_spec("llama")
    plan = to_cpu(tiny_plan("llama", "int8"))
    monkeypatch.setattr("lowvram_lab.decoding.kinds.there", lambda: False)
    monkeypatch.setattr("lowvram_lab.engine.layers.there", lambda: False)
    assert MACHINE.engine_of(plan)[0] == "compiled"


def test_a_plan_with_something_on_a_gpu_is_refused():
    tiny_spec("llama")
    with pytest.raises(PlanError, match="has no GPU"):
        forecast_speed(tiny_plan("llama", "int8"), machine=MACHINE)


def test_what_is_taken_for_granted_names_the_kernels():
    tiny_spec("llama")
    said = " ".join(MACHINE.assumptions(to_cpu(tiny_plan("llama", "int4"))))
    assert "never measured" not in said and "no such machine was measured" in said
    assert "torch's kernel, 9" in said and "portable C++" in said and "30%" in said
    plain = " ".join(MACHINE.assumptions(to_cpu(tiny_plan("llama", "fp32"))))
    assert "torch's kernel" not in plain and "portable" not in plain and "30%" not in plain
