"""What a forecast asks of a machine beside its rates, answered for the one that this runs on."""

import time

import psutil

from lowvram_lab.decoding.bind import product_of
from lowvram_lab.decoding.kinds import engine_of, off_card
from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.model.formats import Format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModuleSpec
from lowvram_lab.timing import Circumstances


class AnyMachine:
    """Which decoder and kernels run on a machine, and how much of its RAM is free.

    Attributes:
        name: What it is, in words.
        cuda: Whether there is a CUDA card.
        origin: ``"forecast"``: at rates that were measured; ``"assumed"``: of a machine that nobody measured.
    """

    name: str
    cuda: bool = False
    origin: str = "forecast"

    def circumstances(self) -> Circumstances:
        """Of the rates that were asked for."""
        raise NotImplementedError

    def engine_of(self, plan: Plan) -> tuple[str, str]:
        """Kind and name of a plan's decoder, see ``kinds.engine_of``."""
        return engine_of(plan, "cuda" if self.cuda else "cpu")

    def off_card(self, plan: Plan) -> str:
        """The kind that runs layers which are not on a CUDA card."""
        return off_card(plan)

    def leaves_to_module(self, module: ModuleSpec, fmt: Format, place: str) -> bool:
        """Whether the lean decoder leaves a head to its module, instead of multiplying by the weight itself."""
        rows, columns = module.weight_shape
        kernels = "cuda" if place == "gpu" and self.cuda else "cpu"
        tied = bool(module.tied_to)
        layer = None if fmt.kind == "float" else quantized_linear(columns, rows, fmt, kernels, shared=tied)
        return layer is not None and product_of(layer) is None

    def free_ram(self) -> int:
        """Bytes of RAM there are for a model where nobody says."""
        return psutil.virtual_memory().available

    def words(self) -> str:
        """How old and how steady the rates are, in words."""
        return self.circumstances().words(time.time())
