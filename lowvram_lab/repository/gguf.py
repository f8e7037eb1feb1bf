"""Open a ``.gguf`` file: check its header, read its config in milliseconds, convert it once to a safetensors directory.

De-quantising is transformers' and gguf's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowvram_lab.errors import CheckpointError, LowvramError, first_line
from lowvram_lab.files import build_directory, cache_dir, is_finished, known_sha256, recorded_sha256, writable
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.repository.gguf_config import ROPE_FACTORS, check_keys, complete, config_values, is_read_here
from lowvram_lab.repository.gguf_header import GgufHeader, read_gguf_header, read_gguf_tensor
from lowvram_lab.repository.gguf_tokenizer import check_reopens, read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONVERSION = 2  # raise it when the same GGUF would give other files: older cached directories are then built again
_CONTROL_TOKEN = 3
_STOP_WORDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def gguf_config(path: Path):
    """The transformers config a ``.gguf`` file describes, from its metadata alone.

    Returns:
        A ``PretrainedConfig`` whose ``dtype`` is what the conversion stores: bfloat16 for a quantised file.

    Raises:
        CheckpointError: Damaged file, an architecture that transformers cannot read from GGUF, or metadata that changes
            what the model computes and is not read.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    header = read_gguf_header(path)
    with _one_line_errors(path, f"read a config for architecture {header.architecture!r}"), quiet_transformers():
        if is_read_here(header):
            factors = read_gguf_tensor(path, header, ROPE_FACTORS) if ROPE_FACTORS in header.tensors else None
            config = CONFIG_MAPPING[header.architecture].from_dict(config_values(path, header, factors))
        else:
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=str(path.absolute()), local_files_only=True)
            config.dtype = header.dtype
            complete(config, header)
        check_keys(path, header, config)
        return config


def fetch_gguf(path: Path, progress: bool = True) -> Path:
    """The finished directory for a ``.gguf`` file: converted once, then found by the file's SHA-256.

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
    """De-quantises a ``.gguf`` file and saves config, weights, tokenizer and generation config.

    Matrices of floats stay what they are, to the bit; quantised ones become bfloat16. Takes about 10 s for 135M
    parameters on one core, and RAM for twice the weights that are written.

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
        tokenizer = read_tokenizer(header, path) or AutoTokenizer.from_pretrained(str(empty), **location)
        tokenizer.model_max_length = config.max_position_embeddings  # GGUF has no such field, and 1e30 helps nobody
        tokenizer.save_pretrained(directory)
        check_reopens(tokenizer, directory, header, path)
        steps.update()
    empty.rmdir()


def _dequantised(empty: Path, config: PretrainedConfig, location: dict) -> tuple:
    """The model in its config's dtype, and transformers' report of what it loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        str(empty),
        config=config,
        dtype=config.dtype,
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
        fresh = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    token_ids = {name: getattr(config, name, None) for name in ("bos_token_id", "pad_token_id")}
    fresh.generation_config = GenerationConfig(eos_token_id=_stop_ids(header), **token_ids)
    fresh.save_pretrained(directory, max_shard_size="2GB")


def _check_complete(path: Path, header: GgufHeader, model: PreTrainedModel, report: dict) -> None:
    """The loader fills a missing tensor with random numbers and drops one it cannot name; neither may pass here."""
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{path}: lacks {len(missing)} tensors, first {missing[0]}; download the file again")
    read = {ROPE_FACTORS} if is_read_here(header) else set()  # which are in the config
    if dropped := sorted(header.tensors.keys() - _tensor_names(header, model) - read):
        raise CheckpointError(
            f"{path}: holds {len(dropped)} tensors that a {header.architecture} model has no place for, first "
            f"{dropped[0]}; pick a plain conversion of the model"
        )


def _tensor_names(header: GgufHeader, model: PreTrainedModel) -> set[str]:
    """What GGUF calls the model's parameters."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    found = set()
    for name in model.state_dict():
        module, _, key = name.rpartition(".")
        for path in (module, module.partition(".")[2]):  # some were converted from the model without its head
            found.add(f"{names.get_name(path)}.{key}")
    return found


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
