"""compressed-tensors' ``quantization_config``: which format each module of a directory is stored in, and back.

``int8`` is stored as ``naive-quantized`` (int8 codes and a scale a row), int2 to int6 as ``pack-quantized`` (codes
packed into words, a scale a group), all symmetric: what stock transformers opens (for vLLM see docs/other_engines.md).
Tried with transformers 5.23 and compressed-tensors 0.20: a tied pair in int8 opens where both modules are targets and
the head has its own copy of the scales; an *embedding* below 8 bits does not open there (it has no ``weight`` to
initialise), only here.
"""

from collections.abc import Iterable, Mapping

from lowvram_lab.errors import CheckpointError, SourceError
from lowvram_lab.layouts.compressed import closest, matches, targets, weights_of
from lowvram_lab.model.formats import FORMATS, get_format

KEY = "quantization_config"
"""Of ``config.json``: how the weights beside it are quantised. Where they are written anew, it goes."""

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


def is_plain(block: dict) -> bool:
    """Whether a config's block is of compressed-tensors, and every scheme of it is one that a format here stands for.

    Of such a directory the files' own tensors are what a layer holds; others are read through ``layouts``.
    """
    if not isinstance(block, dict) or block.get("quant_method") != METHOD:
        return False
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or block.get("kv_cache_scheme"):
        return False
    return all(isinstance(group, dict) and _format_of(group, block) for group in groups.values())


def stored_formats(block: dict, modules: Iterable, where: str) -> dict[str, str]:
    """Which format each module is stored in.

    Args:
        block: A ``quantization_config`` that ``is_plain``.
        modules: The model's ``ModuleSpec``s.
        where: What to call the model in messages.

    Returns:
        Module name → format, quantised modules only.

    Raises:
        CheckpointError: A module whose shape its format does not fit.
        SourceError: One of two tied modules is quantised, the other is not.
    """
    schemes = [(targets(group), _format_of(group, block)) for group in block["config_groups"].values()]
    ignored, found = targets({"targets": block.get("ignore") or []}), {}
    for module in modules:
        if module.kind not in ("linear", "embedding") or matches(module, ignored):
            continue
        if fmt := closest(module, schemes):
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


def _format_of(group: dict, block: dict) -> str | None:
    """The format here that a group's tensors are those of, if there is one."""
    weights = weights_of(group)
    layout = group.get("format") or block.get("format")
    size = weights.get("group_size") if weights.get("strategy") == "group" else None
    plain = (
        weights.get("type", "int") == "int"
        and weights.get("symmetric", True)
        and not weights.get("dynamic")
        and weights.get("strategy") in ("group", "channel")
        and weights.get("actorder") not in ("group", True)
        and not group.get("output_activations")
    )
    for fmt in FORMATS.values():
        same = (fmt.bits, fmt.group_size, _LAYOUTS.get(fmt.kind)) == (weights.get("num_bits"), size, layout)
        if plain and same and fmt.planes == 1 and fmt.storable:
            return fmt.name
    return None
