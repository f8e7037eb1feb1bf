"""What a plan may say of a model: which device, format and setting goes with which, and what a whole number is.

Every rule names what was expected, what was found and what would do. It knows no file and no budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.model.formats import DTYPES, FORMATS, canonical_name, get_format
from lowvram_lab.model.spec import ModelSpec, ModuleSpec

DEVICES = ("gpu", "cpu", "disk")
"""Where weights lie. Those on disk are mapped, and compute on the CPU as those in RAM do."""

PRECISIONS = ("fast", "precise", "auto")
"""How a model of two planes decodes: by the high plane, by both, or by both where the high plane is unsure."""

MOST_THREADS = 1024
"""More than any machine has; OpenMP ends the process on absurd numbers."""

INT4_GROUP = 32
"""Features of a value in one group of an int4 KV cache."""

BLOCK_TOKENS = 128
"""Tokens of a block of a prompt that is remembered; a whole number of the groups of any KV format."""


@dataclass(frozen=True)
class Assignment:
    """What one module is stored as, and where.

    Attributes:
        format: A format's name.
        device: Of ``DEVICES``; where a format has two planes, the high one's.
        low: Where the low plane is: as near as the high one or farther; by default beside it. ``None`` for formats of
            one plane.
    """

    format: str
    device: str
    low: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", canonical_name(self.format))
        if self.low is None and has_low_plane(self.format):
            object.__setattr__(self, "low", self.device)

    @property
    def places(self) -> tuple[str, ...]:
        """Where its planes are, the high one first."""
        return (self.device,) if self.low is None else (self.device, self.low)

    def moved(self, device: str) -> "Assignment":
        """The same on another device; a low plane that lay beside the high one goes along, and never lies nearer."""
        if self.low is None or device not in DEVICES:
            return replace(self, device=device)
        low = device if self.low == self.device else max(self.low, device, key=DEVICES.index)
        return replace(self, device=device, low=low)

    def stored_as(self, format: str) -> "Assignment":
        """The same in another format."""
        low = self.low if has_low_plane(canonical_name(format)) else None
        return replace(self, format=format, low=low)


def has_low_plane(format: str) -> bool:
    """Whether a format of this canonical name has two planes."""
    return format in FORMATS and FORMATS[format].planes > 1


def is_whole_number(value: object, least: int, most: int | None = None) -> bool:
    """Whether a value is an ``int`` within bounds; a ``bool`` is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return value >= least and (most is None or value <= most)


def whole_number(
    name: str, value: object, least: int, most: int | None = None, error: type[LowvramError] = PlanError
) -> None:
    """Refuses what is no whole number within bounds, by name such as ``"context"``.

    Raises:
        LowvramError: Of the kind that ``error`` is.
    """
    if not is_whole_number(value, least, most):
        wanted = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise error(f"expected {name} {wanted}, found {value!r}")


def check_modules(spec: ModelSpec, modules: Mapping[str, Assignment], dtype: str) -> None:
    """Checks that every module of a model has a format that holds it and a device; ``dtype`` is the plan's.

    Raises:
        PlanError: Names the first module that does not fit, and what would.
    """
    missing = [m.name for m in spec.modules if m.name not in modules]
    if missing:
        raise PlanError(f"the plan says nothing about module {missing[0]} ({len(missing)} missing)")
    known = {m.name: m for m in spec.modules}
    for name, assignment in modules.items():
        if name not in known:
            raise PlanError(f"the plan names module {name!r}, which {spec.name or 'the model'} does not have")
        _check_module(known[name], assignment, modules, dtype)
        stored = spec.stored.get(name, dtype)
        if spec.stored and assignment.format not in (stored, get_format(stored).plane.name):
            raise PlanError(
                f"{name}: {spec.name} is a converted model that holds it in {stored}, found {assignment.format}; "
                "take the formats it has (recipe 'stored'), or plan with the original"
            )
    _check_layers(spec, modules)


def _check_module(module: ModuleSpec, assignment: Assignment, modules: Mapping[str, Assignment], dtype: str) -> None:
    if assignment.device not in DEVICES:
        raise PlanError(f"{module.name}: expected device {' or '.join(DEVICES)}, found {assignment.device!r}")
    chosen = get_format(assignment.format)
    if reason := chosen.refuse(module.kind, module.weight_shape):
        raise PlanError(f"{module.name}: {reason}")
    _check_low_plane(module, assignment)
    if chosen.kind == "float" and assignment.format != dtype:
        raise PlanError(f"{module.name}: an unquantised module has the plan's dtype {dtype}, found {assignment.format}")
    for parameter in module.shared.values():
        owner = parameter.rpartition(".")[0]
        if owner in modules and modules[owner].device != assignment.device:
            raise PlanError(
                f"{module.name} shares {parameter}: both need one device, found {assignment.device} and "
                f"{modules[owner].device}"
            )
    if module.tied_to and assignment != modules.get(module.tied_to):
        raise PlanError(
            f"{module.name} shares its weight with {module.tied_to}: "
            f"both need one format and one device, found {assignment} and {modules.get(module.tied_to)}"
        )


def _check_low_plane(module: ModuleSpec, assignment: Assignment) -> None:
    low = assignment.low
    if not has_low_plane(assignment.format):
        if low is not None:
            raise PlanError(f"{module.name}: {assignment.format} has no low plane, found a place for one: {low!r}")
        return
    if module.layer is None:  # what is decoded by the high planes is the layers
        one = get_format(assignment.format).plane.name
        raise PlanError(f"{module.name}: {assignment.format} is for decoder layers; take int8 or {one}")
    farther = DEVICES[DEVICES.index(assignment.device) :]
    if low not in farther:
        raise PlanError(
            f"{module.name}: its high plane is on the {assignment.device}, so its low plane may be on "
            f"{', '.join(farther)}; found {low!r}"
        )


def _check_layers(spec: ModelSpec, modules: Mapping[str, Assignment]) -> None:
    first_of: dict[int, str] = {}
    low_of: dict[int, tuple[str, str]] = {}
    for module in spec.modules:
        if module.layer is None:
            continue
        if low := modules[module.name].low:
            before, place = low_of.setdefault(module.layer, (module.name, low))
            if place != low:
                raise PlanError(
                    f"{module.name}: the low planes of a decoder layer lie in one place, found {low} beside {before} "
                    f"with {place}"
                )
        first = first_of.setdefault(module.layer, module.name)
        if modules[first].device != modules[module.name].device:
            raise PlanError(
                f"{module.name}: a decoder layer lives on one device, found {modules[module.name].device} beside "
                f"{first} on {modules[first].device}"
            )


def check_settings(
    spec: ModelSpec,
    *,
    dtype: str,
    kv_format: str,
    context: int,
    threads: int | None,
    stream_from: int | None,
    prefill_chunk: int | None,
    remembers: bool,
) -> None:
    """Checks what a plan says beside its modules, its precision and how much it remembers.

    Arguments as the attributes of ``Plan``.

    Raises:
        PlanError: Names the first setting that does not fit, and what would.
    """
    if dtype not in DTYPES:
        raise PlanError(f"expected dtype {', '.join(DTYPES)}, found {dtype!r}")
    if kv_format not in (dtype, "int8", "int4"):
        raise PlanError(
            f"expected kv_format {dtype} (the plan's dtype), int8 or int4, found {kv_format!r}; for another "
            "dtype let the plan compute in it (dtype, --dtype)"
        )
    if kv_format == "int4" and (odd := odd_for_int4(spec)):
        raise PlanError(f"kv_format int4 needs heads of 32, 64 … features, found {odd[0]}; take int8")
    _check_context(spec, context)
    if threads is not None:
        whole_number("threads", threads, 1, MOST_THREADS)
    if prefill_chunk is not None:
        whole_number("prefill_chunk", prefill_chunk, 1)
    if stream_from is not None:
        whole_number("stream_from", stream_from, 2)
        if kv_format == "int4" or None in spec.kv_layers:
            what = "in int4" if kv_format == "int4" else "that layers share"
            raise PlanError(
                f"weights travel only beside keys and values that can go with them, found a KV cache {what}; leave "
                f"stream_from out{', or take int8' if kv_format == 'int4' else ''}"
            )
        if remembers and stream_from > BLOCK_TOKENS:
            raise PlanError(
                f"prompts that are remembered are read {BLOCK_TOKENS} tokens at a time, found weights that travel for "
                f"{stream_from} tokens or more (stream_from); leave stream_from out, or remember nothing"
            )
        if prefill_chunk is not None and prefill_chunk < stream_from:
            raise PlanError(
                f"weights travel for {stream_from} tokens or more (stream_from), found a prefill_chunk of "
                f"{prefill_chunk}; give chunks of {stream_from} or more"
            )


def check_precision(spec: ModelSpec, precision: str, low_planes: set[str]) -> None:
    """Refuses, by a ``PlanError``, a precision that a model with its low planes in these places cannot have."""
    if precision not in PRECISIONS:
        raise PlanError(f"expected precision {', '.join(PRECISIONS)}, found {precision!r}")
    if not low_planes and precision != "fast":  # by high planes alone any weights can be said to be decoded
        raise PlanError(
            f"precision {precision} needs weights in two planes, found {spec.name} in one; convert the 16-bit original "
            "with --format int4+4 (and keep its low_plane.safetensors beside config.json)"
        )


def odd_for_int4(spec: ModelSpec) -> list[int]:
    """Features of the heads that an int4 KV cache cannot hold: no whole groups. Empty where it can hold all."""
    return [held.value_dim for held in spec.kv_layers if held and held.value_dim % INT4_GROUP]


def _check_context(spec: ModelSpec, context: int) -> None:
    whole_number("context", context, 2)
    if spec.max_position_embeddings and context > spec.max_position_embeddings:
        raise PlanError(
            f"context {context} is beyond the {spec.max_position_embeddings} positions that {spec.name} states; "
            f"ask for {spec.max_position_embeddings} or less"
        )
    if spec.sliding_window and context > spec.sliding_window:
        raise PlanError(
            f"{spec.name} has sliding-window attention of {spec.sliding_window} tokens, which is not forecast yet: "
            f"ask for a context of {spec.sliding_window} or less, found {context}"
        )
