"""From a config's ``quantization_config`` to the layout of every matrix that the files hold quantised."""

from collections.abc import Callable, Iterable

from lowvram_lab.errors import CheckpointError, SourceError
from lowvram_lab.layouts.bitsandbytes import FourBits, Int8
from lowvram_lab.layouts.compressed import Compressed, closest, matches, targets, weights_of
from lowvram_lab.layouts.gptq import Awq, Gptq
from lowvram_lab.layouts.layout import Layout
from lowvram_lab.layouts.scaled import Fp8, Mxfp4, Nvfp4

Shape = tuple[int, int]
Make = Callable[[Shape], Layout]
"""A matrix's shape ``(rows, columns)`` → how it lies."""

METHODS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8")
"""Of ``quant_method``, those whose files are read."""

_INSTEAD = "name the 16-bit original"


def layouts_of(block: dict, modules: Iterable, where: str) -> dict[str, Layout]:
    """How each matrix lies in the files, from the config alone.

    Args:
        block: A ``quantization_config``.
        modules: The model's ``ModuleSpec``s; none, to check the block alone.
        where: What to call the model in messages.

    Returns:
        Module name → layout, of the quantised ones.

    Raises:
        SourceError: Another method, or settings of one that are not read here; named.
        CheckpointError: A matrix whose shape its settings do not fit.
    """
    method = block.get("quant_method", "unnamed") if isinstance(block, dict) else "unnamed"
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise SourceError(f"{where}: already quantised ({method}); expected 16-bit weights, or {known}: {_INSTEAD}")
    layout_for = _RULES[method](block, where)
    found = {}
    for module in modules:
        if module.kind != "linear" or module.tied_to or (make := layout_for(module)) is None:
            continue
        if module.transposed:
            raise SourceError(f"{where}: {module.name} is stored transposed, and quantised ({method}); {_INSTEAD}")
        found[module.name] = make(module.weight_shape)
    return found


def _gptq(block: dict, where: str) -> Callable[[object], Make | None]:
    bits, size = _number(block, "bits", where, (2, 3, 4, 8)), _group_size(block, where)
    kind = block.get("checkpoint_format") or block.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise _unread(where, f"GPTQ's format {kind!r}", "gptq or gptq_v2")
    if block.get("dynamic"):
        raise _unread(where, "GPTQ with settings of its own for some modules (dynamic)", "one setting for all")
    # "sym" is the middle code as zero point; four bits have room for one in any case
    symmetric, reorders = bool(block.get("sym", True)), bool(block.get("desc_act", False))
    settings = {"shifted": bits == 4 or not symmetric, "one_less": kind == "gptq"}

    def layout_for(module) -> Make | None:
        if module.layer is None and not (block.get("lm_head") and module.name.endswith("lm_head")):
            return None
        return lambda shape: Gptq(
            *shape, bits, _within(size, shape), reordered=reorders and _within(size, shape) < shape[1], **settings
        )

    return layout_for


def _awq(block: dict, where: str) -> Callable[[object], Make | None]:
    bits, size = _number(block, "bits", where, (4,)), _group_size(block, where)
    kind = str(block.get("version") or block.get("format") or "gemm").lower()
    if kind != "gemm":
        raise _unread(where, f"AWQ packed as {kind}", "gemm")
    left_out = _names(block.get("modules_to_not_convert"))

    def layout_for(module) -> Make | None:
        if module.layer is None or any(name in module.name for name in left_out):
            return None
        return lambda shape: Awq(*_of_eights(shape, module, where), bits, _within(size, shape), shifted=True)

    return layout_for


def _bitsandbytes(block: dict, where: str) -> Callable[[object], Make | None]:
    four = bool(block.get("load_in_4bit") or block.get("_load_in_4bit"))
    kind = block.get("bnb_4bit_quant_type", "fp4")
    if four and kind not in ("nf4", "fp4"):
        raise _unread(where, f"bitsandbytes' {kind!r}", "nf4 or fp4")
    if not four and not (block.get("load_in_8bit") or block.get("_load_in_8bit")):
        raise _unread(where, "bitsandbytes with neither 4 nor 8 bits", "load_in_4bit or load_in_8bit")
    left_out = block.get("llm_int8_skip_modules")

    def layout_for(module) -> Make | None:
        if not _converts(module, left_out):
            return None
        return lambda shape: FourBits(*shape, kind) if four else Int8(*shape, 8, shape[1])

    return layout_for


def _fp8(block: dict, where: str) -> Callable[[object], Make | None]:
    block_size = block.get("weight_block_size")
    if block_size is not None and not _are_sizes(block_size):
        raise _unread(where, f"fp8 with weight_block_size {block_size!r}", "two numbers, or none")
    left_out = block.get("modules_to_not_convert")

    def layout_for(module) -> Make | None:
        if not _converts(module, left_out):
            return None
        return lambda shape: Fp8(*shape, "weight_scale_inv", tuple(block_size) if block_size else shape)

    return layout_for


def _compressed(block: dict, where: str) -> Callable[[object], Make | None]:
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise SourceError(f"{where}: expected config_groups in its quantization_config, found {groups!r}"[:300])
    if block.get("kv_cache_scheme"):
        raise SourceError(f"{where}: a quantised KV cache scheme is not supported; remove it from the config")
    schemes = [(targets(group), _scheme(group, block, where)) for group in groups.values()]
    ignored = targets({"targets": block.get("ignore") or []})
    return lambda module: None if matches(module, ignored) else closest(module, schemes)


def _scheme(group: dict, block: dict, where: str) -> Make:
    """How the matrices of one of compressed-tensors' groups lie."""
    weights, kind = weights_of(group), group.get("format") or block.get("format")
    bits, size, strategy = (weights.get(key) for key in ("num_bits", "group_size", "strategy"))
    strategy = strategy or ("group" if size else "tensor")
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise _unread(where, f"group_size {size!r}", "a number of columns")
    if weights.get("dynamic") or group.get("output_activations"):
        raise _unread(where, "weights that are quantised while running, or outputs", "weights that lie quantised")
    of = (weights.get("type", "int"), kind)
    if of in (("float", "float-quantized"), ("float", "naive-quantized")) and bits == 8:
        return _fp8_scheme(weights, strategy, size, where)
    if of in (("float", "mxfp4-pack-quantized"), ("float", "nvfp4-pack-quantized")):
        make = Mxfp4 if kind.startswith("mx") else Nvfp4
        return lambda shape: make(*shape, 5, 32 if make is Mxfp4 else 16)
    packed = of == ("int", "pack-quantized")
    known = packed or of in (("int", "naive-quantized"), ("int", "int-quantized"))
    if not known or type(bits) is not int or not 2 <= bits <= 8 or strategy not in ("group", "channel", "tensor"):
        raise _unread_scheme(weights, kind, strategy, where)
    settings = {
        "shifted": not weights.get("symmetric", True),
        "reordered": weights.get("actorder") in ("group", True) and strategy == "group",
        "packed": packed,
        "whole": strategy == "tensor",
    }
    return lambda shape: Compressed(*shape, bits, _within(size if strategy == "group" else -1, shape), **settings)


def _unread_scheme(weights: dict, kind: object, strategy: object, where: str) -> SourceError:
    of, bits = weights.get("type", "int"), weights.get("num_bits")
    found = f"weights as {kind} of {of}s with {bits} bits, strategy {strategy}"
    return _unread(where, found, "integers of 2 to 8 bits, fp8, mxfp4 or nvfp4, by group, channel or tensor")


def _fp8_scheme(weights: dict, strategy: str, size: int | None, where: str) -> Make:
    structure = weights.get("block_structure")
    known = {
        "tensor": lambda shape: shape,
        "channel": lambda shape: (1, shape[1]),
        "group": lambda shape: (1, _within(size, shape)),
        "block": lambda shape: tuple(structure),
    }
    if strategy not in known or (strategy == "block" and not _are_sizes(structure)):
        raise _unread(where, f"fp8 with the strategy {strategy} and blocks of {structure!r}", ", ".join(known))
    return lambda shape: Fp8(*shape, "weight_scale", known[strategy](shape))


def _converts(module, left_out: object) -> bool:
    """transformers' rule: which linear layers its quantisers replace. The head is among those left out by default."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    if not left_out:
        return module.layer is not None
    return should_convert_module(module.name, _names(left_out))


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _number(block: dict, key: str, where: str, among: tuple[int, ...]) -> int:
    found = block.get(key)
    if found not in among or isinstance(found, bool):
        raise _unread(where, f"{key} {found!r}", " or ".join(map(str, among)))
    return found


def _group_size(block: dict, where: str) -> int:
    found = block.get("group_size", 128)
    if type(found) is not int or (found != -1 and found <= 0):
        raise _unread(where, f"group_size {found!r}", "a number of columns, or -1")
    return found


def _within(size: int | None, shape: Shape) -> int:
    """A group's size, at most a row's."""
    return shape[1] if not size or size < 0 else min(size, shape[1])


def _of_eights(shape: Shape, module, where: str) -> Shape:
    if shape[0] % 8:
        raise CheckpointError(f"{where}: {module.name} has {shape[0]} rows; expected a multiple of 8, as AWQ packs")
    return shape


def _unread(where: str, found: str, expected: str) -> SourceError:
    return SourceError(f"{where}: its quantization_config has {found}; expected {expected}: {_INSTEAD}")


_RULES = {
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}
