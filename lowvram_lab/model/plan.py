"""Plan: a format and a device for every module of a model, plus KV format, context and threads. The library's one noun.

A plan can be written by hand, by a widget, by a solver or read from JSON; nothing downstream knows the difference. Its
JSON is read with care: whatever is odd is named before a plan is made of it. It knows nothing about budgets: whether it
fits one is what the forecast says.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from lowvram_lab.errors import PlanError
from lowvram_lab.files import write_atomically
from lowvram_lab.model.formats import DTYPES, canonical_name, check_solver, get_format
from lowvram_lab.model.geometry import KVLayer
from lowvram_lab.model.rules import (
    BLOCK_TOKENS,
    Assignment,
    check_modules,
    check_precision,
    check_settings,
    is_whole_number,
    whole_number,
)
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec, ModuleSpec
from lowvram_lab.units import format_bytes


@dataclass(frozen=True, eq=False)
class Plan:
    """A format and a device for every module.

    A plan that exists has been checked against its model. Two plans are equal if they say the same, whichever object
    describes the model.

    Attributes:
        spec: The model; its name and fingerprint are what a plan's JSON says of it.
        modules: Module name → assignment, in forward order.
        dtype: Activations, norms and biases: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        kv_format: Keys and values: the plan's dtype, ``"int8"`` (one scale a token and head) or ``"int4"`` (keys per
            channel in groups of 32 tokens, values per token in groups of 32 channels).
        context: Tokens the plan is made for, prompt and answer together.
        threads: CPU threads, or ``None`` for torch's choice; tokens are then decoded with one, half of those or all,
            whichever shows to be the fastest.
        stream_from: Prompts of so many tokens or more bring the weights of CPU and disk layers to the GPU, layer by
            layer, and compute there; ``None`` for never. Decoding a token always computes where the layer is.
        prefill_chunk: Prompts are read so many tokens at a time, which bounds their activations; ``None`` for at once.
        precision: Of weights in two planes: tokens are decoded by ``"fast"`` (the high plane alone), ``"precise"``
            (both) or ``"auto"`` (both where the high plane is unsure); ``None`` for both. Prompts are read by both.
        remember: Most bytes of prompts' keys and values that are kept on disk for later chats; ``None`` for nothing.
            Where anything is remembered, prompts are read in blocks of 128 tokens, so that a block's keys and values
            depend on what is before it alone.
        remember_ram: The same in RAM, for as long as a chat's decoder lives; taken at once, in whole blocks.
        solver: How weights in floats become codes while they are loaded: ``"search"`` (half-quadratic where the format
            has zero points, else a clip search) or ``"rtn"`` (round to nearest, in a tenth of the time). Codes that the
            files hold are taken as they are.
        asked: The recipe that ``uniform`` was asked for, so that ``summary`` can say what could not be given. It is no
            part of what a plan is: two plans that differ in it alone are equal, and its JSON lacks it.

    Raises:
        PlanError: Names the first module (or setting) that does not fit the model, and what would.
    """

    spec: ModelSpec = field(repr=False)
    modules: Mapping[str, Assignment] = field(repr=False)
    dtype: str = "bf16"
    kv_format: str = "bf16"
    context: int = 2048
    threads: int | None = None
    stream_from: int | None = None
    prefill_chunk: int | None = None
    precision: str | None = None
    remember: int | None = None
    remember_ram: int | None = None
    solver: str = "search"
    asked: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("dtype", "kv_format"):
            object.__setattr__(self, name, canonical_name(getattr(self, name)))
        check_modules(self.spec, self.modules, self.dtype)
        check_settings(
            self.spec,
            dtype=self.dtype,
            kv_format=self.kv_format,
            context=self.context,
            threads=self.threads,
            stream_from=self.stream_from,
            prefill_chunk=self.prefill_chunk,
            remembers=self.remembers,
        )
        check_solver(self.solver)
        if self.precision is not None:
            check_precision(self.spec, self.precision, self.low_planes())
        for name in ("remember", "remember_ram"):
            self._check_remembered(name, getattr(self, name))

    def _check_remembered(self, name: str, size: int | None) -> None:
        """Refuses what no block fits in."""
        if size is None:
            return
        whole_number(name, size, 1)
        if size < self.block_bytes:
            raise PlanError(
                f"{name}: a block of {BLOCK_TOKENS} tokens takes {format_bytes(self.block_bytes)} in a KV cache of "
                f"{self.kv_format}, found room for {format_bytes(size)}; give more, or remember nothing"
            )

    @property
    def model(self) -> str:
        """Source name of the model."""
        return self.spec.name

    @classmethod
    def uniform(cls, spec: ModelSpec, recipe: str = "bf16", *, context: int = 2048, dtype: str | None = None) -> "Plan":
        """Gives the whole model one recipe, everything on the GPU.

        Args:
            spec: The model.
            recipe: A format's name, or ``"stored"``: as a converted checkpoint has it. ``nf4`` follows bitsandbytes'
                default and leaves embeddings and head in 16 bits; ``int4`` (any integer of less than 8 bits) gives
                embeddings and head ``int8``, which a tied pair can share row by row. A linear layer whose shape the
                format cannot hold falls back to ``int8``.
            context: Tokens to plan for.
            dtype: Activation dtype; by default the recipe's own if it is a float format, else ``bf16``.

        Raises:
            PlanError: Unknown recipe, or a context the model does not have.
        """
        recipe = "stored" if str(recipe).lower() == "stored" else get_format(recipe).name
        if recipe == "stored":
            dtype = dtype or "bf16"
            formats = {m.name: spec.as_it_is.get(m.name, dtype) for m in spec.modules}
        else:
            dtype = dtype or (recipe if get_format(recipe).kind == "float" else "bf16")
            formats = {m.name: _uniform_format(m, spec, recipe, dtype) for m in spec.modules}
        modules = {name: Assignment(fmt, "gpu") for name, fmt in formats.items()}
        return cls(spec, modules, dtype=dtype, kv_format=dtype, context=context, asked=recipe)

    def with_modules(
        self, *patterns: str, format: str | None = None, device: str | None = None, low: str | None = None
    ) -> "Plan":
        """The same plan with every module that matches one of the glob patterns changed.

        Args:
            patterns: Shell patterns over module names, e.g. ``"model.layers.3.*"`` or ``"*.down_proj"``. Modules that
                share a weight change together: name both.
            format: New format, or ``None`` to keep each module's own.
            device: New device, or ``None`` to keep each module's own.
            low: New place of the low plane of those that have one, or ``None`` to keep each module's own.

        Raises:
            PlanError: No module matches a pattern, or the changed plan does not fit the model.
        """
        names = set()
        for pattern in patterns:
            if not (found := fnmatch.filter(self.modules, pattern)):
                raise PlanError(
                    f"no module of {self.model} matches {pattern!r}; names look like {next(iter(self.modules))}"
                )
            names.update(found)
        changed = dict(self.modules)
        for name in names:
            new = changed[name].stored_as(format) if format else changed[name]
            new = new.moved(device) if device else new
            changed[name] = replace(new, low=low) if low and new.low else new
        return replace(self, modules=changed, asked=None if format else self.asked)

    def with_gpu_layers(self, count: int, disk: int | None = None) -> "Plan":
        """The same plan with the last ``count`` decoder layers on the GPU and the earlier ones on the CPU.

        The *first* layers go to the CPU: the embedding lookup is there too, so hidden states cross once.

        Args:
            count: Layers on the GPU.
            disk: Of the other layers, so many stay on disk, the first ones; by default those that are there already.

        Raises:
            PlanError: More layers than the model has.
        """
        spec, total = self.spec, self.spec.num_hidden_layers
        whole_number(f"GPU layers for {spec.name}", count, 0, total)
        if disk is not None:
            whole_number(f"disk layers for {spec.name} beside {count} on the GPU", disk, 0, total - count)
        before, places = self.layer_devices(), []
        for index in range(total):
            on_disk = before[index] == "disk" if disk is None else index < disk
            places.append("gpu" if index >= total - count else "disk" if on_disk else "cpu")
        by_name = {m.name: places[m.layer] for m in spec.modules if m.layer is not None}
        changed = {name: old.moved(by_name.get(name, old.device)) for name, old in self.modules.items()}
        return replace(self, modules=changed)

    def with_device_map(self, device_map: Mapping) -> "Plan":
        """The same plan with accelerate's placement: ``{"model.embed_tokens": "cpu", "model.layers.0": 0, ...}``.

        Args:
            device_map: Module or any part of its path (``""`` for all) → ``"gpu"``, ``"cuda"``, a GPU's number, or
                ``"cpu"`` or ``"disk"``. The longest name that fits a module counts.

        Names of blocks without weights (``"model.rotary_emb"``) are passed over: they live where the first layer does.

        Raises:
            PlanError: A module without a place, a name that fits no module, or a place that is none.
        """
        places = {name: _place_of(name, where) for name, where in device_map.items()}
        modules = {}
        for name, old in self.modules.items():
            fitting = [part for part in places if part in ("", name) or name.startswith(f"{part}.")]
            if not fitting:
                raise PlanError(f"the device map says nothing about {name}; add it, or '' for all others")
            modules[name] = old.moved(places[max(fitting, key=len)])
        known = {part for name in modules for part in accumulate(name.split("."), "{}.{}".format)}
        for name in places:
            parent = name.rpartition(".")[0]
            if name not in known and name and (parent not in known or re.search(r"\.\d+$", name)):
                raise PlanError(f"the device map names {name!r}, which {self.model} does not have")
        return replace(self, modules=modules)

    def made_for(self, spec: ModelSpec) -> "Plan":
        """The same plan of the same model as it is stored there: a converted one holds the formats it holds.

        Raises:
            PlanError: The model is another, or is stored in other formats.
        """
        _check_made_for(self.model, self.spec.fingerprint, spec)
        return replace(self, spec=spec)

    def layer_devices(self) -> list[str]:
        """The device that holds each decoder layer, by index."""
        devices = {m.layer: self.modules[m.name].device for m in self.spec.modules if m.layer is not None}
        return [devices[index] for index in range(self.spec.num_hidden_layers)]

    def layer_places(self) -> list[str]:
        """Where each decoder layer computes and keeps its KV cache, by index: ``"gpu"`` or ``"cpu"``."""
        return [compute_place(device) for device in self.layer_devices()]

    def weight_bytes(self, device: str | None = None) -> int:
        """Exact bytes of all weights, or of those on one device; a shared weight counts once."""
        return sum(self.module_bytes(module, device) for module in self.spec.modules)

    def module_bytes(self, module: ModuleSpec, device: str | None = None) -> int:
        """Exact bytes of one module's own weights, or of those on one device: none for a weight that another owns."""
        dtype, assignment, sizes = DTYPES[self.dtype], self.modules[module.name], []
        fmt = get_format(assignment.format)
        for key, shape in module.own.items():
            if key == "weight":
                sizes += zip(assignment.places, fmt.bytes_by_plane(module.weight_shape, dtype), strict=True)
            else:
                sizes.append((assignment.device, get_format(self.dtype).weight_bytes(shape, dtype)))
        return sum(size for place, size in sizes if device in (None, place))

    def low_planes(self) -> set[str]:
        """Where the low planes of its modules are; empty where no format has one."""
        return {assignment.low for assignment in self.modules.values() if assignment.low}

    def apart(self) -> list[str]:
        """The modules whose low plane computes elsewhere than the high one: only activations cross."""
        return [name for name, each in self.modules.items() if len(set(map(compute_place, each.places))) > 1]

    @property
    def decodes_by(self) -> str | None:
        """``precision``, or what it means where it is ``None``; ``None`` for weights in one plane."""
        return (self.precision or "precise") if self.low_planes() else None

    def kv_bytes(self, tokens: int, device: str | None = None) -> int:
        """Exact bytes of keys and values (and their scales) for ``tokens`` tokens, on GPU or CPU or on both."""
        placed = zip(self.spec.kv_layers, self.layer_places(), strict=True)
        return sum(self._layer_kv_bytes(held, tokens) for held, place in placed if held and device in (None, place))

    @property
    def remembers(self) -> bool:
        """Whether keys and values of prompts are kept, on disk or in RAM."""
        return self.remember is not None or self.remember_ram is not None

    @property
    def block_bytes(self) -> int:
        """Exact bytes of keys and values of a block of 128 tokens that is remembered."""
        return self.kv_bytes(BLOCK_TOKENS) - self.kv_bytes(0)  # in int4 the newest keys lie beside the blocks

    @property
    def remembered_ram_bytes(self) -> int:
        """Exact bytes of RAM that ``remember_ram`` takes: whole blocks."""
        return (self.remember_ram or 0) // self.block_bytes * self.block_bytes

    @property
    def piece_tokens(self) -> int | None:
        """Most tokens of a prompt that are read at once; ``None`` for all of them."""
        return min(self.prefill_chunk or BLOCK_TOKENS, BLOCK_TOKENS) if self.remembers else self.prefill_chunk

    def pieces(self, start: int, tokens: int) -> list[int]:
        """How many tokens are read at once, piece by piece, of so many behind ``start``.

        Where prompts are remembered no piece reaches over the end of a block: whatever a prompt begins with is then
        read in the same pieces, however it goes on.
        """
        most, end = self.piece_tokens or tokens, start + tokens
        found = []
        while start < end:
            block_end = (start // BLOCK_TOKENS + 1) * BLOCK_TOKENS if self.remembers else end
            found.append(min(most, end - start, block_end - start))
            start += found[-1]
        return found

    def _layer_kv_bytes(self, held: KVLayer, tokens: int) -> int:
        if self.kv_format == "int4":  # codes, scales and zeros in groups of 32; and the newest keys as they are
            values, keys = held.value_dim * tokens * 5 // 8, held.key_dim * -(-tokens // 32) * 20
            return held.heads * (values + keys + 32 * held.key_dim * DTYPES[self.dtype].itemsize)
        if self.kv_format == "int8":  # a code each, and a scale for each head's key and value
            return (held.features + 4 * held.heads) * tokens
        return held.features * DTYPES[self.kv_format].itemsize * tokens

    def not_given(self) -> tuple[ModuleSpec, ...]:
        """The matrices of decoder layers that the recipe asked for cannot hold."""
        if self.asked in (None, "stored") or get_format(self.asked).kind == "float":
            return ()
        asked = get_format(self.asked)
        in_layers = (m for m in self.spec.modules if m.layer is not None and len(m.weight_shape) > 1)
        return tuple(m for m in in_layers if asked.refuse(m.kind, m.weight_shape))

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the plan's content."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_dict(self) -> dict:
        """Plain data, ready for JSON."""
        return {
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.spec.fingerprint,
            "dtype": self.dtype,
            "kv_format": self.kv_format,
            "context": self.context,
            "threads": self.threads,
            # only where it says something: plans without it keep the digest they had before there was one
            **{name: stated for name, usual in _LACKING.items() if (stated := getattr(self, name)) != usual},
            "modules": {name: _entry(assignment) for name, assignment in self.modules.items()},
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to ``path`` too, whole or not at all, if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            write_atomically(Path(path), text)
        return text

    @classmethod
    def from_json(cls, text: str | Path, spec: ModelSpec | None = None) -> "Plan":
        """Reads a plan from JSON text or from a file.

        Args:
            text: The JSON, or a ``Path`` to it.
            spec: The model; by default that of the source the plan names.

        Raises:
            PlanError: Not JSON, a field is missing, unknown or of the wrong type (the field is named), or the plan was
                made for another model.
            SourceError: There is no source of the plan's name.
        """
        values = read_values(text)
        model, fingerprint = values.pop("model"), values.pop("fingerprint")
        spec = spec or find_source(model).spec()
        _check_made_for(model, fingerprint, spec)
        modules = {name: Assignment(**entry) for name, entry in values.pop("modules").items()}
        return cls(spec, modules, **values)

    def table(self):
        """Formats and devices counted by kind of module, of two planes the high one's device first. A DataFrame."""
        import pandas as pd

        named = ((_role(name), each.format, dict.fromkeys(each.places)) for name, each in self.modules.items())
        counts = Counter((role, fmt, " + ".join(places)) for role, fmt, places in named)
        rows = [(role, fmt, device, count) for (role, fmt, device), count in counts.items()]
        return pd.DataFrame(rows, columns=["modules", "format", "device", "count"])

    @property
    def weight_formats(self) -> str:
        """The formats of its modules in words, as ``"int4/int8"``; the dtype alone where no module has another."""
        return "/".join(dict.fromkeys(a.format for a in self.modules.values() if a.format != self.dtype)) or self.dtype

    def summary(self) -> str:
        """One line: recipe, split, KV format, pieces of a prompt, bytes on either side."""
        layers = self.layer_devices()
        on_disk, lookup = self.weight_bytes("disk"), self.modules[self.spec.embedding].device
        disk = f" + {format_bytes(on_disk)} disk" if on_disk else ""
        head = "" if self.modules[self.spec.head].device == "gpu" or self.spec.tied else " and head on the CPU"
        apart = {each.low for each in self.modules.values() if each.low and each.low != each.device}
        low = f", low planes {'on disk' if 'disk' in apart else 'on the CPU'}" if apart else ""
        pieces = f", prompts read {self.piece_tokens} tokens at a time" if self.piece_tokens else ""
        kept = [f"{format_bytes(size)} {where}" for size, where in self._remembered() if size]
        pieces += f", prompts remembered in {' and '.join(kept)}" if kept else ""
        return (
            f"{self.weight_formats} weights, {layers.count('gpu')} of {len(layers)} layers on the GPU, embedding on "
            f"{'disk' if lookup == 'disk' else f'the {lookup.upper()}'}{head}{low}, {self.kv_format} KV, "
            f"context {self.context}{pieces}: "
            f"{format_bytes(self.weight_bytes('gpu'))} GPU + {format_bytes(self.weight_bytes('cpu'))} CPU"
            f"{disk}{self._not_given_text()}"
        )

    def _remembered(self) -> list[tuple[int, str]]:
        return [(self.remembered_ram_bytes, "of RAM"), (self.remember or 0, "of disk")]

    def _not_given_text(self) -> str:
        lacking = self.not_given()
        if not lacking:
            return ""
        total = sum(map(self.module_bytes, lacking))
        instead = " and ".join(dict.fromkeys(self.modules[m.name].format for m in lacking))
        reason = get_format(self.asked).refuse(lacking[0].kind, lacking[0].weight_shape)
        return (
            f"; {format_bytes(total)} of the layers ({_role(lacking[0].name)}, …) are in {instead}, not in the "
            f"{self.asked} asked for: {reason}"
        )

    def _repr_html_(self) -> str:
        heading = f"<b>Plan</b> {self.model}, {self.dtype}, KV {self.kv_format}, context {self.context}"
        return heading + self.table().to_html(index=False)


def _check_made_for(model: str, fingerprint: str, spec: ModelSpec) -> None:
    if fingerprint != spec.fingerprint:
        raise PlanError(
            f"this plan was made for {model!r} (fingerprint {fingerprint}), found model {spec.name!r} "
            f"(fingerprint {spec.fingerprint}); make a new plan"
        )


def compute_place(device: str) -> str:
    """Where modules on a device compute: weights on disk are mapped, and the CPU reads them."""
    return "cpu" if device == "disk" else device


def _uniform_format(module: ModuleSpec, spec: ModelSpec, recipe: str, dtype: str) -> str:
    if module.kind == "other" or get_format(recipe).kind == "float":
        return dtype
    shape, ends = module.weight_shape, module.name in (spec.embedding, spec.head)
    if ends and recipe == "nf4":
        return dtype
    if ends and spec.tied and spec.module(spec.embedding).kind != "embedding":
        return dtype  # a table with arithmetic of its own (scaled, say) stays as it is, and so does the head tied to it
    outside = ends or (module.layer is None and get_format(recipe).planes > 1)
    if module.kind == "embedding" or outside or get_format(recipe).refuse(module.kind, shape):
        return "int8"
    return recipe


def _entry(assignment: Assignment) -> dict[str, str]:
    """An assignment as a plan's JSON has it."""
    entry = {"format": assignment.format, "device": assignment.device}
    return entry if assignment.low is None else {**entry, "low": assignment.low}


def _place_of(name: str, where: str | int) -> str:
    """accelerate's words for a place."""
    text = str(where).split(":")[0]
    if text in ("gpu", "cuda") or is_whole_number(where, 0):
        return "gpu"
    if text in ("cpu", "disk"):
        return text
    raise PlanError(f"{name or 'all'}: expected gpu, cuda, a GPU's number, cpu or disk, found {where!r}")


def _role(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


VERSION = 1
_LACKING = {
    "stream_from": None,
    "prefill_chunk": None,
    "precision": None,
    "remember": None,
    "remember_ram": None,
    "solver": "search",
}
"""Fields that a plan's JSON leaves out where they say no more than this."""
_TYPES = {
    "model": (str, "str"),
    "fingerprint": (str, "str"),
    "dtype": (str, "str"),
    "kv_format": (str, "str"),
    "context": (int, "a whole number"),
    "threads": (int | None, "a whole number"),
    "stream_from": (int | None, "a whole number"),
    "prefill_chunk": (int | None, "a whole number"),
    "precision": (str | None, "text"),
    "remember": (int | None, "a whole number"),
    "remember_ram": (int | None, "a whole number"),
    "solver": (str, "text"),
    "modules": (dict, "dict"),
}


def read_values(text: str | Path) -> dict:
    """The fields of a plan from its JSON text or file, ``version`` left out; each module an object of two texts.

    Raises:
        PlanError: See ``Plan.from_json``.
    """
    if isinstance(text, Path):
        try:
            text = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"expected a plan's JSON file, found {text}: {error}") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"expected a plan as JSON, found text that is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise PlanError(f"expected a plan as a JSON object, found {type(values).__name__}")
    if type(values.get("version")) is not int or values["version"] != VERSION:
        raise PlanError(f"expected plan version {VERSION}, found {values.get('version')!r}")
    values = {**_LACKING, **values}
    if odd := set(values) ^ {"version", *_TYPES}:
        name = sorted(odd)[0]
        raise PlanError(f"plan field {name!r} is {'missing' if name in _TYPES else 'not known'}")
    for name, (kind, words) in _TYPES.items():
        if isinstance(values[name], bool) or not isinstance(values[name], kind):
            raise PlanError(f"plan field {name!r}: expected {words}, found {values[name]!r}"[:200])
    for name, entry in values["modules"].items():
        if not isinstance(entry, dict) or set(entry) - {"low"} != {"format", "device"}:
            raise PlanError(f"{name}: expected an object with format and device, found {entry!r}"[:200])
        if not all(isinstance(value, str) for value in entry.values()):
            raise PlanError(f"{name}: expected format, device and low as text, found {entry!r}"[:200])
    del values["version"]
    return values
