"""What this machine takes for the parts of a forward pass: measured in a second or two, kept until it changes.

Three sorts of rates: of a linear layer, by format (call, weights read, arithmetic a token); of everything else in a
decoder layer, measured on a tiny Llama that goes through the real loader; of the link between GPU and CPU.

Derived in: notebooks/05_split_the_layers.ipynb
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelRates:
    """A linear layer of one format. Seconds: ``call + weights * (weight + row * (tokens - 1))``.

    Attributes:
        call_s: A call with next to no weights.
        weight_s: Per weight, for the first token.
        row_s: Per weight and further token.
    """

    call_s: float
    weight_s: float
    row_s: float

    def seconds(self, weights: int, tokens: int = 1) -> float:
        """A forward pass of ``tokens`` tokens through ``weights`` weights."""
        return self.call_s + weights * (self.weight_s + self.row_s * (tokens - 1))


@dataclass(frozen=True)
class LayerRates:
    """A decoder layer without its linear modules, and what a model has around its layers.

    Attributes:
        model_s: A forward pass of a model without layers and head: embedding, mask, final norm.
        layer_s: Norms, rotary embedding, attention over a few tokens, Python.
        width_s: Per further token and hidden feature: element-wise work.
        pair_s: Per pair of tokens that see each other in a prompt, and query feature.
        cached_query_s: While decoding, per cached token and query feature.
        cached_kv_s: While decoding, per cached token and key feature.
    """

    model_s: float
    layer_s: float
    width_s: float
    pair_s: float
    cached_query_s: float
    cached_kv_s: float


@dataclass(frozen=True)
class LinkRates:
    """Copies between CPU and GPU, bytes a second, and what a small one takes.

    Attributes:
        to_gpu: From ordinary memory; ``to_gpu_pinned`` from page-locked memory.
        to_cpu: Into ordinary memory; ``to_cpu_pinned`` into page-locked memory.
        crossing_s: A few KiB, waited for.
    """

    to_gpu: float
    to_gpu_pinned: float
    to_cpu: float
    to_cpu_pinned: float
    crossing_s: float


@dataclass(frozen=True)
class DiskRates:
    """Reading weights that the system does not hold in RAM.

    Attributes:
        read: Bytes a second, one after the other, where the cache folder is.
    """

    read: float
