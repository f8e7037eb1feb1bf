"""What remembered keys and values depend on: the tokens up to them, and a root of all else that decides their bits.

A block of a prompt has a key of its own: a chain of hashes over the blocks before it and its ids. Two prompts share
keys as far as they share whole blocks. The root is a list of named fields, so that of two keys that differ can be said
in what. A salt goes into both: whoever does not know it can neither find nor recognise a block.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import lowvram_lab
from lowvram_lab.engine.loaded import Loaded, loaded
from lowvram_lab.files import known_sha256
from lowvram_lab.kernels import library
from lowvram_lab.kernels.compiler import compiler
from lowvram_lab.machine import instruction_set, version
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.low_plane import FILE as LOW_PLANE
from lowvram_lab.model.plan import Plan, compute_place
from lowvram_lab.model.rules import BLOCK_TOKENS

DIGITS = 32
"""Hexadecimal digits of a key: 128 bits."""

_DIGEST = "#"
"""What a digest in a field begins with."""

CODE = ("decoding", "engine", "kernels", "memory", "model", "prefixes", "weights")
"""Folders of this library whose code decides the bits of keys and values, or how they are kept."""

VERSION = "1"
"""Of how blocks are written."""


@dataclass(frozen=True)
class Root:
    """All that decides the bits of keys and values beside the tokens.

    Attributes:
        fields: Name → what it is, in words, or a digest behind ``#``, or both, in the order in which a difference is
            named.
        seed: What the chain of a text begins with: of the salt.
    """

    fields: dict[str, str]
    seed: bytes

    @functools.cached_property
    def digest(self) -> str:
        """Of all fields."""
        return _digest(json.dumps(self.fields, sort_keys=True))

    @functools.cached_property
    def of_answers(self) -> Root:
        """What an answer is found by. It is verified before it is said, so other weights may have given it."""
        return Root({name: self.fields[name] for name in ("config", "salt")}, self.seed)

    def difference(self, fields: dict[str, str]) -> str | None:
        """The first field that is another there, in words; ``None`` where none is."""
        return difference(self.fields, fields)

    def differences(self, fields: dict[str, str]) -> int:
        """How many fields are others there."""
        return sum(fields.get(name) != value for name, value in self.fields.items())


@dataclass(frozen=True)
class Key:
    """Of one block.

    Attributes:
        text: Of all tokens up to its end, and of the salt.
        parent: The same of the block before; empty for the first.
        root: Digest of the root.
        start: Its first token's place.
        ids: Its tokens.
    """

    text: str
    parent: str
    root: str
    start: int
    ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """What its file is called, without a suffix."""
        return name_of(self.text, self.root)


def difference(now: Mapping[str, str], then: Mapping[str, str]) -> str | None:
    """The first of the fields that there are now that was another then, in words; ``None`` where none was."""
    for name, value in now.items():
        if (found := then.get(name)) != value:
            before, after = in_words(found or "nothing"), in_words(value)
            return f"{name}: {'others then than now' if before == after else f'{before} then, {after} now'}"
    return None


def in_words(field: str) -> str:
    """A root's field without its digest; empty where it is a digest alone."""
    return field.partition(_DIGEST)[0].rstrip()


def name_of(text: str, root: str) -> str:
    """What the file of a block is called that has this text and this root."""
    return f"{text}-{root[: DIGITS // 2]}"


def chain(root: Root, ids: Sequence[int]) -> list[Key]:
    """The keys of a prompt's whole blocks, in order."""
    keys, parent, text = [], "", root.seed.hex()
    for start in range(0, len(ids) // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
        block = tuple(ids[start : start + BLOCK_TOKENS])
        text = _digest(text.encode() + struct.pack(f"<{BLOCK_TOKENS}q", *block))
        keys.append(Key(text, parent, root.digest, start, block))
        parent = text
    return keys


def answer_key(root: Root, ids: Sequence[int]) -> Key:
    """The key of what was answered to a prompt, to all of it; of the model's root only ``of_answers`` counts."""
    root = root.of_answers
    blocks = chain(root, ids)
    rest = ids[len(blocks) * BLOCK_TOKENS :]
    before = blocks[-1].text if blocks else root.seed.hex()
    text = _digest(before, struct.pack(f"<{len(rest)}q", *rest), "answer")
    return Key(text, "", root.digest, len(ids), ())


def root_of(model: torch.nn.Module, salt: str = "", progress: bool = False, plan: Plan | None = None) -> Root:
    """The root of a loaded model.

    Args:
        model: From ``load``, not a dry run.
        salt: A secret; what one salt wrote, another neither finds nor recognises.
        progress: Show that files of weights are hashed, which is done once for as long as they stay as they are.
        plan: By default the model's.
    """
    state = loaded(model)
    plan, config = plan or state.plan, model.config.to_dict()
    rope = {name: value for name, value in config.items() if "rope" in name or name == "max_position_embeddings"}
    config = {name: value for name, value in config.items() if name not in rope}
    told, seed = _salted(salt)
    formats = [(name, each.format) for name, each in plan.modules.items()]
    quantised_by = version("bitsandbytes") if any(get_format(name).kind == "nf4" for _, name in formats) else None
    fields = {  # what decides others before them: with the formats, other tensors are weights too
        "formats": _field(plan.weight_formats, repr(formats), plan.dtype, plan.solver, str(quantised_by)),
        "rope": _field("", json.dumps(rope, sort_keys=True, default=str)),
        "config": _field("", json.dumps(config, sort_keys=True, default=str)),
        "weights": _weights(model, progress),
        "kv_format": plan.kv_format,
        "places": _field(_split(plan), repr(_kernels(state)), str(plan.stream_from)),
        "pieces": f"{BLOCK_TOKENS} tokens, {plan.piece_tokens} at once",
        **machine_fields(),
        "card": _card(plan, state),
        **settings(model, plan),
        "salt": told,
    }
    return Root(fields, seed)


def settings(model: torch.nn.Module, plan: Plan) -> dict[str, str]:
    """The fields of a root that may be others at any time, by what a user sets."""
    matmul, attention, onednn = torch.backends.cuda.matmul, torch.backends.cuda, torch.backends.mkldnn
    by_precision = torch.backends, matmul, onednn, getattr(onednn, "matmul", None)
    switches = (
        onednn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        [getattr(each, "fp32_precision", None) for each in by_precision],
        (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
        (attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled(), attention.math_sdp_enabled()),
        [os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")],
    )
    return {
        "attention": str(model.config._attn_implementation),
        "threads": str(plan.threads or torch.get_num_threads()),
        "switches": _field("", repr(switches)),
    }


def machine_fields() -> dict[str, str]:
    """The fields of a root that this machine decides, and what is installed on it: they are the same for all models."""
    return {
        "engine": _engine(),
        "torch": torch.__version__,
        "transformers": version("transformers") or "?",
        "processor": _field("", torch.backends.cpu.get_cpu_capability(), instruction_set()),
    }


def _field(words: str, *parts: str | bytes) -> str:
    """A root's field: what can be said of it, and a digest of what it is."""
    return f"{words} {_DIGEST}{_digest(*parts)}".lstrip()


def _digest(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(struct.pack("<q", len(data)) + data)
    return found.hexdigest()[:DIGITS]


@functools.lru_cache(maxsize=16)
def _salted(salt: str) -> tuple[str, bytes]:
    """What is told of a salt, and what a chain begins with; neither gives it away, and trying many takes long."""
    if not salt:
        return "none", bytes(16)
    made = hashlib.scrypt(
        salt.encode(errors="surrogatepass"), salt=b"lowvram_lab prefixes", n=2**13, r=8, p=1, dklen=32
    )
    return f"a secret {_DIGEST}{made[:16].hex()}", made[16:]


def _weights(model: torch.nn.Module, progress: bool) -> str:
    """Of the files of the weights, by what is in them; where there are none, of the tensors."""
    state = loaded(model)
    files = list(getattr(state.weights, "files", ()))
    if files:
        low = Path(state.weights.directory) / LOW_PLANE
        files += [low] if state.plan.low_planes() and low not in files else []
        return _field("", *(known_sha256(file, progress) for file in sorted(files)))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return _field("", *(part for name, tensor in tensors for part in (name, _bytes(tensor))))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _split(plan: Plan) -> str:
    layers = plan.layer_devices()
    return ", ".join(f"{layers.count(place)} layers on {place}" for place in dict.fromkeys(layers))


def _kernels(state: Loaded) -> list[tuple[str, ...]]:
    """Whose kernels compute each module, of two planes of each: mapped weights or not is the same to them."""
    plan, gpu = state.plan, state.gpu
    modules = [tuple(gpu.kernels_of(compute_place(p)) for p in each.places) for each in plan.modules.values()]
    return [*modules, tuple(gpu.kernels_of(place) for place in plan.layer_places())]


def _card(plan: Plan, state: Loaded) -> str:
    if state.gpu.kernels != "cuda" or "gpu" not in plan.layer_places():
        return "none"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {_field('', repr(state.gpu.card))}"


def _engine() -> str:
    """This library's own code that quantises, reads and keeps, and what it is compiled by."""
    compiled = compiler() if library.there() else "no compiler"
    return _field("", _sources(), str(compiled), VERSION)


@functools.cache
def _sources() -> str:
    package = Path(lowvram_lab.__file__).parent
    files = [file for folder in CODE for file in (package / folder).iterdir() if file.suffix in (".py", ".cpp", ".h")]
    return _digest(*(file.read_bytes() for file in sorted(files)))
