"""Which stored tensor is which parameter: transformers' renaming, prefixes and ties, applied as it loads a model.

Fine-tunes and merges leave files that their config does not describe. What stock ``from_pretrained`` makes of them is
made of them here, with its own functions; what it would compute from several tensors is refused.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.spec import ModelSpec, build_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# what compressed-tensors stores of a quantised module beside its weight, or instead of it
_QUANTISED = ("weight_packed", "weight_scale", "weight_shape")


def with_model_names(spec: ModelSpec, checkpoint: Checkpoint, beside: Iterable[str] = ()) -> Checkpoint:
    """A checkpoint that is read by the names of the model's parameters.

    Args:
        spec: The model, as its config alone describes it.
        checkpoint: Its tensors, by the names in the files.
        beside: Names of tensors that parameters are made of, by the names of the model's modules.

    Returns:
        The same files. Tensors that the model has no place for are left out, see ``Checkpoint.unknown``. Of parameters
        that the config ties, the second is left out as well, unless the files hold two that differ.

    Raises:
        CheckpointError: transformers would compute a parameter from several tensors, or the files hold a constant
            that is not the class's own.
    """
    model = _empty_model(json.dumps(spec.config, sort_keys=True))
    stored, unknown = _stored_names(model, spec, checkpoint, beside)
    _check_buffers(model, stored, checkpoint)
    _share(spec, stored)
    named = checkpoint.renamed(stored, tuple(unknown))
    if not differing_ties(spec, named):
        shared = [sharing for sharing, _ in _shared(spec)]
        named = checkpoint.renamed({name: old for name, old in stored.items() if name not in shared}, tuple(unknown))
    if unknown:
        logger.info("%s: %d tensors are none of the model's, as %s", checkpoint.directory, len(unknown), unknown[0])
    return named


def differing_ties(spec: ModelSpec, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Names of parameters that are one in the spec and two in a checkpoint ``with_model_names``: sharer and owner."""
    held = [pair for pair in _shared(spec) if pair[0] in checkpoint and pair[1] in checkpoint]
    return [pair for pair in held if not checkpoint.same_values(*pair)]


def refuse_differing_ties(spec: ModelSpec, checkpoint: object) -> None:
    """Refuses a spec that was made before the files were here; what stands for a ``Checkpoint`` in a dry run passes.

    Raises:
        CheckpointError: The files hold two tensors that differ where the spec has one.
    """
    if isinstance(checkpoint, Checkpoint) and (differing := differing_ties(spec, checkpoint)):
        raise CheckpointError(
            f"{spec.name}: by its config {differing[0][0]} is {differing[0][1]}, but the files hold two that differ; "
            "plan again (give the command again) now that they are on this machine"
        )


@functools.lru_cache(maxsize=4)
def _empty_model(config: str) -> PreTrainedModel:
    return build_on_meta(ModelSpec(name="", config=json.loads(config), modules=()).pretrained_config())


def _shared(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Names of parameters that are another module's, and that one's name."""
    for module in spec.modules:
        for key in ("weight", *_QUANTISED) if module.tied_to else ():
            yield f"{module.name}.{key}", f"{module.tied_to}.{key}"
        for key, owner in module.shared.items():
            yield f"{module.name}.{key}", owner


def _stored_names(
    model: PreTrainedModel, spec: ModelSpec, checkpoint: Checkpoint, beside: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
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
    known |= dict.fromkeys(beside, ())
    stored, unknown = {}, []
    for name in sorted(checkpoint, key=dot_natural_key):
        renamed, computed = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if renamed not in known and name in known:  # a name of today that an old rule would change
            renamed, computed = rename_source_key(name, [], [], model.base_model_prefix, known)
        if renamed not in known:
            unknown.append(name)
        elif computed and renamed not in stored:
            why = f"transformers computes {renamed} from {name} and its like while loading, which is not done here"
            raise CheckpointError(f"{checkpoint.directory}: {why}; expected the model's own tensors")
        else:
            stored.setdefault(renamed, name)
    return stored, unknown


def _share(spec: ModelSpec, stored: dict[str, str]) -> None:
    """Lets both names of a pair mean the tensor that is there.

    Source: ``PreTrainedModel.tie_weights`` in transformers/modeling_utils.py (5.23): whichever is stored is shared, and
    two are tied only where every value is the same.
    """
    pairs = list(_shared(spec))
    for sharing, owner in pairs:  # an owner that no file holds takes the first sharer's
        if owner not in stored and sharing in stored:
            stored[owner] = stored[sharing]
    for sharing, owner in pairs:
        if owner in stored:
            stored.setdefault(sharing, stored[owner])


def _check_buffers(model: PreTrainedModel, stored: dict[str, str], checkpoint: Checkpoint) -> None:
    """Refuses constants of the files' own: they are the class's where a model is loaded here."""
    for name, buffer in model.named_buffers():
        if name not in stored or buffer.is_meta:
            continue
        found = checkpoint.read(stored[name])
        if found.shape != buffer.shape or not torch.equal(found, buffer.to(found.dtype)):
            why = f"{stored[name]} holds values of its own for {name}, which is a constant of the class here"
            raise CheckpointError(f"{checkpoint.directory}: {why}; this checkpoint is not supported")
