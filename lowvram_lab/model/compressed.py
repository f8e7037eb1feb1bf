"""compressed-tensors' ``quantization_config``: which format each module of a directory is stored in, and back.

``int8`` is stored as ``naive-quantized`` (int8 codes and a scale a row), int2 to int6 as ``pack-quantized`` (codes
packed into words, a scale a group), all symmetric: what stock transformers opens (for vLLM see docs/other_engines.md).
Tried with transformers 5.23 and compressed-tensors 0.20: a tied pair in int8 opens where both modules are targets and
the head has its own copy of the scales; an *embedding* below 8 bits does not open there (it has no ``weight`` to
initialise), only here.
"""

import re
from collections.abc import Iterable, Mapping

from lowvram_lab.errors import CheckpointError, SourceError
from lowvram_lab.model.formats import FORMATS, get_format

METHOD = "compressed-tensors"
_LAYOUTS = {"int8": "naive-quantized", "int4": "pack-quantized", "packed": "pack-quantized"}


def quantization_config(formats: Mapping[str, str]) -> dict:
    """The block of ``config.json`` that says how modules are stored.

    Args:
        formats: Module name → format, quantised modules only; a tied head is named beside its embedding.
    """
    groups: dict[str, list[str]] = {}
    for name, fmt in formats.items():
        groups.setdefault(fmt, []).append(name)
    layouts = {_LAYOUTS[get_format(fmt).kind] for fmt in groups}
    return {
        "quant_method": METHOD,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "format": _LAYOUTS[get_format(fmt).kind],
                "weights": {
                    "type": "int",
                    "num_bits": get_format(fmt).bits,
                    "symmetric": True,
                    "dynamic": False,
                    "strategy": "group" if get_format(fmt).group_size else "channel",
                    "group_size": get_format(fmt).group_size,
                },
            }
            for index, (fmt, targets) in enumerate(sorted(groups.items()))
        },
    }


def stored_formats(block: dict, modules: Iterable, where: str) -> dict[str, str]:
    """Which format each module is stored in.

    Args:
        block: A ``quantization_config``.
        modules: The model's ``ModuleSpec``s.
        where: What to call the model in messages.

    Returns:
        Module name → format, quantised modules only.

    Raises:
        SourceError: Another method, or a scheme that no format here stands for; both are named.
    """
    if not isinstance(block, dict) or block.get("quant_method") != METHOD:
        method = block.get("quant_method", "unnamed") if isinstance(block, dict) else "unnamed"
        raise SourceError(
            f"{where}: already quantised ({method}); expected 16-bit weights or {METHOD}: name the 16-bit original"
        )
    schemes = [(_targets(group), _format_of(group, block, where)) for group in _groups(block, where)]
    ignored, found = _targets({"targets": block.get("ignore") or []}), {}
    for module in modules:
        if module.kind not in ("linear", "embedding") or _matches(module, ignored):
            continue
        matching = [(_closeness(module, targets), fmt) for targets, fmt in schemes if _matches(module, targets)]
        for _, fmt in sorted(matching, key=lambda entry: entry[0])[:1]:
            if reason := get_format(fmt).refuse(module.kind, module.weight_shape):
                raise CheckpointError(f"{where}: {module.name}: {reason}")
            found[module.name] = fmt
    for module in modules:
        if module.tied_to in found:
            found[module.name] = found[module.tied_to]
        elif module.tied_to and module.name in found:
            raise SourceError(
                f"{where}: {module.name} is in {found[module.name]}, but tied to {module.tied_to}, which is not; "
                "expected both or neither: name the 16-bit original"
            )
    return found


def _groups(block: dict, where: str) -> list[dict]:
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise SourceError(f"{where}: expected config_groups in its quantization_config, found {groups!r}"[:300])
    if block.get("kv_cache_scheme"):
        raise SourceError(f"{where}: a quantised KV cache scheme is not supported; remove it from the config")
    return list(groups.values())


def _format_of(group: dict, block: dict, where: str) -> str:
    weights = group.get("weights") or {}
    layout = group.get("format") or block.get("format")
    size = weights.get("group_size") if weights.get("strategy") == "group" else None
    plain = (
        weights.get("type", "int") == "int"
        and weights.get("symmetric", True)
        and not weights.get("dynamic")
        and weights.get("actorder") not in ("group", True)
        and not group.get("input_activations")
        and not group.get("output_activations")
    )
    for fmt in FORMATS.values():
        same = (fmt.bits, fmt.group_size, _LAYOUTS.get(fmt.kind)) == (weights.get("num_bits"), size, layout)
        if plain and same:
            return fmt.name
    raise SourceError(
        f"{where}: its weights are stored as {layout} with {weights.get('num_bits')} bits, strategy "
        f"{weights.get('strategy')}, group size {size}, symmetric {weights.get('symmetric')}; expected symmetric "
        "integers of 2 to 6 bits in groups (pack-quantized) or 8 bits a row (naive-quantized): name the 16-bit original"
    )


def _targets(group: dict) -> list[str]:
    return [target for target in group.get("targets") or [] if isinstance(target, str)]


def _matches(module, targets: list[str]) -> bool:
    """compressed-tensors' rule: a class name, a module's name, or ``re:`` and a pattern."""
    names = {module.name, {"linear": "Linear", "embedding": "Embedding"}.get(module.kind)}
    return any(re.match(t[3:], module.name) if t.startswith("re:") else t in names for t in targets)


def _closeness(module, targets: list[str]) -> int:
    """Of a match: a name counts before a pattern, a pattern before a class."""
    if module.name in targets:
        return 0
    return 1 if _matches(module, [t for t in targets if t.startswith("re:")]) else 2
