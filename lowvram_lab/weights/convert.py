"""convert: quantise a model once into a directory that this library and stock transformers open.

Plans the bits, then lets ``quantize/streamed.py`` make the shards, then adds config, tokenizer, recipe and model card.

Derived in: notebooks/04_compress.ipynb
"""

import fnmatch
import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lowvram_lab import __version__
from lowvram_lab.errors import LowvramError
from lowvram_lab.files import cache_dir, known_sha256, refuse_occupied, remember, require_space
from lowvram_lab.memory.host import peak_rss_bytes
from lowvram_lab.model.compressed import quantization_config
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.hub import TOKENIZER
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text, sample_text
from lowvram_lab.planner.card_recipe import Recipe, recipe
from lowvram_lab.units import parse_bytes
from lowvram_lab.weights.calibration import LEAST_TOKENS, calibration_windows, evenly
from lowvram_lab.weights.layer_quantizer import StreamedQuantizer
from lowvram_lab.weights.layerwise import LayerStream
from lowvram_lab.weights.model_card import model_card
from lowvram_lab.weights.resumable import PartialDirectory, building
from lowvram_lab.weights.sensitivity import Sensitivity, candidate_formats, estimate_sensitivity
from lowvram_lab.weights.solve import SOLVERS

CALIBRATION_TOKENS = 16384
SENSITIVITY_TOKENS = 4096
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Conversion:
    """What a conversion made and how well.

    Attributes:
        output: The directory.
        plan: Formats by module, everything on the GPU.
        weight_bytes: What the weights take in memory, by the format table; ``file_bytes`` what the files take.
        source_weight_bytes: The 16-bit model's weights.
        estimated_kl: What the recipe foretold, or ``None`` for a given plan.
        measured: ``tokens``, ``perplexity``, ``reference_perplexity``, ``kl_mean``, ``top1_agreement`` on a held-out
            text, against the original in float32.
        seconds: Of this run; one that was resumed counts from the resumption.
        peak_rss_bytes: Highest resident memory of this process so far.
    """

    output: str
    plan: Plan
    weight_bytes: int
    file_bytes: int
    source_weight_bytes: int
    estimated_kl: float | None
    measured: dict
    seconds: float
    peak_rss_bytes: int

    @property
    def reduction(self) -> float:
        """Share of the 16-bit model's bytes that are saved in memory."""
        return 1 - self.weight_bytes / self.source_weight_bytes

    def to_dict(self) -> dict:
        """Plain data."""
        return {**asdict(self), "plan": self.plan.digest, "reduction": self.reduction}


def convert(
    model: str,
    output: str | Path,
    *,
    plan: Plan | Recipe | None = None,
    weight_bytes: int | str | None = None,
    reduction: float | None = None,
    gpu: str | int | None = None,
    context: int | None = None,
    formats: tuple[str, ...] | None = None,
    stock: bool = True,
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
        plan: Formats made by hand, or a recipe; or one of
        weight_bytes: bytes for the weights in memory,
        reduction: share of the 16-bit bytes to save, such as 0.7,
        gpu: a card to share with ``context`` tokens of KV cache and the workspace.
        context: Tokens to plan for.
        formats: See ``recipe``.
        stock: See ``recipe``.
        calibration: A text file; by default the library's own text.
        calibration_tokens: Read so many tokens of it at most; time grows with them, and so does the result's quality.
        solver: ``"gptq"``, ``"clip"`` (activation-weighted clip search) or ``"rtn"``.
        progress: Show progress bars.

    Raises:
        LowvramError: Output not empty, text too short, no disk space, contradicting budgets.
        BudgetError: The budget is too small for the model.
        CheckpointError: Weights that are missing, not finite, or cannot be held in their format.
    """
    began, output = time.monotonic(), Path(output).expanduser()
    estimated, lookup = None, 0.0
    if isinstance(plan, Recipe):
        plan, estimated, lookup = plan.plan, plan.estimated_kl, plan.lookup
    given = {"plan": plan, "weight_bytes": weight_bytes, "reduction": reduction, "gpu": gpu}
    _check_arguments(given, solver, calibration_tokens)
    refuse_occupied(output)
    source = find_source(model)
    spec = ModelSpec.from_config(source.config(), source.public_name)
    if spec.stored:
        raise LowvramError(f"{model} is a converted model already; convert the 16-bit original it was made from")
    source_bytes = 2 * spec.num_parameters
    if reduction is not None:
        weight_bytes = int(source_bytes * (1 - reduction))
    if plan is not None:
        _check_plan(plan, spec)
    directory, tokenizer = source.fetch(progress), source.tokenizer()
    ids = calibration_windows(
        tokenizer, calibration_text(calibration), calibration_tokens, spec.max_position_embeddings
    )
    held_out = _held_out(tokenizer, ids.shape[1])
    checkpoint = source.checkpoint()
    budget = {"gpu": gpu, "context": context, "formats": formats and tuple(formats), "stock": stock}
    budget["weight_bytes"] = weight_bytes if weight_bytes is None else parse_bytes(weight_bytes)
    if plan is None:
        _check_budget(spec, budget)
    weights = {file.name: known_sha256(file, progress) for file in [directory / "config.json", *checkpoint.files]}
    identity = {
        "weights": weights,
        "plan": [plan.digest, lookup] if plan else None,
        **{key: str(value) for key, value in budget.items()},
        "solver": solver,
        "calibration": hash_of(ids),
        "threads": torch.get_num_threads(),  # another order of summation could round a code the other way
    }
    with building(output, identity) as partial:
        most = plan.weight_bytes(spec) if plan else budget["weight_bytes"] or source_bytes // 2
        require_space(partial.path, most + _state_bytes(spec, ids, held_out, plan), "the conversion")
        stream = LayerStream(spec, checkpoint)
        if plan is None:
            found = _recipe(stream, ids, weights, budget, partial, progress)
            plan, estimated, lookup = found.plan, found.estimated_kl, found.lookup
        work = StreamedQuantizer(stream, plan, partial, ids, held_out, solver, progress, lookup)
        measured = work.run()
        facts = {
            "source": source.public_name,
            "solver": solver,
            "calibration": Path(calibration).name if calibration else "the text that comes with lowvram_lab",
            "calibration_tokens": ids.numel(),
            "weight_bytes": plan.weight_bytes(spec),
            "source_weight_bytes": source_bytes,
            "estimated_kl": estimated,
            "measured": measured,
            "modules": work.modules,
            "plan": replace(plan, model=source.public_name).to_dict(),
        }
        _finish(partial, directory, spec, plan, facts, work.shards)
        partial.publish()
    return Conversion(
        output=str(output),
        plan=plan,
        weight_bytes=plan.weight_bytes(spec),
        file_bytes=sum(file.stat().st_size for file in output.glob("*.safetensors")),
        source_weight_bytes=source_bytes,
        estimated_kl=estimated,
        measured=measured,
        seconds=time.monotonic() - began,
        peak_rss_bytes=peak_rss_bytes(),
    )


def hash_of(ids: torch.Tensor) -> str:
    """Sixteen hex digits of some tokens."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def _check_arguments(given: dict, solver: str, calibration_tokens: int) -> None:
    if sum(value is not None for value in given.values()) != 1:
        raise LowvramError(f"expected one of {', '.join(given)}: it says how small the result is to be")
    if solver not in SOLVERS:
        raise LowvramError(f"expected solver {', '.join(SOLVERS)}, found {solver!r}")
    if calibration_tokens < LEAST_TOKENS:
        raise LowvramError(f"expected {LEAST_TOKENS} calibration tokens or more, found {calibration_tokens}")
    reduction = given["reduction"]
    if reduction is not None and not 0 < reduction < 1:
        raise LowvramError(f"expected a reduction between 0 and 1, such as 0.7, found {reduction!r}")


def _check_plan(plan: Plan, spec: ModelSpec) -> None:
    plan.validate(spec)
    for name, assignment in plan.modules.items():
        if get_format(assignment.format).kind == "nf4":
            raise LowvramError(f"{name}: nf4 has no place in a converted directory; plan with int4")


def _held_out(tokenizer, length: int) -> torch.Tensor:
    """Windows of the library's small text, which is not in its calibration text."""
    ids = torch.tensor(tokenizer(sample_text(), add_special_tokens=False)["input_ids"])
    return ids[: max(1, len(ids) // length) * length].view(-1, min(length, len(ids)))


def _state_bytes(spec: ModelSpec, ids, held_out, plan: Plan | None) -> int:
    """Disk that hidden states take meanwhile: two generations of four runs, or every layer's for the sensitivity."""
    runs = 4 * spec.hidden_size * 2 * (ids.numel() + held_out.numel())
    every_layer = 0 if plan else 4 * spec.hidden_size * SENSITIVITY_TOKENS * spec.num_hidden_layers
    return max(2 * runs, every_layer)


def _recipe(stream: LayerStream, ids, weights: dict, budget: dict, partial: PartialDirectory, progress: bool) -> Recipe:
    """The recipe. The sensitivity stays in the cache, for other sizes of the same model."""
    windows = ids[evenly(len(ids), max(1, SENSITIVITY_TOKENS // ids.shape[1]))]
    facts = [weights, hash_of(windows), budget["formats"], __version__]
    kept = cache_dir() / "sensitivity" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.json"
    try:
        found = Sensitivity.from_dict(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        found = estimate_sensitivity(
            stream.spec,
            stream.checkpoint,
            windows,
            formats=budget["formats"],
            scratch=partial.state,
            progress=progress,
        )
        remember(kept, json.dumps(found.to_dict()))
    return recipe(stream.spec, found, **budget)


def _check_budget(spec: ModelSpec, budget: dict) -> None:
    """Raises what a budget too small for any recipe raises, before minutes are spent on a good one."""
    owners = [m for m in spec.modules if m.kind != "other" and not m.tied_to]
    free = {m.name: dict.fromkeys(candidate_formats(m, budget["formats"]), 0.0) for m in owners}
    recipe(spec, Sensitivity(free, free, 0), **budget)


def _finish(partial: PartialDirectory, directory: Path, spec: ModelSpec, plan: Plan, facts: dict, shards) -> None:
    """Writes everything beside the shards."""
    formats = {name: a.format for name, a in plan.modules.items() if get_format(a.format).kind != "float"}
    if spec.tied and get_format(plan.modules[spec.head].format).kind == "packed":
        formats.pop(spec.head, None)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[plan.dtype]
    if formats:
        config["quantization_config"] = quantization_config(formats)
    weight_map, total = {}, 0
    for shard in shards:
        for name, tensor in partial.load_tensors(shard).items():
            weight_map[name], total = shard, total + tensor.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    partial.save_json("model.safetensors.index.json", index)
    partial.save_json(RECIPE, facts)
    for file in sorted(directory.iterdir()):
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in [*TOKENIZER, "generation_config.json", "LICENSE*"]):
            shutil.copyfile(file, partial.path / file.name)
    (partial.path / "README.md").write_text(model_card(facts, spec, total), encoding="utf-8")
    partial.save_json("config.json", config)  # last: a directory without it opens nowhere
