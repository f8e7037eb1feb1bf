"""A model run a layer at a time against the same model run whole; what is refused; what is given back."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from lowvram_lab.errors import CheckpointError, LowvramError
from lowvram_lab.model.compressed import quantization_config
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.weights.layerwise import TOKENS_AT_ONCE, LayerByLayer
from lowvram_lab.weights.moments import InputMoments, OutputGradients, captured_inputs
from tests.helpers.checkpoints import spoilt_state
from tests.helpers.tiny import (
    SIZES,
    TINY,
    DictCheckpoint,
    random_ids,
    random_state,
    relative_error,
    tiny_config,
    tiny_spec,
    tiny_state,
    tiny_stock,
)

EMBED, UP, NORM = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"
BIAS, HEAD = "model.layers.1.self_attn.q_proj.bias", "lm_head.weight"


def stream_of(kind, state=None, dtype=torch.float32) -> LayerByLayer:
    return LayerByLayer(tiny_spec(kind), DictCheckpoint(state or tiny_state(kind)), dtype)


@torch.no_grad()
def logits(stream: LayerByLayer, ids) -> torch.Tensor:
    hidden = stream.embed(ids)
    for index in range(len(stream)):
        with stream.layer(index) as layer:
            hidden = stream.run(layer, hidden)
    bias = f"{stream.spec.head}.bias"
    offset = stream.read(bias) if bias in stream.checkpoint else None
    return F.linear(stream.norm(hidden), stream.weight(stream.spec.head), offset)


def on_meta(stream: LayerByLayer) -> bool:
    layers = stream.model.get_submodule(stream.spec.layers_path)
    return all(p.is_meta for layer in layers for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TINY)
def test_logits_are_those_of_stock_transformers(kind, dtype):
    ids = random_ids(70, batch=3)
    with torch.no_grad():
        expected = tiny_stock(kind, dtype=dtype)(ids).logits
    found = logits(stream_of(kind, dtype=dtype), ids)
    assert found.dtype == dtype
    assert torch.equal(found, expected)  # the same operators over the same shapes


@pytest.mark.parametrize("kind", TINY)
def test_windows_too_many_for_one_pass_go_in_pieces(kind):
    ids = random_ids(300, batch=5)
    assert ids.numel() > TOKENS_AT_ONCE
    with torch.no_grad():
        expected = tiny_stock(kind)(ids).logits
    assert relative_error(logits(stream_of(kind), ids), expected) < 1e-6  # 3 windows at once, not 5
    assert relative_error(logits(stream_of(kind), ids[:1]), expected[:1]) < 1e-6


@pytest.mark.parametrize("kind", TINY)
def test_hidden_states_are_those_of_the_whole_model(kind):
    ids, stream = random_ids(40, batch=2), stream_of(kind)
    with torch.no_grad():
        expected = tiny_stock(kind)(ids, output_hidden_states=True).hidden_states
    hidden = stream.embed(ids)
    assert torch.equal(hidden, expected[0])
    for index in range(len(stream) - 1):  # transformers puts the final norm into the last one
        with stream.layer(index) as layer:
            stream.run_in_place(layer, hidden)
        assert relative_error(hidden, expected[index + 1]) < 1e-6


def test_rows_may_come_from_another_table():
    ids, stream = random_ids(20, batch=2), stream_of("llama")
    table = tiny_state("llama")[EMBED]
    assert torch.equal(stream.embed(ids, lambda rows: 2 * table[rows]), 2 * stream.embed(ids))


@pytest.mark.parametrize("kind", TINY)
def test_a_layers_weights_are_there_while_it_runs_and_not_after(kind):
    stream = stream_of(kind)
    assert on_meta(stream)
    with stream.layer(1) as layer:
        assert not any(p.is_meta or p.requires_grad for p in layer.parameters())
        assert torch.equal(layer.mlp.up_proj.weight, tiny_state(kind)[UP])
        assert all(p.is_meta for i in (0, 2) for p in stream.model.model.layers[i].parameters())
        layer.mlp.up_proj.weight.zero_()
    assert on_meta(stream)
    with pytest.raises(ZeroDivisionError), stream.layer(0):
        1 / 0  # noqa: B018
    assert on_meta(stream)
    with stream.layer(1) as layer:  # read anew: what was done to it is forgotten
        assert torch.equal(layer.mlp.up_proj.weight, tiny_state(kind)[UP])


def test_the_checkpoint_is_not_written_to():
    state = {name: value.clone() for name, value in tiny_state("qwen2").items()}
    stream = stream_of("qwen2", state)
    with stream.layer(1) as layer:
        layer.mlp.up_proj.weight.zero_()
    assert all(torch.equal(state[name], value) for name, value in tiny_state("qwen2").items())


def test_names_are_the_linear_modules_in_forward_order():
    stream = stream_of("qwen2")
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert stream.names(2) == [f"model.layers.2.{name}" for name in names]
    assert len(stream) == 3
    assert stream.owner("lm_head") == "lm_head"
    assert stream_of("llama").owner("lm_head") == "model.embed_tokens"


def spoilt(kind, name, change):
    return spoilt_state(tiny_state(kind), name, change)


def with_nan(tensor):
    tensor.view(-1)[5] = float("nan")
    return tensor


SPOILT = {
    "missing": (None, "found none|no tensor named"),
    "NaN": (with_nan, "expected finite weights"),
    "infinite": (lambda t: t.clamp_(min=float("inf")), "expected finite weights"),
    "fp8": (lambda t: t.to(torch.float8_e4m3fn), "expected a 16- or 32-bit float weight, found torch.float8_e4m3fn"),
    "integers": (lambda t: t.to(torch.int32), "expected a 16- or 32-bit float weight, found torch.int32"),
    "a row short": (lambda t: t[:-1], "expected shape .*, found"),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", [UP, BIAS, NORM, HEAD, "model.layers.1.input_layernorm.weight"])
def test_a_bad_tensor_is_named_in_one_line(name, how):
    change, words = SPOILT[how]
    with pytest.raises(CheckpointError, match=words) as error:
        logits(stream_of("qwen2", spoilt("qwen2", name, change)), random_ids(8))
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", SPOILT)
def test_a_bad_embedding_is_named_in_one_line(how):
    change, words = SPOILT[how]
    with pytest.raises(CheckpointError, match=words) as error:
        logits(stream_of("qwen2", spoilt("qwen2", EMBED, change)), torch.arange(8)[None])
    assert EMBED in str(error.value)


def test_a_converted_model_is_refused():
    config = tiny_config("qwen2")
    config.quantization_config = quantization_config({UP.removesuffix(".weight"): "int4"})
    spec = ModelSpec.from_config(config, "converted-qwen2")
    with pytest.raises(LowvramError, match="converted-qwen2 holds quantised weights alone; expected the 16-bit"):
        LayerByLayer(spec, DictCheckpoint(tiny_state("qwen2")))


def other(kind, **changes):
    sizes = dict(SIZES)
    if kind in ("falcon", "gpt2", "gpt_neox", "persimmon", "opt"):  # as many key/value heads as heads, or one
        del sizes["num_key_value_heads"]
    return ModelSpec.from_config(transformers.AutoConfig.for_model(kind, **{**sizes, **changes}), kind)


ARCHITECTURES = [
    ("qwen3", {}),
    ("phi3", {}),  # one matrix for q, k and v
    ("olmo2", {}),
    ("olmo3", {"sliding_window": 16}),  # masks and rotary tables by layer
    ("glm4", {}),
    ("smollm3", {}),  # every fourth layer without rotary
    ("stablelm", {}),
    ("gpt_neox", {}),  # parallel attention and MLP
    ("starcoder2", {}),
    ("phi", {}),  # a bias on the head
    ("mistral", {"sliding_window": 16}),
    pytest.param("granite", {"logits_scaling": 4.0}),
    pytest.param("cohere", {}),
    pytest.param("cohere2", {"sliding_window": 16}),
    pytest.param(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    pytest.param("gpt2", {}),
    ("olmo", {}),
    ("gemma", {"head_dim": 32}),
    ("gemma3_text", {"head_dim": 32}),
    ("opt", {"ffn_dim": 192, "word_embed_proj_dim": 128}),
]


@pytest.mark.parametrize(("kind", "changes"), ARCHITECTURES)
def test_other_architectures_run_rightly_or_are_refused(kind, changes):
    spec = other(kind, **changes)
    state, ids = random_state(spec), random_ids(40, batch=2)
    try:
        found = logits(LayerByLayer(spec, DictCheckpoint(state)), ids)
    except LowvramError as error:
        assert kind in str(error)
        assert "\n" not in str(error)
        return
    model = transformers.AutoModelForCausalLM.from_config(spec.pretrained_config(), attn_implementation="sdpa").eval()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {HEAD}
    model.tie_weights()
    with torch.no_grad():
        expected = model(ids).logits
    # a monotone map of logits (a factor, a softcap) would leave the order and still falsify every KL
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("kind", TINY)
def test_input_moments_are_means_over_tokens(kind):
    ids, model = random_ids(50, batch=3), tiny_stock(kind)
    named = {f"layer {i}": model.model.layers[i].mlp.down_proj for i in range(3)}
    named |= {f"{n}_proj": getattr(model.model.layers[1].self_attn, f"{n}_proj") for n in "qkv"}
    moments, kept = InputMoments(), {name: [] for name in named}
    with torch.no_grad(), captured_inputs(named) as seen:
        for window in ids.split(1):
            model(window)
            moments.add(seen)
            for name, value in seen.items():
                kept[name].append(value.flatten(0, -2).double())
    assert moments.tokens == 150
    for name, inputs in kept.items():
        x = torch.cat(inputs)
        assert relative_error(moments[name], x.T @ x / len(x)) < 1e-6  # float32 sums of 150 products
    assert moments["q_proj"].data_ptr() != moments["layer 0"].data_ptr()
    assert len(moments._sums) == 4  # q, k and v are given one tensor and share one matrix
    model(ids)
    assert seen["q_proj"].shape[0] == 1  # nothing is watched any more


def test_cross_moments_are_of_two_models():
    ids, states = random_ids(50, batch=2), (tiny_state("llama"), spoilt("llama", EMBED, lambda t: t * 1.1 + 0.01))
    moments, kept = InputMoments(), []
    for state in states:
        model = tiny_stock("llama", state)
        with torch.no_grad(), captured_inputs({"down": model.model.layers[1].mlp.down_proj}) as seen:
            model(ids)
        kept.append(dict(seen))
    moments.add(kept[1], kept[0])
    x, y = (seen["down"].flatten(0, -2).double() for seen in (kept[1], kept[0]))
    assert relative_error(moments["down"], x.T @ x / 100) < 1e-6
    assert relative_error(moments.cross("down"), y.T @ x / 100) < 1e-6


def by_autograd(model, named, rows, window) -> dict[str, torch.Tensor]:
    outputs = {}
    handles = [m.register_forward_hook(lambda _, __, o, n=n: outputs.__setitem__(n, o)) for n, m in named.items()]
    gradients = torch.autograd.grad(model(inputs_embeds=rows, labels=window).loss, list(outputs.values()))
    for handle in handles:
        handle.remove()
    return dict(zip(outputs, gradients, strict=True))


@pytest.mark.parametrize("kind", TINY)
def test_output_gradients_are_those_of_autograd(kind):
    ids, model, sums = random_ids(30, batch=4), tiny_stock(kind), OutputGradients()
    named = {
        f"layer {i} {n}": getattr(model.model.layers[i].mlp, f"{n}_proj") for i in range(3) for n in ("up", "down")
    }
    model.requires_grad_(False)
    expected = dict.fromkeys(named, 0)
    for window in ids.split(2):
        rows = model.model.embed_tokens(window).detach().requires_grad_(True)
        with sums.watch(named):
            model(inputs_embeds=rows, labels=window).loss.backward()
        for name, gradient in by_autograd(model, named, rows, window).items():
            expected[name] = expected[name] + gradient.double().square().sum(dim=(0, 1))
    for name in named:
        assert sums[name].shape == expected[name].shape
        assert relative_error(sums[name], expected[name]) < 1e-5
    before = sums["layer 0 up"].clone()
    model(inputs_embeds=rows, labels=window).loss.backward()
    assert torch.equal(sums["layer 0 up"], before)  # nothing is watched any more
