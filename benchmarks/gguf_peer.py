"""llama.cpp's quantiser as a peer: a model's float32 weights as GGUF, quantised by llama.cpp, read back as float32.

Knows nothing about texts or evaluation. A name such as ``Q4_K_M`` is a file type; ``Q4_0 embeddings Q4_0`` also forces
the token embedding (which a tied model uses as its head too), by default left at Q6_K or more; ``+imatrix`` weighs each
input channel's error by its mean squared activation. K-quants have blocks of 256 weights: rows that are no multiple of
256 fall back to blocks of 32, so the types that the file really holds are reported.
"""

import ctypes
import importlib.util
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lowvram_lab.peers.gguf_file import quantise_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module of a Llama in transformers → tensor of llama.cpp, inside a layer where it is in one."""


def absent() -> str | None:
    """Why this peer cannot be had, or ``None``."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


@dataclass(frozen=True)
class Quantised:
    """What llama.cpp made of a model.

    Attributes:
        weights: Module name → float32 weight, norms included.
        tensor_bytes: Of all tensors in the file.
        types: GGML type → number of tensors.
        embedding: Type of the token embedding.
    """

    weights: dict[str, torch.Tensor]
    tensor_bytes: int
    types: dict[str, int]
    embedding: str


def tensor_name(module: str) -> str:
    """llama.cpp's name of a module's weight."""
    if module.startswith("model.layers."):
        _, _, index, rest = module.split(".", 3)
        return f"blk.{index}.{NAMES[rest]}.weight"
    return f"{NAMES[module]}.weight"


def write_float_gguf(path: Path, config, weights: dict[str, torch.Tensor]) -> None:
    """Writes a Llama's float32 weights as GGUF, whole or not at all.

    No tokenizer: the quantiser does not look for one. Rows of q and k stay in transformers' order, though llama.cpp
    would run them in another: every row is quantised by itself, so the order changes nothing.

    Args:
        path: The file.
        config: The ``LlamaConfig``.
        weights: Module name → weight; a tied head left out.
    """
    from gguf import GGUFWriter

    temporary = path.with_suffix(".partial")
    writer = GGUFWriter(temporary, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    for module, weight in weights.items():
        writer.add_tensor(tensor_name(module), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def quantise(source: Path, name: str, modules: list[str], importance: dict[str, torch.Tensor] | None) -> Quantised:
    """Has llama.cpp quantise a GGUF file, and reads the result.

    Args:
        source: From ``write_float_gguf``.
        name: File type, with options; see the module.
        modules: Names of the modules with a weight.
        importance: Module name → mean squared input by channel, for ``+imatrix``.
    """
    import gguf
    import llama_cpp

    kind, _, options = name.removesuffix("+imatrix").strip().partition(" embeddings ")
    target, params = source.with_name(f"{name.replace(' ', '_')}.gguf"), {}
    if options:  # of a tied model's embedding llama.cpp asks the output's type
        params = dict.fromkeys(("token_embedding_type", "output_tensor_type"), gguf.GGMLQuantizationType[options].value)
    keep = _imatrix(importance) if name.endswith("+imatrix") else None
    if keep:
        fields = dict(llama_cpp.llama_model_quantize_params._fields_)
        params["imatrix"] = ctypes.cast(keep[0], fields["imatrix"])
    quantise_file(source, target, kind, **params)
    try:
        return _read(target, modules)
    finally:
        target.unlink()


def _read(path: Path, modules: list[str]) -> Quantised:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    weights = {}
    for module in modules:
        tensor = tensors[tensor_name(module)]
        shape = tuple(reversed(tensor.shape.tolist()))
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        weights[module] = torch.from_numpy(values.reshape(shape))
    return Quantised(
        weights=weights,
        tensor_bytes=sum(int(tensor.n_bytes) for tensor in tensors.values()),
        types=dict(Counter(tensor.tensor_type.name for tensor in tensors.values())),
        embedding=tensors["token_embd.weight"].tensor_type.name,
    )


def _imatrix(importance: dict[str, torch.Tensor]):
    """An array of llama.cpp's importance entries, ended by an empty one, and the memory it points into."""
    import llama_cpp

    entry = llama_cpp.llama_cpp.llama_model_imatrix_data
    array, memory = (entry * (len(importance) + 1))(), []
    for place, (module, values) in zip(array, importance.items(), strict=False):
        numbers, name = values.float().contiguous().numpy(), tensor_name(module).encode()
        memory += [numbers, name]
        place.name, place.size = name, numbers.size
        place.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return array, memory
