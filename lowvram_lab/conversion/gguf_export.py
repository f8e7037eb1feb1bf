"""Write a model as a ``.gguf`` file, tensor by tensor: for llama.cpp and whatever is built on it.

The way back from ``repository/gguf.py``. Integer weights of a converted directory keep their codes in ``q8_0`` and
``q4_1``: these are blocks of 32 codes with a float16 scale each, and a scale of more weights is simply repeated.

Source: the GGUF specification, ggml-org/ggml ``docs/gguf.md``; blocks, ``ggml-common.h``.
"""

import contextlib
import logging
import math
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import torch
from gguf import GGMLQuantizationType as GgmlType

from lowvram_lab.conversion.gguf_vocab import vocabulary as vocabulary_of
from lowvram_lab.errors import CheckpointError, LowvramError
from lowvram_lab.files import expanded, locked, require_space
from lowvram_lab.memory.host import peak_rss_bytes
from lowvram_lab.model.checkpoint import Checkpoint, check_tensor
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec, ModuleSpec
from lowvram_lab.model.tensor_names import refuse_differing_ties
from lowvram_lab.repository.gguf_config import ARCHITECTURES, ROPE_FACTORS, config_metadata, rope_factors
from lowvram_lab.units import format_bytes
from lowvram_lab.weights.codes import IntegerWeight
from lowvram_lab.weights.solvers import is_finite
from lowvram_lab.weights.stored import check_stored, read_stored

TYPES = ("f16", "f32", "bf16", "q8_0", "q4_1")
"""What matrices can become; vectors are always f32, as llama.cpp wants them."""

_BIASED = {"llama": ("attn_", "ffn_"), "qwen2": ("attn_q", "attn_k", "attn_v"), "qwen3": ()}
_BLOCK = 32
_ELEMENTS_AT_ONCE = 1 << 22  # converted at a time: 16 MiB in float32


@dataclass(frozen=True, repr=False)
class ExportResult:
    """What was written.

    Attributes:
        output: The file.
        type: As asked for.
        architecture: Its name in llama.cpp.
        context: Most tokens it is for.
        pre_tokenizer: Its name in llama.cpp, ``""`` for a SentencePiece vocabulary.
        tensors: How many.
        types: GGML type → number of tensors.
        kept_codes: Tensors whose integers were carried over, code for code.
        tensor_bytes: Data of all tensors.
        file_bytes: The same with metadata and vocabulary.
        seconds: Of the export.
        peak_rss_bytes: Highest resident memory of this process so far, mapped pages of the source included.
    """

    output: str
    type: str
    architecture: str
    context: int
    pre_tokenizer: str
    tensors: int
    types: dict[str, int]
    kept_codes: int
    tensor_bytes: int
    file_bytes: int
    seconds: float
    peak_rss_bytes: int

    def __repr__(self) -> str:
        held = ", ".join(f"{count} in {name}" for name, count in self.types.items())
        return f"ExportResult({self.output}: {format_bytes(self.file_bytes)}, {self.tensors} tensors: {held})"

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)

    def table(self) -> pd.DataFrame:
        """Attribute by attribute."""
        return pd.DataFrame({"found": {key: str(value) for key, value in self.to_dict().items()}})

    def _repr_html_(self) -> str:
        return self.table().to_html()


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file to be: its name there, whose it is, what it becomes.

    ``heads`` are those of q and k in the llama architecture, whose rows change places; ``stored`` is the format of the
    codes it is read from.
    """

    name: str
    module: ModuleSpec
    key: str
    ggml_type: str
    heads: int = 0
    stored: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.module.parameters[self.key]

    @property
    def source(self) -> str:
        return f"{self.module.name}.{self.key}"

    @property
    def nbytes(self) -> int:
        elements, size = gguf.GGML_QUANT_SIZES[GgmlType[self.ggml_type.upper()]]
        return math.prod(self.shape) // elements * size

    @property
    def keeps_codes(self) -> bool:
        shared = self.stored and (get_format(self.stored).group_size or self.shape[-1])
        return bool(shared) and self.ggml_type in ("q8_0", "q4_1") and shared % _BLOCK == 0


def export_gguf(
    model: str | os.PathLike,
    output: str | Path,
    *,
    tensor_type: str = "f16",
    context: int | None = None,
    progress: bool = True,
) -> ExportResult:
    """Writes a model as GGUF: weights, config, vocabulary, chat template. Whole, or not at all.

    Takes the RAM of the largest tensor as it is in the file, beside the pages of the source that are being read.

    Args:
        model: Name, hub id, directory (a converted one too) or .gguf file of a Llama, Mistral, Qwen2 or Qwen3.
        output: A new file, ``.gguf``.
        tensor_type: What matrices become: one of ``TYPES``. In ``"q4_1"`` embedding and head become q8_0, and so does
            what a converted directory holds in more than 4 bits. Rows that are no multiple of 32 become f16 instead.
        context: Most tokens the file is for; by default all that the config states. A model whose attention
            slides over a window needs one within the window: llama.cpp slides none of these architectures.
        progress: Show a progress bar, on stderr.

    Raises:
        LowvramError: Unknown type; an output that exists, is no .gguf, has no folder or no room.
        SourceError: No such model, or a tokenizer that llama.cpp has no name for.
        CheckpointError: An architecture that is none of these, or something about it that GGUF cannot say; damaged
            weights, or such as do not fit the type.
    """
    from tqdm.auto import tqdm

    began = time.monotonic()
    output = expanded(output)
    if tensor_type not in TYPES:
        raise LowvramError(f"expected type {', '.join(TYPES)}, found {tensor_type!r}")
    _refuse_output(output)
    source = find_source(model)
    config = source.config()
    spec = source.spec(source.public_name)
    if spec != (high := spec.without_low_planes()):
        logger.warning("%s: a GGUF file has no low planes; it will hold the high ones, an int4 model", model)
        spec = high
    facts = _general(spec, tensor_type) | config_metadata(spec, config, context)
    architecture = ARCHITECTURES[config.model_type]
    tensors = _tensors(spec, architecture, tensor_type)
    checkpoint = source.checkpoint(progress)
    refuse_differing_ties(spec, checkpoint)
    for tensor in tensors:
        _check(tensor, checkpoint)
    vocabulary = vocabulary_of(source, spec, checkpoint.directory)
    factors = rope_factors(config, spec.head_dim)
    tensor_bytes = sum(tensor.nbytes for tensor in tensors) + (0 if factors is None else factors.nbytes)
    with _published(output) as temporary:
        require_space(output.parent, tensor_bytes + 128 * spec.vocab_size, "the export")
        with contextlib.closing(gguf.GGUFWriter(temporary, architecture)) as writer:
            _write_head(writer, facts | vocabulary, tensors, factors)
            for tensor in tqdm(tensors, desc="writing GGUF", disable=not progress):
                writer.write_tensor_data(_data(tensor, checkpoint))
    return ExportResult(
        output=str(output),
        type=tensor_type,
        architecture=architecture,
        context=facts[f"{architecture}.context_length"],
        pre_tokenizer=vocabulary.get("tokenizer.ggml.pre", ""),
        tensors=len(tensors) + (factors is not None),
        types=dict(Counter(["f32"] * (factors is not None) + [tensor.ggml_type for tensor in tensors])),
        kept_codes=sum(tensor.keeps_codes for tensor in tensors),
        tensor_bytes=tensor_bytes,
        file_bytes=output.stat().st_size,
        seconds=time.monotonic() - began,
        peak_rss_bytes=peak_rss_bytes(),
    )


@contextlib.contextmanager
def _published(output: Path):
    """A path to write to, which becomes the output when all is well; locked against a second process."""
    temporary = output.with_name(f".{output.name}.partial")  # one name: what a killed run left is written over
    with locked(output) as lock:
        try:
            _refuse_output(output)
            yield temporary
            os.replace(temporary, output)
        except OSError as error:
            raise LowvramError(f"cannot write {output}: {error.strerror or error}; choose another folder") from error
        finally:
            temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # Windows does not remove a file that is held
                lock.unlink()


def _write_head(writer: gguf.GGUFWriter, facts: dict, tensors: list, factors: np.ndarray | None) -> None:
    """Everything before the tensors' data; rotary factors, where there are any, are the first of that."""
    for key, value in facts.items():
        _add(writer, key, value)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for tensor in tensors:
        kind = GgmlType[tensor.ggml_type.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)


def _refuse_output(output: Path) -> None:
    if output.suffix.lower() != ".gguf":
        raise LowvramError(f"{output}: expected a file name that ends in .gguf")
    if output.exists():
        raise LowvramError(f"{output} exists already; name a new file, or remove it first")
    if not output.parent.is_dir():
        raise LowvramError(f"cannot write {output}: its folder does not exist")


def _tensors(spec: ModelSpec, architecture: str, tensor_type: str) -> list[_Tensor]:
    """Everything to be written, in forward order, from the config alone."""
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], spec.num_hidden_layers)
    heads = {"attn_q": spec.config["num_attention_heads"], "attn_k": spec.num_key_value_heads}
    found = []
    for module in spec.modules:
        base = names.get_name(module.name) or ""
        short = base.rpartition(".")[2]
        for key, shape in module.parameters.items():
            if key == "weight" and module.tied_to:
                continue
            if not base or (key != "weight" and not (key == "bias" and short.startswith(_BIASED[architecture]))):
                raise CheckpointError(
                    f"{spec.name}: {module.name}.{key} has no place in a GGUF of a {architecture} model; expected "
                    "biases where such models have them"
                )
            stored = spec.stored.get(module.name, "") if key == "weight" else ""
            kind = _type_of(tensor_type, shape, short in ("token_embd", "output"), stored)
            permuted = heads.get(short, 0) if architecture == "llama" else 0
            found.append(_Tensor(f"{base}.{key}", module, key, kind, permuted, stored))
    return found


def _type_of(wanted: str, shape: tuple[int, ...], is_table: bool, stored: str) -> str:
    if len(shape) == 1:
        return "f32"
    if wanted in ("q8_0", "q4_1") and shape[-1] % _BLOCK:
        return "f16"
    if wanted == "q4_1" and (get_format(stored).bits > 4 if stored else is_table):
        return "q8_0"
    return wanted


def _check(tensor: _Tensor, checkpoint: Checkpoint) -> None:
    if tensor.stored:
        return check_stored(tensor.module, get_format(tensor.stored), checkpoint)
    name = tensor.source
    check_tensor(name, tensor.shape, checkpoint)
    if not (dtype := checkpoint.dtype(name)).is_floating_point:
        raise CheckpointError(f"{name}: expected floats, found {dtype}")


def _data(tensor: _Tensor, checkpoint: Checkpoint) -> np.ndarray:
    """A tensor's bytes as they go into the file, ``(rows, bytes of a row)``; converted some rows at a time."""
    if tensor.stored:
        weight = read_stored(tensor.module.name, get_format(tensor.stored), checkpoint.read)
    else:
        weight = checkpoint.read(tensor.source)
    rows = tensor.shape[0]
    order = torch.arange(rows)
    if tensor.heads:  # llama.cpp turns neighbours in a head, transformers the two halves of it
        order = order.view(tensor.heads, 2, -1).transpose(1, 2).reshape(-1)
    data = np.empty((rows, tensor.nbytes // rows), np.uint8)
    start = 0
    for some in order.split(max(1, _ELEMENTS_AT_ONCE * rows // math.prod(tensor.shape))):
        piece = IntegerWeight(weight.codes[some], weight.scale[some]) if tensor.stored else weight[some]
        data[start : start + len(some)] = _encode(piece, tensor).reshape(len(some), -1).view(np.uint8)
        start += len(some)
    return data


def _encode(piece: torch.Tensor | IntegerWeight, tensor: _Tensor) -> np.ndarray:
    if tensor.keeps_codes:
        return _blocks(piece, tensor)
    values = piece.dequantize() if tensor.stored else piece.float()
    if not is_finite(values):
        raise CheckpointError(f"{tensor.source}: expected finite weights, found NaN or infinite values; fetch it anew")
    if tensor.ggml_type == "bf16":
        return values.to(torch.bfloat16).view(torch.int16).numpy()
    if tensor.ggml_type == "f16" and values.abs().max() > torch.finfo(torch.float16).max:
        raise CheckpointError(f"{tensor.source}: holds values beyond float16's 65504; choose bf16 or f32")
    return gguf.quants.quantize(values.numpy(), GgmlType[tensor.ggml_type.upper()])


def _blocks(weight: IntegerWeight, tensor: _Tensor) -> np.ndarray:
    """The very codes in GGML's blocks: q8_0 is ``d * code``, q4_1 ``d * code + m`` with codes from 0 to 15."""
    rows, blocks = weight.codes.shape[0], weight.codes.shape[1] // _BLOCK
    scale = weight.scale.repeat_interleave(blocks // weight.scale.shape[1], dim=1).half().unsqueeze(-1).numpy()
    codes = weight.codes.view(rows, blocks, _BLOCK).numpy()
    if not np.isfinite(8 * scale).all():
        raise CheckpointError(f"{tensor.source}: holds scales beyond float16's range; choose bf16 or f32")
    if tensor.ggml_type == "q8_0":
        return np.concatenate((scale.view(np.uint8), codes.view(np.uint8)), axis=-1)
    low, high = np.split((codes + 8).astype(np.uint8), 2, axis=-1)
    return np.concatenate((scale.view(np.uint8), (-8 * scale).view(np.uint8), low | high << 4), axis=-1)


def _general(spec: ModelSpec, tensor_type: str) -> dict:
    file_type = "ALL_F32" if tensor_type == "f32" else f"MOSTLY_{tensor_type.upper()}"
    return {
        "general.name": spec.name,
        "general.file_type": int(gguf.LlamaFileType[file_type]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Counts and token ids are unsigned 32-bit integers in GGUF, other numbers float32."""
    for kind, method in ((bool, "bool"), (int, "uint32"), (float, "float32"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return getattr(writer, f"add_{method}")(key, value)
