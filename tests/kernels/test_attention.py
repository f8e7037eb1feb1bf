"""Our attention of many queries beside torch's and beside float64."""

import pytest
import torch
import torch.nn.functional as F

from lowvram_lab.kernels.attention import FEWEST_QUERIES, attends, attention
from lowvram_lab.kernels.library import multiplies_pairs
from tests.helpers.tiny import relative_error

CASES = {
    "a prompt": (1, 9, 3, 64, 64, 64),
    "no whole tile": (2, 4, 4, 80, 333, 333),
    "behind others": (1, 9, 3, 64, 100, 500),
    "two tiles": (1, 2, 1, 128, 200, 200),
    "few queries": (3, 4, 2, 16, 8, 70),
    "one tile of keys": (1, 1, 1, 32, 9, 64),
}
pytestmark = [
    pytest.mark.usefixtures("compiling"),
    pytest.mark.skipif(not multiplies_pairs(), reason="another processor"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU"),
]


def states(case):
    batch, heads, kv_heads, width, queries, keys = CASES[case]
    random = torch.Generator().manual_seed(queries)

    def of(heads, tokens, room):
        return torch.randn(batch, heads, room, width, generator=random).bfloat16()[:, :, :tokens]

    return of(heads, queries, queries), of(kv_heads, keys, keys + 7), of(kv_heads, keys, keys + 7)


def exactly(q, k, v, mask):
    groups = q.shape[1] // k.shape[1]
    k, v = (each.double().repeat_interleave(groups, 1) for each in (k, v))
    return F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask).transpose(1, 2)


def behind(q, k):
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])


@pytest.mark.parametrize("case", CASES)
def test_it_is_attention(case):
    q, k, v = states(case)
    assert attends(q, k, v, None)
    mask = behind(q, k)
    found = attention(q, k, v, None, True, q.shape[-1] ** -0.5)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.double(), exactly(q, k, v, mask)) < 3e-3  # torch's own: 2e-3
    masked = attention(q, k, v, mask[None, None], False, q.shape[-1] ** -0.5)
    assert torch.equal(masked, found)
    everything = attention(q, k, v, None, False, q.shape[-1] ** -0.5)
    assert relative_error(everything.double(), exactly(q, k, v, None)) < 3e-3


def test_masks_of_each_sequence():
    q, k, v = states("few queries")
    mask = torch.rand(3, 1, 8, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[..., 69] = True
    assert attends(q, k, v, mask)
    found = attention(q, k, v, mask, False, 0.5)
    k2, v2 = (each.double().repeat_interleave(2, 1) for each in (k, v))
    expected = F.scaled_dot_product_attention(q.double(), k2, v2, attn_mask=mask, scale=0.5).transpose(1, 2)
    assert relative_error(found.double(), expected) < 3e-3
    mask[1, 0, 3] = False
    assert attention(q, k, v, mask, False, 0.5)[1, 3].count_nonzero() == 0


def test_very_different_scores_and_nothing_beyond_the_keys_is_seen():
    q, k, v = states("no whole tile")
    k[:, :, 5] *= 300
    wide = torch.full((2, 4, 400, 80), torch.nan).bfloat16()
    wide[:, :, :333] = v
    found = attention(q, k, wide[:, :, :333], None, True, 80**-0.5)
    assert relative_error(found.double(), exactly(q, k, v, behind(q, k))) < 3e-3


def test_threads_change_nothing():
    q, k, v = states("no whole tile")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(attention(q, k, v, None, True, 0.1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_what_it_leaves_to_torch():
    q, k, v = states("a prompt")
    few = q[:, :, : FEWEST_QUERIES - 1]
    float_mask = torch.zeros(1, 1, 64, 64)
    refused = [
        (q.float(), k.float(), v.float(), None),
        (few, k, v, None),
        (q[..., :40], k[..., :40], v[..., :40], None),
        (q, k, v[..., :32], None),
        (q, k, v, float_mask),
        (q, k, v, behind(q, k)[None, None].expand(1, 9, 64, 64)),
        (q, k[:, :, :32], v[:, :, :32], None),
    ]
    assert not any(attends(*case) for case in refused)
