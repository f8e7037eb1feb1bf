"""Open a ``.gguf`` file: check its header, read its config in milliseconds, write its tokenizer once.

Where a directory is wanted that stock transformers opens, or of an architecture whose tensors are not read here, it is
converted to one, once. De-quantising is transformers' and gguf's.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowvram_lab.errors import CheckpointError, LowvramError, first_line
from lowvram_lab.files import build_directory, cache_dir, is_finished, known_sha256, recorded_sha256, writable
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.repository.gguf_config import ROPE_FACTORS, check_keys, complete, config_values, is_read_here
from lowvram_lab.repository.gguf_header import GgufHeader, read_gguf_header, read_gguf_tensor, whole_stem
from lowvram_lab.repository.gguf_tokenizer import check_reopens, read_tokenizer
from lowvram_lab.repository.gguf_weights import GgufWeights, refuse_incomplete, tensor_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CONVERSION = 3  # raise it when the same GGUF would give other files: older cached directories are then built again
_CONTROL_TOKEN = 3
_STOP_WORDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def gguf_config(path: Path, header: GgufHeader | None = None):
    """The transformers config a ``.gguf`` file describes, from its metadata alone.

    Args:
        path: The file; it need not be on this machine where its architecture is one that is read here.
        header: Of the file, where that was read already.

    Returns:
        A ``PretrainedConfig`` whose ``dtype`` is what the conversion stores: bfloat16 for a quantised file.

    Raises:
        CheckpointError: Damaged file, an architecture that transformers cannot read from GGUF, or metadata that changes
            what the model computes and is not read.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    header = header or read_gguf_header(path)
    with _one_line_errors(path, f"read a config for architecture {header.architecture!r}"), quiet_transformers():
        if is_read_here(header):
            factors = read_gguf_tensor(header, ROPE_FACTORS) if ROPE_FACTORS in header.tensors else None
            config = CONFIG_MAPPING[header.architecture].from_dict(config_values(path, header, factors))
        else:
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=str(path.absolute()), local_files_only=True)
            config.dtype = header.dtype
            complete(config, header)
        check_keys(path, header, config)
        return config


def fetch_gguf(path: Path, progress: bool = True) -> Path:
    """The finished directory for a ``.gguf`` file: converted once, then found by its SHA-256.

    Raises:
        CheckpointError: Damaged file, or one that does not hold the whole model.
        LowvramError: The cache folder cannot be written to.
    """
    digest = _digest(path, progress)
    return build_directory(
        converted_path(whole_stem(path.name), digest),
        converted_identity(digest),
        lambda directory: convert_gguf(path, directory, progress),
        source=str(path.absolute()),
    )


def small_files(path: Path, progress: bool = True) -> Path:
    """A directory with a ``.gguf`` file's config, tokenizer and generation config: made once, without its weights.

    Raises:
        CheckpointError: Damaged file.
        LowvramError: The cache folder cannot be written to.
    """
    digest = _digest(path, progress)
    if is_finished(converted_path(whole_stem(path.name), digest), converted_identity(digest)):
        return converted_path(whole_stem(path.name), digest)  # they are beside the converted weights
    return build_directory(
        _small_path(whole_stem(path.name), digest),
        converted_identity(digest),
        lambda directory: _write_small_files(path, directory),
        source=str(path.absolute()),
    )


def has_small_files(path: Path) -> bool:
    """Whether they are there: by themselves, or beside converted weights."""
    digest = _recorded_digest(path)
    if not digest:
        return False
    folders = converted_path(whole_stem(path.name), digest), _small_path(whole_stem(path.name), digest)
    return any(is_finished(folder, converted_identity(digest)) for folder in folders)


def _digest(path: Path, progress: bool) -> str:
    """The SHA-256 of a file; of several parts, that of theirs in a row.

    Raises:
        CheckpointError: Damaged file.
        LowvramError: The cache folder cannot be written to.
    """
    files = read_gguf_header(path).files  # a damaged file is refused before it is hashed
    if _recorded_digest(path) is None:
        writable(cache_dir())  # so is a folder that could not keep what is made of it
    return _of_all([known_sha256(file, progress) for file in files])


def _recorded_digest(path: Path) -> str | None:
    """``_digest``, where it is known already."""
    digests = [recorded_sha256(file) for file in read_gguf_header(path).files]
    return _of_all(digests) if all(digests) else None


def _of_all(digests: list[str]) -> str:
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def converted_path(stem: str, sha256: str) -> Path:
    """Where the conversion of a GGUF file with this hash is cached."""
    return cache_dir() / "gguf" / f"{stem[:60]}-{sha256[:16]}"


def _small_path(stem: str, sha256: str) -> Path:
    return converted_path(stem, sha256).with_name(f"{stem[:60]}-{sha256[:16]}-files")


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

    header, config = read_gguf_header(path), gguf_config(path)
    empty = _empty(directory)
    with (
        tqdm(total=3, desc="converting GGUF", disable=not progress, leave=False) as steps,
        _one_line_errors(path, "convert it"),
        quiet_transformers(),
    ):
        steps.set_postfix_str("de-quantising tensors")
        loaded = _dequantised(path, header, config, empty)
        steps.update()

        steps.set_postfix_str("saving safetensors")
        _save(loaded, config, header, directory)
        steps.update()

        steps.set_postfix_str("converting the tokenizer")
        _save_tokenizer(path, header, config, directory, empty)
        steps.update()
    empty.rmdir()


def dequantised(path: Path) -> PreTrainedModel:
    """A ``.gguf`` file as stock transformers opens it: in RAM, in floats.

    Transformers reads no parts: of those each tensor is read here, to the bit what transformers makes of it, and put
    into its model.

    Raises:
        CheckpointError: The file is damaged, lacks tensors, or holds some that the model has no place for.
    """
    header, config = read_gguf_header(path), gguf_config(path)
    with tempfile.TemporaryDirectory() as empty, _one_line_errors(path, "read it"), quiet_transformers():
        return _dequantised(path, header, config, Path(empty))


def _write_small_files(path: Path, directory: Path) -> None:
    header, config, empty = read_gguf_header(path), gguf_config(path), _empty(directory)
    with _one_line_errors(path, "read its tokenizer"), quiet_transformers():
        fresh = _fresh(config, header)
        config.architectures = [type(fresh).__name__]
        config.save_pretrained(directory)
        fresh.generation_config.save_pretrained(directory)
        _save_tokenizer(path, header, config, directory, empty)
    empty.rmdir()


def _empty(directory: Path) -> Path:
    """A folder to read from: transformers also looks beside a file, for adapters and tokenizer settings."""
    empty = directory / "_empty"
    empty.mkdir()
    return empty


def _location(path: Path) -> dict:
    return {"gguf_file": str(path.absolute()), "trust_remote_code": False}


def _save_tokenizer(path: Path, header: GgufHeader, config: PretrainedConfig, directory: Path, empty: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = read_tokenizer(header, path) or AutoTokenizer.from_pretrained(str(empty), **_location(path))
    tokenizer.model_max_length = config.max_position_embeddings  # GGUF has no such field, and 1e30 helps nobody
    tokenizer.save_pretrained(directory)
    check_reopens(tokenizer, directory, header, path)


def _dequantised(path: Path, header: GgufHeader, config: PretrainedConfig, empty: Path) -> PreTrainedModel:
    """The model in its config's dtype."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    if len(header.files) > 1:
        return _from_parts(path, header, config, empty)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        str(empty),
        config=config,
        dtype=config.dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        **_location(path),
    )
    _check_complete(path, header, loaded, report)
    return loaded


def _from_parts(path: Path, header: GgufHeader, config: PretrainedConfig, empty: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if not is_read_here(header):
        raise CheckpointError(
            f"{path}: parts of a {header.architecture} model, which are not read here; join them first "
            "(llama-gguf-split --merge)"
        )
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = GgufWeights(path, header, shapes, config, empty)
    for name, parameter in model.named_parameters():
        parameter.data = weights.read(name)
    return model


def _save(loaded: PreTrainedModel, config: PretrainedConfig, header: GgufHeader, directory: Path) -> None:
    """Config, weights and generation config.

    The loaded model calls itself quantised and refuses ``save_pretrained``: its tensors go to one that is not.
    """
    fresh = _fresh(config, header)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(directory, max_shard_size="2GB")


def _fresh(config: PretrainedConfig, header: GgufHeader) -> PreTrainedModel:
    """The model on meta, with the file's generation config."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    token_ids = {name: getattr(config, name, None) for name in ("bos_token_id", "pad_token_id")}
    fresh.generation_config = GenerationConfig(eos_token_id=_stop_ids(header), **token_ids)
    return fresh


def _check_complete(path: Path, header: GgufHeader, model: PreTrainedModel, report: dict) -> None:
    """The loader fills a missing tensor with random numbers and drops one it cannot name; neither may pass here."""
    known = set(tensor_names(header, model.state_dict(), model.config.num_hidden_layers).values())
    refuse_incomplete(path, header, sorted(report["missing_keys"]), known)


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
