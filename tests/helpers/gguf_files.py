"""Tiny ``.gguf`` files, as llama.cpp's converter and its tool to quantise would write them."""

import gguf
import numpy as np
import torch

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    "IQ1_M": (),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Where a block has its scale and least value in 16 bits, of types that gguf-py reads and does not write."""


def blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows of a weight in blocks; of a type that gguf-py does not write, any codes under small scales."""
    if kind.name not in HALVES:
        return gguf.quants.quantize(values, kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rows, count = values.shape[0], values.shape[1] // elements
    noise = np.random.default_rng(rows)
    data = noise.integers(0, 256, (rows, count, size), dtype=np.uint8)
    for at in HALVES[kind.name]:
        small = noise.normal(0, 2e-3 / elements**0.5, (rows, count, 1)).astype(np.float16)
        data[:, :, at : at + 2] = small.view(np.uint8)
    if kind.name == "IQ1_M":  # four bits of its scale in each of its last four words
        small = np.full((rows, count, 1), 2e-4, np.float16).view(np.uint16)
        upper = small >> np.arange(0, 16, 4, dtype=np.uint16) & 15
        data[:, :, 49::2] = data[:, :, 49::2] & 15 | upper.astype(np.uint8) << 4
    return data.reshape(rows, -1)


def write_gguf(path, model, arch="llama", kind="F32", skip=(), template=CHAT_TEMPLATE, extra=(), kinds=(), **metadata):
    """Writes a model as llama.cpp's converter would: its tensor names, and for Llama its order of rotary dimensions.

    ``extra`` are further tensors, ``kinds`` types of some tensors by a part of their GGUF names, ``metadata`` further
    keys (``__`` for a dot) or, with ``None``, keys to leave out; ``in_part`` is no key: so many tensors a part
    has, of a file that gguf-py is to split.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=metadata.pop("in_part", 0))
    add_metadata(writer, config, arch, {key.replace("__", "."): value for key, value in metadata.items()})
    add_vocabulary(writer, template)
    for name, values in dict(extra).items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    expected = {}
    for name, tensor in model.state_dict().items():
        gguf_name = to_gguf_name(name)
        if gguf_name in skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = tensor.numpy()
        small = values.ndim == 1
        its_kind = next((of for part, of in dict(kinds).items() if part in gguf_name), kind)
        quantised = gguf.GGMLQuantizationType[its_kind]
        packed = values if small else blocks(values, quantised)
        back = values if small else gguf.quants.dequantize(packed, quantised)
        dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
        expected[name] = torch.from_numpy(np.array(back)).to(dtype)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            rows = packed.reshape(heads, 2, -1, packed.shape[-1]).swapaxes(1, 2)
            packed = np.ascontiguousarray(rows.reshape(packed.shape))
        writer.add_tensor(gguf_name, packed, raw_dtype=None if small else quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add_metadata(writer, config, arch, changes):
    facts = {
        "general.name": "tiny",
        "tokenizer.ggml.pre": "qwen2" if arch == "qwen2" else "gpt-2",
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    methods = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in {**facts, **changes}.items():
        if value is not None:
            methods[type(value)](key, value)


def add_vocabulary(writer, template):
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in letters] + [chr(256 + i) for i in range(256 - len(letters))]
    tokens = [*letters, "he", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(257)
    if template is not None:
        writer.add_chat_template(template)


def to_gguf_name(name):
    for hf, short in [
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
        ("model.layers.", "blk."), ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"), ("_proj", ""),
        ("mlp.", "ffn_"), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
    ]:  # fmt: skip
        name = name.replace(hf, short)
    return name
