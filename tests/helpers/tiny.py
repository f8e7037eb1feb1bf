"""Tiny random models made on the fly, their weights and tokenizer, and the one comparison the tests share."""

import functools
from dataclasses import replace

import torch

from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.formats import DTYPES, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.weights.solvers import dequantize, low_plane, quantize

# matrices this small only wait for a second thread, longest where another process holds its core
torch.set_num_threads(1)

# Inputs divisible by 64 (int4 groups), outputs by 16 (torch's CPU int4 packing); 2 key/value heads for 4 query heads.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TINY = ("llama", "qwen2")
"""``llama`` has a tied embedding, ``qwen2`` an untied one and biases on q, k and v."""

TOLERANCES = {
    "fp32": 1e-5,  # another order of summation: a few times 2^-24, over three layers
    "bf16": 0.03,  # eight bits of mantissa: 2^-9 a rounding, some tens of roundings from ids to logits
    "int8": 0.05,  # codes are up to half of amax/127 off: 1 % of a normal weight's deviation; bf16 rounding on top
    "int4": 0.45,  # half of (max - min)/15 off: 10 % of the deviation a weight, and three layers of them
    "int3": 0.9,  # eight levels, symmetric, so up to a whole amax/4 off: 22 % of the deviation a weight
    "nf4": 0.45,  # as int4: sixteen levels as well, spaced for a normal distribution
    "int4+4": 0.05,  # a fifteenth of what int4 is off by; embedding and head are int8
}
"""Largest ``relative_error`` of logits against the float32 model of the original weights, and where it comes from."""


class DictCheckpoint:
    """A state dict in the checkpoint's clothes."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def __contains__(self, name):
        return name in self.tensors

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name):
        return self.tensors[name].clone()

    def rows(self, name):
        return lambda select: self.read(name)[select]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal noise, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over the norm of the second, in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def tiny_config(kind: str, **changes):
    from transformers import LlamaConfig, Qwen2Config

    if kind == "llama":
        return LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **changes})
    return Qwen2Config(**{**SIZES, "tie_word_embeddings": False, **changes})


@functools.cache
def tiny_spec(kind: str) -> ModelSpec:
    return ModelSpec.from_config(tiny_config(kind), f"tiny-{kind}")


@functools.cache
def packaged_spec(name: str) -> ModelSpec:
    return find_source(name).spec()


def random_state(spec: ModelSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Seeded float32 weights by name, a tied one once."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module in spec.modules:
        for key, shape in module.parameters.items():
            noise = torch.randn(shape, generator=generator)
            if key == "bias":
                value = noise * 0.2
            elif module.kind == "other":
                value = 1 + noise * 0.1
            else:
                value = noise / shape[-1] ** 0.5
            if not (key == "weight" and module.tied_to):
                state[f"{module.name}.{key}"] = value
    return state


@functools.cache
def _state(kind: str) -> dict[str, torch.Tensor]:
    return random_state(tiny_spec(kind), len(kind))


def tiny_state(kind: str) -> dict[str, torch.Tensor]:
    """Seeded float32 weights by name; a fresh dictionary, shared tensors."""
    return dict(_state(kind))


@functools.cache
def stock_logits(kind: str, tokens: int) -> torch.Tensor:
    """What float32 transformers makes of ``random_ids(tokens)``."""
    with torch.no_grad():
        return tiny_stock(kind)(random_ids(tokens)).logits


def tiny_stock(kind: str, state=None, dtype=torch.float32):
    """The plain transformers model of these weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="sdpa")
    model.load_state_dict(state or tiny_state(kind), strict=False)
    model.tie_weights()
    for parameter in model.parameters():  # not model.to(dtype): that would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def dequantised_state(kind: str, plan: Plan) -> dict[str, torch.Tensor]:
    """The weights that a plan's formats leave of the original ones, in float32 (nf4 through bitsandbytes)."""
    state = tiny_state(kind)
    for module in tiny_spec(kind).modules:
        fmt, name = get_format(plan.modules[module.name].format), f"{module.name}.weight"
        if fmt.kind == "float" or module.tied_to:
            continue
        if fmt.kind == "nf4":
            from bitsandbytes.functional import dequantize_4bit, quantize_4bit

            state[name] = dequantize_4bit(*quantize_4bit(state[name], blocksize=fmt.group_size, quant_type="nf4"))
        else:
            high = quantize(state[name], fmt.plane, solver=plan.solver)
            low = dequantize(low_plane(state[name], high, fmt), fmt.low_plane) if fmt.planes > 1 else 0
            state[name] = dequantize(high, fmt.plane) + low
    return {name: value.to(DTYPES[plan.dtype]).float() for name, value in state.items()}


PLACEMENTS = {
    "gpu": lambda plan: plan,
    "half": lambda plan: plan.with_gpu_layers(1),
    "cpu": lambda plan: plan.with_modules("*", device="cpu"),
    "disk": lambda plan: plan.with_modules("*", device="disk").with_gpu_layers(1, disk=1),
    "streamed": lambda plan: replace(plan.with_gpu_layers(1, disk=1), stream_from=2),
    "embedding on the CPU": lambda plan: plan.with_modules(  # a tied head goes with it
        *((plan.spec.embedding, plan.spec.head) if plan.spec.tied else (plan.spec.embedding,)), device="cpu"
    ),
}


def tiny_plan(kind: str, recipe: str = "bf16", placement: str = "gpu", context: int = 512, dtype=None) -> Plan:
    return PLACEMENTS[placement](Plan.uniform(tiny_spec(kind), recipe, context=context, dtype=dtype))


def load_tiny(kind: str, plan: Plan | None = None, gpu=None, state=None):
    """A tiny model realised by ``load``, on a stand-in GPU with room to spare."""
    gpu = gpu or open_gpu("1000MiB")
    checkpoint = DictCheckpoint(state or tiny_state(kind))
    return load(plan or tiny_plan(kind), gpu, checkpoint=checkpoint, progress=False)


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tiny_tokenizer():
    """A token a byte, ids 3 to 258; before them ``<|im_start|>``, ``<|im_end|>`` (the tiny eos) and another."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


def letters_state() -> dict[str, torch.Tensor]:
    """Weights of a tiny qwen2 that only ever says small letters, so that its answers read back as the same tokens."""
    state = tiny_state("qwen2")
    letters = tiny_tokenizer()("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    head = torch.zeros_like(state["lm_head.weight"])
    head[letters] = state["lm_head.weight"][letters]
    return {**state, "lm_head.weight": head}


def random_ids(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


def decoded(decoder, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits after a prompt and after each token fed behind it, ``(tokens, batch, vocab)`` on the CPU."""
    steps = [decoder.prefill(ids[:, :prompt]).cpu()]
    for at in range(prompt, ids.shape[1]):
        steps.append(decoder.decode(ids[:, at : at + 1]).cpu().clone())  # the next call writes over them
    return torch.stack(steps)


def bytes_by_operator(decoder, tokens: int) -> list[int]:
    """Bytes that torch's allocator gave less those it took back, of each operator in so many decoded tokens."""
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(tokens):
            decoder.decode(token)
    return [event.self_cpu_memory_usage for event in profile.key_averages()]
