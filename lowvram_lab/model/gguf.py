"""Open a ``.gguf`` file: check its header, read its config in milliseconds, convert it once to a safetensors directory.

The header is parsed here rather than with ``gguf.GGUFReader``, which takes seconds over a vocabulary and meets tensor
data that runs past the end of the file only when it is used. De-quantising is transformers' and gguf's.

Source: the GGUF specification, ggml-org/ggml ``docs/gguf.md``.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowvram_lab.errors import CheckpointError, LowvramError, first_line
from lowvram_lab.files import build_directory, cache_dir, is_finished, known_sha256, recorded_sha256, writable
from lowvram_lab.model.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

CONVERSION = 1  # raise it when the same GGUF would give other files: older cached directories are then built again
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_CONTROL_TOKEN = 3
_CONFIG_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_TOKEN_KEYS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
# architectures whose config is built here from the metadata; others go through transformers' slower reader
_FAST_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_STOP_WORDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, and the shape (outermost dimension first) of each tensor."""

    metadata: dict
    tensors: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """Such as ``"llama"`` or ``"qwen2"``."""
        return self.metadata["general.architecture"]


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads metadata and the tensor table, and checks that every tensor lies within the file.

    Raises:
        CheckpointError: Not a GGUF file, an unknown version, truncated, or damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data)
    except (OSError, ValueError, KeyError, struct.error, OverflowError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated GGUF ({error or 'unreadable'}); download the file again"
        ) from error


def gguf_config(path: Path):
    """The transformers config a ``.gguf`` file describes, from its metadata alone.

    Returns:
        A ``PretrainedConfig`` with ``dtype`` bfloat16, which is what the conversion stores.

    Raises:
        CheckpointError: Damaged file, or an architecture that transformers cannot read from GGUF.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    header = read_gguf_header(path)
    if header.architecture in _FAST_ARCHITECTURES:
        config_class, facts = CONFIG_MAPPING[header.architecture], _config_facts(path, header)
        with _one_line_errors(path, "build a config from its metadata"), quiet_transformers():
            return config_class.from_dict(facts)
    with _one_line_errors(path, f"read a config for architecture {header.architecture!r}"), quiet_transformers():
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=str(path.absolute()), local_files_only=True)
        config.dtype = "bfloat16"
        return config


def fetch_gguf(path: Path, progress: bool = True) -> Path:
    """The finished bfloat16 directory for a ``.gguf`` file: converted once, then found by the file's SHA-256.

    Raises:
        CheckpointError: Damaged file, or one that does not hold the whole model.
        LowvramError: The cache folder cannot be written to.
    """
    read_gguf_header(path)  # a damaged file is refused before it is hashed
    if recorded_sha256(path) is None:
        writable(cache_dir())  # so is a folder that could not keep the conversion
    digest = known_sha256(path, progress)
    return build_directory(
        converted_path(path.stem, digest),
        converted_identity(digest),
        lambda directory: convert_gguf(path, directory, progress),
        source=str(path.absolute()),
    )


def is_converted(path: Path) -> bool:
    """Whether :func:`fetch_gguf` would return at once."""
    digest = recorded_sha256(path)
    return bool(digest) and is_finished(converted_path(path.stem, digest), converted_identity(digest))


def converted_path(stem: str, sha256: str) -> Path:
    """Where the conversion of a GGUF file with this hash is cached."""
    return cache_dir() / "gguf" / f"{stem[:60]}-{sha256[:16]}"


def converted_identity(sha256: str) -> dict:
    """What the marker of a finished conversion says."""
    return {"sha256": sha256, "conversion": CONVERSION}


def convert_gguf(path: Path, directory: Path, progress: bool = True) -> None:
    """De-quantises a ``.gguf`` file to bfloat16 and saves config, weights, tokenizer and generation config.

    Takes about 16 s for 135M parameters on two cores, and RAM for twice the bfloat16 weights.

    Raises:
        CheckpointError: The file is damaged, lacks tensors, or holds some that the model has no place for.
    """
    from tqdm.auto import tqdm
    from transformers import AutoTokenizer

    header, config = read_gguf_header(path), gguf_config(path)
    empty = directory / "_empty"  # transformers also looks beside the file, for adapters and tokenizer settings
    empty.mkdir()
    location = {"gguf_file": str(path.absolute()), "trust_remote_code": False}
    with (
        tqdm(total=3, desc="converting GGUF", disable=not progress, leave=False) as steps,
        _one_line_errors(path, "convert it"),
        quiet_transformers(),
    ):
        steps.set_postfix_str("de-quantising tensors")
        loaded, report = _dequantised(empty, config, location)
        _check_complete(path, header, loaded, report)
        steps.update()

        steps.set_postfix_str("saving safetensors")
        _save(loaded, config, header, directory)
        steps.update()

        steps.set_postfix_str("converting the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(str(empty), **location)
        tokenizer.model_max_length = config.max_position_embeddings  # GGUF has no such field, and 1e30 helps nobody
        tokenizer.save_pretrained(directory)
        steps.update()
    empty.rmdir()


def _dequantised(empty: Path, config: PretrainedConfig, location: dict) -> tuple:
    """The model in bfloat16, and transformers' report of what it loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        str(empty),
        config=config,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        **location,
    )


def _save(loaded: PreTrainedModel, config: PretrainedConfig, header: GgufHeader, directory: Path) -> None:
    """Config, weights and generation config.

    The loaded model calls itself quantised and refuses ``save_pretrained``: its tensors go to one that is not.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    token_ids = {name: getattr(config, name, None) for name in ("bos_token_id", "pad_token_id")}
    fresh.generation_config = GenerationConfig(eos_token_id=_stop_ids(header), **token_ids)
    fresh.save_pretrained(directory, max_shard_size="2GB")


def _config_facts(path: Path, header: GgufHeader) -> dict:
    metadata, prefix = header.metadata, header.architecture

    def needed(key: str):
        value = metadata.get(f"{prefix}.{key}")
        if not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{path}: its metadata has {value!r} for {prefix}.{key}; download the file again")
        return value

    facts = {name: needed(key) for name, key in _CONFIG_KEYS.items()}
    heads = facts["num_attention_heads"]
    head_dim = metadata.get(f"{prefix}.attention.key_length", metadata.get(f"{prefix}.rope.dimension_count"))
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{path}: lacks token_embd.weight; expected a whole language model")
    facts |= {
        "model_type": prefix,
        "num_key_value_heads": metadata.get(f"{prefix}.attention.head_count_kv", heads),
        "vocab_size": header.tensors["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": {"rope_type": "default", "rope_theta": metadata.get(f"{prefix}.rope.freq_base", 10000.0)},
        "dtype": "bfloat16",
    }
    if prefix != "qwen2":
        facts["head_dim"] = head_dim or facts["hidden_size"] // heads
    for name, key in _TOKEN_KEYS.items():
        facts[name] = metadata.get(f"tokenizer.ggml.{key}")
    scaling = metadata.get(f"{prefix}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in header.tensors:
        logger.warning("%s: its RoPE scaling (%s) is not converted; long contexts will suffer", path.name, scaling)
    return facts


def _check_complete(path: Path, header: GgufHeader, model: PreTrainedModel, report: dict) -> None:
    """The loader fills a missing tensor with random numbers and drops one it cannot name; neither may pass here."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{path}: lacks {len(missing)} tensors, first {missing[0]}; download the file again")
    if header.architecture not in _FAST_ARCHITECTURES:
        return
    placed = sum(1 for _ in model.parameters())  # tied parameters count once
    held = len(header.tensors.keys() - {"rope_freqs.weight"})
    if held > placed:
        raise CheckpointError(
            f"{path}: holds {held} tensors where a {header.architecture} model has {placed}; "
            "pick a plain conversion of the model"
        )


def _stop_ids(header: GgufHeader) -> int | list[int] | None:
    """The stop tokens: the metadata's, then well-known ones among the control tokens (chat checkpoints disagree)."""
    ids = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    types = header.metadata.get("tokenizer.ggml.token_type", [])
    known = {token: index for index, token in enumerate(tokens) if token in _STOP_WORDS}
    ids += [known[w] for w in _STOP_WORDS if w in known and types[known[w] : known[w] + 1] == [_CONTROL_TOKEN]]
    unique = [index for index in dict.fromkeys(ids) if index is not None]
    return unique[0] if len(unique) == 1 else unique or None


@contextlib.contextmanager
def _one_line_errors(path: Path, action: str):
    try:
        yield
    except (LowvramError, MemoryError):
        raise
    except Exception as error:  # the readers raise anything from KeyError to StopIteration on damaged metadata
        raise CheckpointError(f"{path}: cannot {action}: {first_line(error)}; try another GGUF of the model") from error


def _parse(data: mmap.mmap) -> GgufHeader:
    magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", data, 0)
    if magic != b"GGUF":
        raise ValueError(f"expected the letters GGUF at its start, found {magic!r}")
    if version not in (2, 3):
        raise ValueError(f"expected GGUF version 2 or 3, little-endian, found {version}")
    metadata, tensors = {}, {}
    position = 24
    for _ in range(key_count):
        key, position = _string(data, position)
        (kind,) = struct.unpack_from("<I", data, position)
        metadata[key], position = _value(data, position + 4, kind)
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError("no general.architecture in its metadata")
    for _ in range(tensor_count):
        name, position = _string(data, position)
        (rank,) = struct.unpack_from("<I", data, position)
        *shape, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, position + 4)
        position += 4 + 8 * rank + 12
        if name in tensors:
            raise ValueError(f"tensor {name} appears twice")
        tensors[name] = (tuple(reversed(shape)), kind, offset)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-position // alignment) * alignment
    for name, (shape, kind, offset) in tensors.items():
        if (end := start + offset + _tensor_bytes(name, shape, kind)) > len(data):
            raise ValueError(f"tensor {name} ends at byte {end:,}, the file at {len(data):,}")
    return GgufHeader(metadata, {name: shape for name, (shape, _, _) in tensors.items()})


def _tensor_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in GGMLQuantizationType.__members__.values():
        raise ValueError(f"tensor {name} has the unknown type {kind}")
    block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return math.prod(shape) // block_elements * block_bytes


def _string(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = position + 8 + length
    if end > len(data):
        raise ValueError(f"a string of {length:,} bytes runs past its end")
    return data[position + 8 : end].decode("utf-8", errors="replace"), end


def _value(data: mmap.mmap, position: int, kind: int):
    if kind == _STRING:
        return _string(data, position)
    if kind == _ARRAY:
        element, count = struct.unpack_from("<IQ", data, position)
        position += 12
        if element == _STRING:
            values = []
            for _ in range(count):
                text, position = _string(data, position)
                values.append(text)
            return values, position
        code = f"<{count}{_scalar(element)}"
        if position + struct.calcsize(code) > len(data):
            raise ValueError(f"an array of {count:,} values runs past its end")
        return list(struct.unpack_from(code, data, position)), position + struct.calcsize(code)
    code = "<" + _scalar(kind)
    (value,) = struct.unpack_from(code, data, position)
    # a float32 such as 1e-5 is stored as 9.999999747e-06: its shortest decimal is what the model's author wrote
    value = float(str(np.float32(value))) if kind == _FLOAT32 else value
    return value, position + struct.calcsize(code)


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SCALARS[kind]
