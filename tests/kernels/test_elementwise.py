"""Norms, rotary positions and gates in one pass, beside transformers' and torch's operators."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lowvram_lab.kernels.elementwise import gated, rms_norm, rotated
from tests.helpers.kernels import WAYS

pytestmark = [
    pytest.mark.usefixtures("compiling", "way"),
    pytest.mark.parametrize("way", WAYS, indirect=True),
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU"),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def steps_apart(found, expected):
    """By how many bfloat16 numbers two tensors differ at most."""
    ordered = (each.view(torch.int16).int() for each in (found, expected))
    first, second = (torch.where(each < 0, -(each & 0x7FFF), each) for each in ordered)
    return int((first - second).abs().max())


@pytest.mark.parametrize("columns", [1, 15, 16, 64, 577, 2560])
def test_a_norm_is_transformers(columns):
    norm = LlamaRMSNorm(columns, eps=1e-5).bfloat16()
    norm.weight.data = normal(columns, seed=1)
    rows = normal(3, 17, columns) * 30
    with torch.no_grad():
        expected = norm(rows)
    found = rms_norm(rows, norm.weight, 1e-5)
    assert found.shape == expected.shape
    # sums of squares are taken in another order: a value between two numbers may be rounded to the other one, twice
    assert steps_apart(found, expected) <= 2
    assert (found != expected).float().mean() < 0.01
    assert rms_norm(torch.zeros(1, columns).bfloat16(), norm.weight, 1e-5).count_nonzero() == 0


@pytest.mark.parametrize(("width", "batch"), list(itertools.product((2, 30, 64, 128), (1, 3))))
def test_positions_are_transformers_to_the_bit(width, batch):
    states, cos, sin = normal(3, 11, 5, width), normal(batch, 11, width, seed=1), normal(batch, 11, width, seed=2)
    expected, _ = apply_rotary_pos_emb(states, states, cos, sin, unsqueeze_dim=2)
    assert torch.equal(rotated(states, cos, sin), expected)


def test_gates_are_torchs():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    gate = every[every.isfinite() & (every.abs() < 80)]
    up = normal(len(gate))
    expected = F.silu(gate) * up
    assert steps_apart(gated(gate, up), expected) <= 2  # e^x of torch and ours may be rounded apart
    assert (gated(gate, up) != expected).float().mean() < 0.002
    far = torch.tensor([-3e38, -200.0, 200.0, 3e38]).bfloat16()
    assert gated(far, torch.ones(4).bfloat16()).abs().tolist() == pytest.approx([0, 0, *far[2:].tolist()], abs=1e-30)


def test_threads_change_nothing():
    rows, weight = normal(300, 576), normal(576, seed=1)
    angles, states = normal(1, 300, 64, seed=2), normal(2, 300, 3, 64, seed=3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((rms_norm(rows, weight, 1e-6), rotated(states, angles, angles), gated(rows, rows)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_would_be_read_as_something_else_is_refused():
    rows = normal(3, 32)
    for call in (
        lambda: gated(rows, rows.half()),
        lambda: gated(rows, rows[:2]),
        lambda: rms_norm(rows.float(), rows[0].float(), 1e-6),
        lambda: rms_norm(rows, rows[0, :16], 1e-6),
        lambda: rotated(normal(2, 3, 1, 32), normal(3, 3, 32), normal(3, 3, 32)),
        lambda: rotated(normal(2, 3, 1, 32), normal(1, 3, 32), normal(1, 3, 32).float()),
    ):
        with pytest.raises(RuntimeError, match="expected tensors in bfloat16 whose shapes fit, found"):
            call()


def test_what_lies_apart_is_read_as_it_is():
    rows, weight = normal(40, 9).T, normal(40, seed=1)
    assert torch.equal(rms_norm(rows, weight, 1e-6), rms_norm(rows.contiguous(), weight, 1e-6))
    assert torch.equal(gated(rows, rows), gated(rows.contiguous(), rows.contiguous()))
    states, angles = normal(2, 3, 7, 16).transpose(1, 2), normal(1, 7, 16)
    assert torch.equal(rotated(states, angles, angles), rotated(states.contiguous(), angles, angles))
