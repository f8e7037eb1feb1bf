"""convert: quantise a model once into a directory that this library and stock transformers open.

Plans the bits, then lets ``layer_quantizer`` make the shards, then adds config, tokenizer, recipe and model card.

Derived in: notebooks/04_compress.ipynb
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lowvram_lab import __version__
from lowvram_lab.conversion.layer_quantizer import LayerQuantizer
from lowvram_lab.conversion.model_card import model_card
from lowvram_lab.conversion.resumable import PartialDirectory, building
from lowvram_lab.conversion.smaller import Smaller
from lowvram_lab.errors import LowvramError
from lowvram_lab.files import cache_dir, expanded, known_sha256, refuse_occupied, remember, require_space
from lowvram_lab.memory.host import peak_rss_bytes
from lowvram_lab.model import low_plane
from lowvram_lab.model.compressed import KEY as QUANTISED
from lowvram_lab.model.compressed import quantization_config
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text, sample_text
from lowvram_lab.repository.hub import TOKENIZER
from lowvram_lab.repository.text import begins_with, equal_windows, first_ids, plain_ids
from lowvram_lab.weights.calibration import LEAST_TOKENS, calibration_windows, evenly
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.recipe import Recipe, RecipeMaker, WeightBudget
from lowvram_lab.weights.sensitivity import Sensitivity, candidate_formats, estimate_sensitivity
from lowvram_lab.weights.solve import SOLVERS

CALIBRATION_TOKENS = 16384
SENSITIVITY_TOKENS = 4096
RECIPE = "recipe.json"


@dataclass(frozen=True, kw_only=True)
class Conversion(Smaller):
    """What a conversion made and how well; see ``Smaller`` for sizes, which are those in memory.

    Attributes:
        plan: Formats by module, everything on the GPU.
        file_bytes: What the files take.
        estimated_kl: What the recipe foretold, or ``None`` for a given plan.
        measured: ``tokens``, ``perplexity``, ``reference_perplexity``, ``kl_mean``, ``top1_agreement`` on a held-out
            text, against the original in float32; its ``window`` and what each ``begins_with``. Of weights in two
            planes that is the high one's; under ``both_planes`` the same by both.
    """

    plan: Plan
    file_bytes: int
    estimated_kl: float | None
    measured: dict

    def to_dict(self) -> dict:
        """Plain data."""
        return {**super().to_dict(), "plan": self.plan.digest}


def convert(
    model: str,
    output: str | Path,
    plan: Plan | Recipe | RecipeMaker,
    *,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    solver: str = "gptq",
    progress: bool = True,
) -> Conversion:
    """Quantises a model into a directory.

    Killed, it goes on where it was when called again with the same arguments, and ends in the same bytes.

    Args:
        model: Name, hub id, directory or .gguf file of a 16-bit model.
        output: A new or empty directory.
        plan: The formats: a plan made by hand, a recipe, or what makes a recipe once the sensitivity is estimated, such
            as ``WeightBudget(reduction=0.7)`` or ``CardBudget("4GiB", context=4096)``.
        calibration: A text file; by default the library's own text.
        calibration_tokens: Read so many tokens of it at most; time grows with them, and so does the result's quality.
        solver: ``"gptq"``, ``"clip"`` (activation-weighted clip search) or ``"rtn"``.
        progress: Show progress bars.

    Raises:
        LowvramError: Output not empty, text too short, no disk space.
        BudgetError: The budget is too small for the model.
        CheckpointError: Weights that are missing, not finite, or cannot be held in their format.
    """
    began = time.monotonic()
    output = expanded(output)
    _check_arguments(plan, solver, calibration_tokens)
    refuse_occupied(output)
    source = find_source(model)
    spec = source.spec(source.public_name)
    if spec.stored:
        raise LowvramError(f"{model} is a converted model already; convert the 16-bit original it was made from")
    recipe = _known_recipe(plan, spec)
    checkpoint, tokenizer = source.checkpoint(progress), source.tokenizer()
    directory = checkpoint.directory
    text = calibration_text(calibration)
    ids = calibration_windows(tokenizer, text, calibration_tokens, spec.max_position_embeddings)
    # the library's small text, which is not in its calibration text
    held_out = equal_windows(plain_ids(tokenizer, sample_text()), first_ids(tokenizer), ids.shape[1])
    if recipe is None:
        _try_for_free(plan, spec)
    weights = {file.name: known_sha256(file, progress) for file in [directory / "config.json", *checkpoint.files]}
    chosen_by = [recipe.plan.digest, recipe.lookup] if recipe else repr(plan)
    with building(output, _identity(weights, chosen_by, solver, ids, held_out)) as partial:
        most = _most_bytes(recipe, plan, spec) + _state_bytes(spec, ids, held_out, recipe)
        require_space(partial.path, most, "the conversion")
        stream = LayerByLayer(spec, checkpoint)
        if recipe is None:
            options = {"formats": plan.formats, "scratch": partial.state, "progress": progress}
            recipe = plan.recipe(spec, known_sensitivity(stream, ids, weights, **options))
        work = LayerQuantizer(stream, recipe.plan, partial, ids, held_out, solver, progress, recipe.lookup)
        measured = work.run() | {"window": held_out.shape[1], "begins_with": begins_with(tokenizer)}
        facts = _facts(recipe, source.public_name, calibration, ids)
        facts |= {"solver": solver, "measured": measured, "modules": work.modules}
        _finish(partial, directory, spec, recipe.plan, facts, work)
        partial.publish()
    return Conversion(
        output=str(output),
        plan=recipe.plan,
        weight_bytes=recipe.weight_bytes,
        file_bytes=sum(file.stat().st_size for file in output.glob("*.safetensors")),
        source_weight_bytes=recipe.source_weight_bytes,
        estimated_kl=recipe.estimated_kl,
        measured=measured,
        seconds=time.monotonic() - began,
        peak_rss_bytes=peak_rss_bytes(),
    )


def hash_of(ids: torch.Tensor) -> str:
    """Sixteen hex digits of some tokens."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def _check_arguments(plan: object, solver: str, calibration_tokens: int) -> None:
    if not isinstance(plan, Plan | Recipe) and not callable(getattr(plan, "recipe", None)):
        raise LowvramError(f"expected a Plan, a Recipe, a WeightBudget or a CardBudget as the plan, found {plan!r}")
    if solver not in SOLVERS:
        raise LowvramError(f"expected solver {', '.join(SOLVERS)}, found {solver!r}")
    if calibration_tokens < LEAST_TOKENS:
        raise LowvramError(f"expected {LEAST_TOKENS} calibration tokens or more, found {calibration_tokens}")


def _identity(weights: dict, chosen_by: list | str, solver: str, ids: torch.Tensor, held_out: torch.Tensor) -> dict:
    """What a result is made from: work begun with anything else is not gone on with."""
    return {
        "weights": weights,
        "plan": chosen_by,
        "solver": solver,
        "calibration": [hash_of(ids), hash_of(held_out)],
        "threads": torch.get_num_threads(),  # another order of summation could round a code the other way
    }


def _known_recipe(plan: Plan | Recipe | RecipeMaker, spec: ModelSpec) -> Recipe | None:
    """The recipe, unless it is still to be made."""
    if isinstance(plan, Plan):
        _check_plan(plan, spec)
        return Recipe(plan, None, plan.weight_bytes(), 2 * spec.num_parameters)
    if isinstance(plan, Recipe):
        _check_plan(plan.plan, spec)
        return plan
    return None


def _check_plan(plan: Plan, spec: ModelSpec) -> None:
    plan.made_for(spec)
    for name, assignment in plan.modules.items():
        fmt = get_format(assignment.format)
        if fmt.kind != "float" and not fmt.storable:
            raise LowvramError(f"{name}: {fmt.name} has no place in a converted directory; plan with int{fmt.bits}")


def _most_bytes(recipe: Recipe | None, plan: Plan | Recipe | RecipeMaker, spec: ModelSpec) -> int:
    """Disk that the weights may take. What a card leaves to them is not known yet: half the original, say."""
    if recipe:
        return recipe.weight_bytes + _low_plane_bytes(recipe.plan)  # each layer's by itself, until all are in one file
    return plan.bytes_for(spec) if isinstance(plan, WeightBudget) else spec.num_parameters


def _low_plane_bytes(plan: Plan) -> int:
    formats = ((module, get_format(plan.modules[module.name].format)) for module in plan.spec.modules)
    return sum(fmt.low_plane.weight_bytes(module.weight_shape) for module, fmt in formats if fmt.planes > 1)


def _state_bytes(spec: ModelSpec, ids: torch.Tensor, held_out: torch.Tensor, recipe: Recipe | None) -> int:
    """Disk that hidden states take meanwhile: two generations of all runs, or every layer's for the sensitivity."""
    calibration = 4 * spec.hidden_size * 2 * ids.numel()  # once more: those that are worked on
    runs = calibration + 4 * spec.hidden_size * 2 * held_out.numel()
    if recipe and recipe.plan.low_planes():
        runs += 4 * spec.hidden_size * held_out.numel()  # the held-out text's through both planes
    every_layer = 0 if recipe else 4 * spec.hidden_size * SENSITIVITY_TOKENS * spec.num_hidden_layers
    return max(2 * runs + calibration, every_layer)


def _try_for_free(maker: RecipeMaker, spec: ModelSpec) -> None:
    """Raises what a budget too small for any recipe raises, before minutes are spent on a good one."""
    owners = [m for m in spec.modules if m.kind != "other" and not m.tied_to]
    free = {m.name: dict.fromkeys(candidate_formats(m, maker.formats), 0.0) for m in owners}
    maker.recipe(spec, Sensitivity(free, free, 0))


def known_sensitivity(
    stream: LayerByLayer,
    ids: torch.Tensor,
    weights: dict[str, str],
    *,
    formats: tuple[str, ...] | None = None,
    scratch: Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """``estimate_sensitivity`` on some windows of a text, which stays in the cache: for other sizes of the same model.

    Args:
        stream: The model.
        ids: Tokens ``(windows, tokens)``; ``SENSITIVITY_TOKENS`` of them are taken, evenly spread.
        weights: File name → SHA-256, of all that the model is made of.
        formats: See ``estimate_sensitivity``.
        scratch: See ``estimate_sensitivity``.
        progress: Show a progress bar.
    """
    windows = ids[evenly(len(ids), max(1, SENSITIVITY_TOKENS // ids.shape[1]))]
    facts = [weights, hash_of(windows), formats, __version__]
    kept = cache_dir() / "sensitivity" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.json"
    try:
        return Sensitivity.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        found = estimate_sensitivity(
            stream.spec, stream.checkpoint, windows, formats=formats, scratch=scratch, progress=progress
        )
    remember(kept, json.dumps(found.to_dict()))
    return found


def _facts(recipe: Recipe, name: str, calibration: str | Path | None, ids: torch.Tensor) -> dict:
    """What ``recipe.json`` says of how the result was planned."""
    return {
        "source": name,
        "calibration": Path(calibration).name if calibration else "the text that comes with lowvram_lab",
        "calibration_tokens": ids.numel(),
        "weight_bytes": recipe.weight_bytes,
        "source_weight_bytes": recipe.source_weight_bytes,
        "estimated_kl": recipe.estimated_kl,
        "plan": {**recipe.plan.to_dict(), "model": name},
    }


def _finish(
    partial: PartialDirectory, directory: Path, spec: ModelSpec, plan: Plan, facts: dict, work: LayerQuantizer
) -> None:
    """Writes everything beside the shards."""
    formats = {name: get_format(a.format).plane.name for name, a in plan.modules.items()}
    formats = {name: fmt for name, fmt in formats.items() if get_format(fmt).kind != "float"}
    if spec.tied and get_format(plan.modules[spec.head].format).kind == "packed":
        formats.pop(spec.head, None)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", QUANTISED):  # the source's own
        config.pop(key, None)
    config["tie_word_embeddings"] = spec.tied  # which the files decided
    config["dtype"] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[plan.dtype]
    if formats:
        config[QUANTISED] = quantization_config(formats)
    if work.low_planes:
        config[low_plane.KEY] = low_plane.block(partial.sha256(low_plane.FILE), work.low_planes)
    weight_map = {}
    total = 0
    for shard in work.shards:
        for name, tensor in partial.load_tensors(shard).items():
            weight_map[name] = shard
            total += tensor.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial.save_json("model.safetensors.index.json", index)
    partial.save_json(RECIPE, facts)
    partial.copy(directory, [*TOKENIZER, "generation_config.json", "LICENSE*"])
    (partial.path / "README.md").write_text(model_card(facts, spec, total), encoding="utf-8")
    partial.save_json("config.json", config)  # last: a directory without it opens nowhere
