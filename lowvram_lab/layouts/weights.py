"""The tensors of a quantised checkpoint by the names of a model's parameters: in floats, or the codes that it holds."""

from collections.abc import Callable, Iterator

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.layouts.layout import Integers, Layout

ROWS_AT_ONCE = 1 << 22
"""Weights that are restored at once: 16 MiB in float32."""

_ONE_REPOSITORY = "config.json and the weights are not of one model: take both from one repository"


class QuantizedWeights:
    """A checkpoint in which some weights are codes.

    Args:
        checkpoint: A ``Checkpoint`` by the names of the model's modules.
        layouts: Module name → how its weight lies.
        dtype: In which floats a quantised weight is read, the model's own.

    Raises:
        CheckpointError: The files do not hold what the layouts say.
    """

    def __init__(self, checkpoint, layouts: dict[str, Layout], dtype: torch.dtype):
        self._checkpoint, self._dtype = checkpoint, dtype
        self._layouts = {f"{module}.weight": layout for module, layout in layouts.items()}
        # what a quantised weight is made of → that weight
        self._beside = {f"{m}.{key}": f"{m}.weight" for m, layout in layouts.items() for key in layout.tensors()}
        for module, layout in layouts.items():
            self._check(module, layout)

    def __getattr__(self, name: str):
        return getattr(self._checkpoint, name)

    def __contains__(self, name: str) -> bool:
        return name in self._layouts or (name in self._checkpoint and name not in self._beside)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        return f"QuantizedWeights({self._checkpoint!r}: {len(self._layouts)} quantised)"

    def keys(self) -> list[str]:
        """The parameters' names, in the order in which they lie on disk, a quantised one where its first part does."""
        return list(dict.fromkeys(self._beside.get(name, name) for name in self._checkpoint))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the plain weight."""
        layout = self._layouts.get(name)
        return (layout.rows, layout.columns) if layout else self._checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is read in."""
        return self._dtype if name in self._layouts else self._checkpoint.dtype(name)

    def where(self, name: str) -> str:
        """The file and the tensor's name there, in words."""
        layout = self._layouts.get(name)
        if layout is None:
            return self._checkpoint.where(name)
        return self._checkpoint.where(f"{name.removesuffix('weight')}{next(iter(layout.tensors()))}")

    def read(self, name: str) -> torch.Tensor:
        """A tensor in floats; a quantised one some rows at a time, so that of its float32 not all is there."""
        layout = self._layouts.get(name)
        if layout is None or not layout.by_rows:
            return self.rows(name)(slice(None))
        found, look_up = torch.empty(self.shape(name), dtype=self._dtype), self.rows(name)
        step = max(8, ROWS_AT_ONCE // layout.columns // 8 * 8)
        for start in range(0, layout.rows, step):
            found[start : start + step] = look_up(slice(start, start + step))
        return found

    def rows(self, name: str) -> Callable[[slice | torch.Tensor], torch.Tensor]:
        """What gives some rows of a tensor in floats."""
        layout = self._layouts.get(name)
        if layout is None:
            return self._checkpoint.rows(name)

        def look_up(select: slice | torch.Tensor) -> torch.Tensor:
            rows = select if isinstance(select, slice) else slice(None)
            found = self._named(name, lambda read: layout.floats(read, rows)).to(self._dtype)
            return found if isinstance(select, slice) else found[select]

        return look_up

    def held_format(self, name: str) -> str | None:
        """The name of the format that takes a weight's codes as they lie, if there is one."""
        layout = self._layouts.get(name)
        return layout.held if layout is not None and layout.exact else None

    def integers(self, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Some rows' codes, scales and zeros, see ``Integers.integers``."""
        return self._named(name, lambda read: self._layouts[name].integers(read, rows))

    def blocks(self, name: str) -> dict[str, torch.Tensor] | None:
        """What a layer of nf4 holds, of a weight that lies so; ``None`` of integers."""
        layout = self._layouts[name]
        return None if isinstance(layout, Integers) else self._named(name, layout.blocks)

    def _named(self, name: str, of: Callable) -> object:
        """What ``of`` makes of a weight's tensors; errors say whose they are."""
        prefix = name.removesuffix("weight")

        def read(key: str) -> torch.Tensor | None:
            return self._checkpoint.read(prefix + key) if prefix + key in self._checkpoint else None

        try:
            return of(read)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where(name)}: {error}") from error

    def _check(self, module: str, layout: Layout) -> None:
        """Names, shapes and dtypes, from headers alone."""
        for key, expected in layout.tensors().items():
            name = f"{module}.{key}"
            if name not in self._checkpoint:
                if expected.optional:
                    continue
                beside = sorted(n.removeprefix(f"{module}.") for n in self._checkpoint if n.startswith(f"{module}."))
                raise CheckpointError(
                    f"{self._checkpoint.directory}: expected a tensor {name}, as its quantization_config says, found "
                    f"{', '.join(beside) or 'none'} of {module}; {_ONE_REPOSITORY}"
                )
            shape, dtype = tuple(self._checkpoint.shape(name)), self._checkpoint.dtype(name)
            if (expected.shape is not None and shape != expected.shape) or dtype not in expected.dtypes:
                kinds = " or ".join(map(str, expected.dtypes))
                wanted = f"shape {expected.shape} of {kinds}" if expected.shape else kinds
                raise CheckpointError(
                    f"{self._checkpoint.where(name)}: expected {wanted}, found {shape} of {dtype}; {_ONE_REPOSITORY}"
                )
