"""Which stored tensor is which parameter: transformers' renaming, prefixes and ties, applied as it loads a model.

Fine-tunes and merges leave files that their config does not describe. What stock ``from_pretrained`` makes of them is
made of them here, with its own functions; what it would compute from several tensors is refused.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.spec import ModelSpec, ModuleSpec, build_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# what compressed-tensors stores of a quantised module beside its weight, or instead of it
_QUANTISED = ("weight_packed", "weight_scale", "weight_shape")


def with_model_names(spec: ModelSpec, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint that is read by the names of the model's parameters.

    Args:
        spec: The model, as its config alone describes it.
        checkpoint: Its tensors, by the names in the files.

    Returns:
        The same files. Tensors that the model has no place for are left out, see ``Checkpoint.unknown``. Of modules
        that the config ties, the second is left out as well, unless the files hold two that differ.

    Raises:
        CheckpointError: transformers would compute a parameter from several tensors, or the files hold a constant
            that is not the class's own.
    """
    model = _empty_model(json.dumps(spec.config, sort_keys=True))
    stored, unknown = _stored_names(model, spec, checkpoint)
    _check_buffers(model, stored, checkpoint)
    if not _share(_tied_names(model, spec), stored, checkpoint):
        for module in spec.modules:
            if module.tied_to:
                for name in _weight_names(module.name):
                    stored.pop(name, None)
    if unknown:
        logger.info("%s: %d tensors are none of the model's, as %s", checkpoint.directory, len(unknown), unknown[0])
    return checkpoint.renamed(stored, tuple(unknown))


def differing_ties(spec: ModelSpec, checkpoint: Checkpoint) -> list[ModuleSpec]:
    """Modules that share a weight in the spec, and have one of their own in the files.

    Args:
        spec: A model, as its config alone may describe it.
        checkpoint: Its tensors, by the names of the model.
    """
    shared = [module for module in spec.modules if module.tied_to]
    return [module for module in shared if not _is_shared(module, checkpoint)]


def refuse_differing_ties(spec: ModelSpec, checkpoint: object) -> None:
    """Refuses a spec that was made before the files were here, where they hold two weights and not one.

    Args:
        spec: A model.
        checkpoint: Its tensors by the names of the model; anything but a ``Checkpoint`` is a test's or a dry run's.

    Raises:
        CheckpointError: Of two modules that are one to the spec, the files hold a weight each.
    """
    if isinstance(checkpoint, Checkpoint) and (differing := differing_ties(spec, checkpoint)):
        name, owner = differing[0].name, differing[0].tied_to
        raise CheckpointError(
            f"{spec.name}: by its config {name} shares the weight of {owner}, but the files hold two that differ; plan "
            "again (give the command again) now that they are on this machine"
        )


def _is_shared(module: ModuleSpec, checkpoint: Checkpoint) -> bool:
    pairs = zip(_weight_names(module.name), _weight_names(module.tied_to), strict=True)
    held = [pair for pair in pairs if pair[0] in checkpoint and pair[1] in checkpoint]
    return all(checkpoint.same_values(name, owner) for name, owner in held)


@functools.lru_cache(maxsize=4)
def _empty_model(config: str) -> PreTrainedModel:
    return build_on_meta(ModelSpec(name="", config=json.loads(config), modules=()).pretrained_config())


def _weight_names(module: str) -> list[str]:
    return [f"{module}.{key}" for key in ("weight", *_QUANTISED)]


def _stored_names(model: PreTrainedModel, spec: ModelSpec, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """The model's name → the name in the files, and the files' names that are none of the model's.

    Source: ``convert_and_load_state_dict_in_model`` in transformers/core_model_loading.py (5.23): in natural order,
    and of two tensors for one parameter the first counts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    known = dict(model.state_dict())
    known |= dict.fromkeys((f"{name}.{key}" for name in spec.stored for key in _QUANTISED), ())
    stored, unknown = {}, []
    for name in sorted(checkpoint, key=dot_natural_key):
        renamed, computed = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:  # a name of today that an old rule would change
            renamed, computed = rename_source_key(name, [], [], model.base_model_prefix, known)
        if renamed not in known:
            unknown.append(name)
        elif computed and renamed not in stored:
            raise CheckpointError(
                f"{checkpoint.directory}: transformers computes {renamed} from {name} and its like while loading, "
                "which is not done here; expected a checkpoint with the model's own tensors"
            )
        else:
            stored.setdefault(renamed, name)
    return stored, unknown


def _tied_names(model: PreTrainedModel, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Pairs of one weight, by the config: the name that shares it, and the name that has it."""
    for sharing, owner in model.all_tied_weights_keys.items():
        module = sharing.removesuffix(".weight")
        if module in spec.stored:
            yield from zip(_weight_names(module), _weight_names(owner.removesuffix(".weight")), strict=True)
        else:
            yield sharing, owner


def _share(ties: Iterator[tuple[str, str]], stored: dict[str, str], checkpoint: Checkpoint) -> bool:
    """Lets both names of a pair mean the tensor that is there; says whether some pair has two that differ.

    Source: ``PreTrainedModel.tie_weights`` in transformers/modeling_utils.py (5.23): whichever is stored is shared, and
    two are tied only where every value is the same.
    """
    ties = list(ties)
    differ = False
    for sharing, owner in ties:  # an owner that no file holds takes the first sharer's
        if owner not in stored and sharing in stored:
            stored[owner] = stored[sharing]
    for sharing, owner in ties:
        if sharing not in stored and owner in stored:
            stored[sharing] = stored[owner]
        elif sharing in stored and not checkpoint.same_values(stored[sharing], stored[owner]):
            differ = True
    return differ


def _check_buffers(model: PreTrainedModel, stored: dict[str, str], checkpoint: Checkpoint) -> None:
    """Refuses constants of the files' own: they are the class's where a model is loaded here."""
    for name, buffer in model.named_buffers():
        if name not in stored or buffer.is_meta:
            continue
        found = checkpoint.read(stored[name])
        if found.shape != buffer.shape or not torch.equal(found, buffer.to(found.dtype)):
            raise CheckpointError(
                f"{checkpoint.directory}: {stored[name]} holds values of its own for {name}, which is no weight but a "
                "constant of the class here; this checkpoint is not supported"
            )
