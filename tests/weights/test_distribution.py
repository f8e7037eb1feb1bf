"""Streamed statistics equal numpy's over the whole tensor; errors equal a whole tensor's round trip."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lowvram_lab as lab
from lowvram_lab.errors import CheckpointError, LowvramError, PlanError
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import get_format
from lowvram_lab.weights import distribution
from lowvram_lab.weights.distribution import error_curve, weight_histograms, weight_statistics
from lowvram_lab.weights.solvers import round_to_nearest
from tests.helpers.tiny import SIZES, seeded, tiny_config, tiny_state

# float64 sums in another order: some 1e-16 a term, more where moments cancel
CLOSE = {"rel": 1e-9, "abs": 1e-12}


@pytest.fixture
def small_chunks(monkeypatch):
    """Rows of 64 come five at a time, so that every sum crosses chunks."""
    monkeypatch.setattr(distribution, "CHUNK_BYTES", 5 * 64 * 4)


def checkpoint_of(directory, **tensors) -> Checkpoint:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return Checkpoint(directory)


def describe(directory, tensor, **options) -> pd.Series:
    table = weight_statistics(checkpoint_of(directory, **{"a.weight": tensor}), progress=False, **options)
    assert len(table) == 1
    return table.iloc[0]


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    weight = seeded(rows, columns).pow(3) * 0.1 + 0.02
    weight[3, 5], weight[:, 7] = 9.0, weight[:, 7] * 6
    return weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_statistics_equal_numpys_on_the_whole_tensor(tmp_path, small_chunks, dtype):
    weight = heavy_tailed(33, 64).to(dtype)
    weight[4, :8] = 0
    found, whole = describe(tmp_path, weight), weight.double().numpy()
    mean, std = whole.mean(), whole.std()
    assert found["mean"] == pytest.approx(mean, **CLOSE) and found["std"] == pytest.approx(std, **CLOSE)
    assert found["kurtosis"] == pytest.approx((((whole - mean) / std) ** 4).mean() - 3, **CLOSE)
    assert found["max_over_std"] == pytest.approx(np.abs(whole - mean).max() / std, **CLOSE)
    assert found["share_beyond_6_std"] == (np.abs(whole - mean) > 6 * std).mean() > 0
    assert found["exact_zeros"] == (whole == 0).mean() > 0
    for axis, column in ((1, "row_spread"), (0, "column_spread")):
        rms = np.sqrt((whole**2).mean(axis=axis))
        assert found[column] == pytest.approx(np.quantile(rms, 0.99) / np.median(rms), rel=1e-9)
    assert found["column_spread"] > 2
    assert (found["bytes"], found["shape"]) == (weight.nbytes, (33, 64)) and found["not_finite"] == 0


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60),
    shift=st.sampled_from([0.0, 1000.0]),
    columns=st.integers(1, 7),
    chunk=st.integers(4, 64),
)
def test_moments_equal_numpys_however_they_are_chunked(values, shift, columns, chunk):
    whole = np.resize(np.float64(values) + shift, (-(-len(values) // columns), columns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "CHUNK_BYTES", chunk)
        count, mean, std, kurtosis = distribution._moments(torch.from_numpy(whole.copy()))
    assert count == whole.size and mean == pytest.approx(whole.mean(), rel=1e-9, abs=1e-9)
    assert std == pytest.approx(whole.std(), rel=1e-7, abs=1e-9)
    if whole.std() > 1e-3:
        assert kurtosis == pytest.approx((((whole - whole.mean()) / whole.std()) ** 4).mean() - 3, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_constant_has_no_deviation_and_no_kurtosis(tmp_path, small_chunks, dtype):
    found = describe(tmp_path, torch.full((40, 64), 0.1, dtype=dtype))
    assert found["std"] == 0 and found["row_spread"] == 1
    assert math.isnan(found["kurtosis"]) and math.isnan(found["max_over_std"])


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_errors_equal_the_round_trip_of_the_whole_tensor(tmp_path, small_chunks, bits):
    weight = heavy_tailed(33, 192).bfloat16()
    found = describe(tmp_path, weight, bits=(bits,), group_sizes=(32, 64, 128))
    for size, name in ((32, f"int{bits}-g32"), (64, f"int{bits}")):
        fmt = get_format("int8" if bits == 8 else name)
        change = round_to_nearest(weight, fmt).dequantize().double() - weight.double()
        expected = float(change.norm() / weight.double().norm())
        column = "error_int8" if bits == 8 else f"error_int{bits}_g{size}"
        assert found[column] == pytest.approx(expected, rel=1e-9)
    if bits != 8:
        assert math.isnan(found[f"error_int{bits}_g128"])  # 192 columns are no groups of 128
    assert [name for name in found.index if name.startswith("error_int8")] == (["error_int8"] if bits == 8 else [])


def test_vectors_and_empty_and_odd_tensors_have_a_row(tmp_path, small_chunks):
    tensors = {"norm.weight": seeded(100), "scalar": torch.tensor(2.0), "none.weight": torch.empty(0, 64)}
    tensors |= {"deep.weight": seeded(3, 4, 64), "zeros.weight": torch.zeros(4, 64)}
    table = weight_statistics(checkpoint_of(tmp_path, **tensors), progress=False).set_index("name")
    errors = table[[name for name in table if name.startswith("error_")]]
    assert set(table.index) == set(tensors)
    assert errors.loc[["norm.weight", "scalar", "none.weight", "zeros.weight"]].isna().all(axis=None)
    assert table.loc["deep.weight", "error_int4_g64"] > 0 and table.loc["norm.weight", "std"] > 0
    assert table.loc["scalar", "mean"] == 2 and math.isnan(table.loc["none.weight", "mean"])
    assert table.loc[["norm.weight", "scalar"], ["row_spread", "column_spread"]].isna().all(axis=None)


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path, small_chunks):
    weight = heavy_tailed(20, 64)
    weight[0, 0], weight[7, 1], weight[12] = math.nan, -math.inf, math.inf
    found, rest = describe(tmp_path, weight), weight[weight.isfinite()].double()
    assert found["not_finite"] == 2 + 64
    assert found["std"] == pytest.approx(float(rest.std(correction=0)), rel=1e-9)
    assert found["mean"] == pytest.approx(float(rest.mean()), rel=1e-9) and found["row_spread"] > 0
    assert math.isnan(found["error_int4_g64"]) and math.isnan(found["error_int8"])


def test_names_become_roles_and_layers(tmp_path):
    names = {
        "model.embed_tokens.weight": ("embed_tokens", None),
        "model.layers.11.self_attn.q_proj.weight": ("q_proj", 11),
        "model.layers.11.self_attn.q_proj.bias": ("q_proj.bias", 11),
        "model.layers.2.post_attention_layernorm.weight": ("norm", 2),
        "model.norm.weight": ("norm", None),
        "transformer.h.3.attn.c_attn.weight": ("c_attn", 3),
        "wte": ("wte", None),
    }
    tensors = {name: seeded(2, 2, seed=at) for at, name in enumerate(names)}
    table = weight_statistics(checkpoint_of(tmp_path, **tensors), progress=False).set_index("name")
    assert {
        name: (row["role"], None if row["layer"] is pd.NA else row["layer"]) for name, row in table.iterrows()
    } == names


def test_equal_bytes_are_found_and_not_worked_on_twice(tmp_path, monkeypatch):
    one = seeded(4, 64)
    seen = []
    original = distribution._describe
    monkeypatch.setattr(distribution, "_describe", lambda t, f: seen.append(t.shape) or original(t, f))
    tensors = {"a.weight": one, "b.weight": one.clone(), "c.weight": one.clone().view(8, 32), "d.weight": -one}
    table = weight_statistics(checkpoint_of(tmp_path, **tensors), progress=False).set_index("name")
    assert table["duplicate_of"].dropna().to_dict() == {"b.weight": "a.weight"} and len(seen) == 3
    assert table.loc["b.weight", "bytes"] == one.nbytes
    assert table.loc["b.weight", "std"] == table.loc["a.weight", "std"]


def a_model(directory, kind: str, **extra):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**tiny_config(kind).to_dict(), **extra}))
    return checkpoint_of(directory, **tiny_state(kind))


def test_a_tied_head_that_no_file_holds_is_listed(tmp_path):
    a_model(tmp_path / "llama", "llama")
    table = lab.weight_statistics(str(tmp_path / "llama"), progress=False).set_index("name")
    head, table_row = table.loc["lm_head.weight"], table.loc["model.embed_tokens.weight"]
    assert (head["role"], head["bytes"], head["duplicate_of"]) == ("lm_head", 0, "model.embed_tokens.weight")
    assert head["error_int4_g64"] == table_row["error_int4_g64"] and head["layer"] is pd.NA
    assert table["bytes"].sum() == 4 * sum(tensor.numel() for tensor in tiny_state("llama").values())
    assert sorted(table["layer"].dropna().unique()) == list(range(SIZES["num_hidden_layers"]))


def test_an_untied_model_and_one_we_could_not_run_are_described_as_they_lie(tmp_path):
    untied = weight_statistics(a_model(tmp_path / "qwen2", "qwen2"), progress=False)
    assert untied["duplicate_of"].isna().all() and untied.loc[untied["name"] == "lm_head.weight", "bytes"].item() > 0
    odd = weight_statistics(a_model(tmp_path / "odd", "qwen2", model_type="no-such-model"), progress=False)
    pd.testing.assert_frame_equal(untied, odd)


def test_is_deterministic_and_says_nothing(tmp_path, capfd):
    checkpoint = a_model(tmp_path / "qwen2", "qwen2")
    pd.testing.assert_frame_equal(*(weight_statistics(checkpoint, progress=False) for _ in range(2)))
    assert capfd.readouterr() == ("", "")
    weight_statistics(checkpoint, bits=(8,))
    out, err = capfd.readouterr()
    assert out == "" and "weights" in err


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused_in_one_line(tmp_path, dtype):
    checkpoint = checkpoint_of(tmp_path, **{"a.weight": seeded(4, 64), "b.weight": torch.ones(4, 64).to(dtype)})
    with pytest.raises(CheckpointError, match=r"found torch\.\w+ in b\.weight.*name the original") as caught:
        weight_statistics(checkpoint, progress=False)
    assert "\n" not in str(caught.value)
    (tmp_path / "recipe.json").write_text(json.dumps({"source": "smollm2-135m"}))
    with pytest.raises(CheckpointError, match="the original, smollm2-135m$"):
        weight_statistics(checkpoint, progress=False)


def test_bits_and_groups_without_a_format_are_refused(tmp_path):
    checkpoint = checkpoint_of(tmp_path, **{"a.weight": seeded(4, 64)})
    for options in ({"bits": (7,)}, {"group_sizes": (48,)}):
        with pytest.raises(PlanError, match="unknown format"):
            weight_statistics(checkpoint, progress=False, **options)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_curve_counts_scales_and_zero_points(symmetric):
    weight = seeded(64, 256)
    curve = error_curve(weight, (3, 4, 8), (32, 128), symmetric=symmetric).set_index(["bits", "group_size"])
    each = 16 if symmetric else 32
    for (bits, size), row in curve.iterrows():
        assert row["bits_per_weight"] == bits + each / size
        fmt = get_format("int8" if bits == 8 else f"int{bits}-g{size}")
        restored = round_to_nearest(weight, fmt, symmetric=symmetric).dequantize()
        assert row["error"] == pytest.approx(float((restored - weight).norm() / weight.norm()), rel=1e-5)
    assert list(curve.index) == [(3, 32), (3, 128), (4, 32), (4, 128), (8, 256)]
    # half the step: half the error, some 6 dB; the scales' own rounding to 16 bits is the rest
    assert curve["error"][3, 32] / curve["error"][4, 32] == pytest.approx(2.1, abs=0.2)
    assert curve["error"][4, 128] > curve["error"][4, 32]


def test_histograms_are_densities_in_deviations(tmp_path, small_chunks):
    tensors = {f"layers.{at}.q_proj.weight": seeded(64, 64, seed=at) * 10.0**at + at for at in range(2)}
    tensors |= {"k_proj.weight": heavy_tailed(64, 64), "norm.weight": seeded(64)}
    tensors["k_proj.weight"][0, 0] = math.nan
    checkpoint = checkpoint_of(tmp_path, **tensors)
    found = weight_histograms(checkpoint, limit=6.0, bins=25)
    assert sorted(found) == ["k_proj", "q_proj"] and list(weight_histograms(checkpoint, ["k_proj"])) == ["k_proj"]
    width = 12 / 25
    assert np.diff(found.index) == pytest.approx(width) and found.index[12] == pytest.approx(0, abs=1e-12)
    assert (found * width).sum().to_numpy() == pytest.approx(1)
    whole = [tensor.double().flatten().numpy() for name, tensor in tensors.items() if "q_proj" in name]
    pooled = np.concatenate([(values - values.mean()) / values.std() for values in whole])
    expected, _ = np.histogram(pooled, bins=25, range=(-6, 6), density=True)
    assert found["q_proj"].to_numpy() == pytest.approx(expected, abs=3 / len(pooled) / width)
    assert found["k_proj"].iloc[-1] > 0  # what lies beyond is counted at the edge
    for roles in (["v_proj"], ["norm"], ["q_proj", "v_proj"]):
        with pytest.raises(LowvramError, match="expected matrices of kind"):
            weight_histograms(checkpoint, roles)
