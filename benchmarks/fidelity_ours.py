"""What this library makes of a model: recipes from one estimate of the sensitivity, and conversions of plans.

A conversion is kept under the working directory, by its plan and by the code that makes it: a later run makes anew only
what a change of the library's solvers can have changed.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from functools import cache, cached_property
from pathlib import Path

import torch

import lowvram_lab
from lowvram_lab.conversion.convert import CALIBRATION_TOKENS, SENSITIVITY_TOKENS, convert, hash_of
from lowvram_lab.files import write_atomically
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.weights.calibration import evenly
from lowvram_lab.weights.recipe import Recipe, recipe
from lowvram_lab.weights.sensitivity import Sensitivity, estimate_sensitivity
from lowvram_lab.weights.stored import read_stored

SOLVER_CODE = (
    "weights/calibration.py",
    "weights/codes.py",
    "conversion/convert.py",
    "weights/gptq.py",
    "weights/layerwise.py",
    "conversion/layer_quantizer.py",
    "weights/moments.py",
    "weights/solve*.py",
    "weights/stored.py",
    "model/formats.py",
    "packaged.py",
)
ESTIMATE_CODE = (*SOLVER_CODE, "weights/sensitivity.py")


def note_code() -> None:
    """Takes the digests now: the library's files may change in the hours until the first conversion."""
    for patterns in (SOLVER_CODE, ESTIMATE_CODE):
        code_digest(patterns)


@cache
def code_digest(patterns: tuple[str, ...]) -> str:
    """Eight hex digits of some of the library's files."""
    root = Path(lowvram_lab.__file__).parent
    files = sorted({file for pattern in patterns for file in root.glob(pattern)})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


class Ours:
    """Makes recipes and converted models of one subject.

    Attributes:
        subject: A ``Subject``.
        work: Where conversions are kept.
        made_from: Digest of the code that converts and of the calibration tokens.
    """

    def __init__(self, subject, work: Path, calibration: Path | None, tokens: int = CALIBRATION_TOKENS):
        self.subject, self.work, self.calibration, self.tokens = subject, work, calibration, tokens
        self.ids = subject.calibration_windows(calibration, tokens)
        self.made_from = f"{code_digest(SOLVER_CODE)}-{hash_of(self.ids)[:8]}"
        self._estimate_from = f"{code_digest(ESTIMATE_CODE)}-{hash_of(self.ids)[:8]}"

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """As ``convert`` estimates it, once for all recipes."""
        path = self.work / f"sensitivity-{self._estimate_from}.json"
        if not path.exists():
            began, ids = time.perf_counter(), self.ids
            windows = ids[evenly(len(ids), max(1, SENSITIVITY_TOKENS // ids.shape[1]))]
            checkpoint = find_source(self.subject.source).checkpoint()
            found = estimate_sensitivity(self.subject.spec, checkpoint, windows, progress=False)
            write_atomically(path, json.dumps(found.to_dict()))
            print(f"  sensitivity {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return Sensitivity.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def recipe(self, weight_bytes: int, **choices) -> Recipe:
        """The best plan within some bytes, see ``lowvram_lab.recipe``."""
        return recipe(self.subject.spec, self.sensitivity, weight_bytes=weight_bytes, **choices)

    def uniform(self, fmt: str) -> Recipe:
        """Every matrix in one format, embedding and head too; converted with all the care a recipe gets."""
        spec = self.subject.spec
        plan = Plan.uniform(spec, fmt, context=min(2048, spec.max_position_embeddings))
        plan = plan.with_modules(spec.embedding, spec.head, format=fmt)
        size, whole = plan.weight_bytes(), 2 * spec.num_parameters
        return Recipe(plan, None, size, whole, lookup=self.sensitivity.lookup)

    def convert(self, found: Recipe) -> tuple[dict[str, torch.Tensor], int, dict]:
        """Converts by a recipe, unless that was done before.

        Returns:
            Module name → float32 weight, bytes of the tensors in the files, and notes.
        """
        plan = found.plan
        directory = self.work / "converted" / f"{plan.digest}-{self.made_from}"
        directory.parent.mkdir(parents=True, exist_ok=True)
        if not (directory / "config.json").exists():
            given = {"plan": found, "calibration": self.calibration, "calibration_tokens": self.tokens}
            convert(self.subject.source, directory, **given, progress=False)
        facts = json.loads((directory / "recipe.json").read_text(encoding="utf-8"))
        weights, file_bytes = restored(directory, plan)
        notes = {
            "formats": dict(Counter(a.format for a in plan.modules.values()).most_common()),
            "embedding": plan.modules[self.subject.spec.embedding].format,
            "measured_by_convert": facts["measured"],
            "plan": plan.digest,
        }
        return weights, file_bytes, notes


def restored(directory: Path, plan: Plan) -> tuple[dict[str, torch.Tensor], int]:
    """A converted directory's weights in float32, and the bytes of all its tensors."""
    checkpoint, weights = Checkpoint(directory), {}
    for module in plan.spec.modules:
        fmt = get_format(plan.modules[module.name].format)
        if module.tied_to:
            continue
        if fmt.kind == "float":
            weights[module.name] = checkpoint.read(f"{module.name}.weight").float()
        else:
            weights[module.name] = read_stored(module.name, fmt, checkpoint.read).dequantize()
    return weights, sum(checkpoint.read(name).nbytes for name in checkpoint)
