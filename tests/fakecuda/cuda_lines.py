"""Share of the library's CUDA-only lines that a test run executed: ``python cuda_lines.py [.coverage]``.

A line counts as CUDA-only, by rules that read the source and nothing else, if it stands

- in a module, class or function whose name says CUDA (``memory/cuda.py``, ``CudaGpu``, ``_on_cuda``), or in
  ``decoding/graph.py``;
- in a branch of a condition that asks for CUDA (``torch.cuda.is_available()``, ``kernels == "cuda"``, a name such as
  ``cuda``), on the side where it is there: also what follows an ``if not …: return``;
- or calls ``torch.cuda`` for anything but whether there is one.

Prints the share by file and the lines that were not executed; exit status 1 where the share is under 95 %.
"""

import argparse
import ast
import sys
from pathlib import Path

import coverage

PACKAGE = Path(__file__).resolve().parents[2] / "lowvram_lab"
LEAST = 0.95
WHOLE = ("memory/cuda.py", "decoding/graph.py")
OTHERWISE = {"cuda_context"}  # a size: a budget has one without CUDA too
ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def _is_cuda_name(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return "cuda" in name.lower() and name not in OTHERWISE


def _asks(test: ast.expr) -> bool | None:
    """Whether a condition holds with CUDA (True), without (False), or is about something else (None)."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _asks(test.operand)
        return None if inner is None else not inner
    if isinstance(test, ast.BoolOp):
        sides = [side for side in map(_asks, test.values) if side is not None]
        return sides[0] if sides else None
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        against = test.comparators[0]
        if (
            isinstance(against, ast.Constant)
            and against.value == "cuda"
            and isinstance(test.ops[0], ast.Eq | ast.NotEq)
        ):
            return isinstance(test.ops[0], ast.Eq)
        return None
    return True if any(map(_is_cuda_name, ast.walk(test))) else None


def _calls_cuda(node: ast.stmt) -> bool:
    """Whether a statement without a body uses ``torch.cuda``, beyond asking whether there is a card."""
    return any(
        isinstance(part, ast.Attribute)
        and part.attr not in ("is_available", "Event")
        and isinstance(part.value, ast.Attribute)
        and part.value.attr == "cuda"
        for part in ast.walk(node)
    )


class _Lines(ast.NodeVisitor):
    """Collects the first lines of CUDA-only statements of a module."""

    def __init__(self) -> None:
        self.found: set[int] = set()

    def block(self, statements: list[ast.stmt], inside: bool) -> None:
        """Looks through statements one after the other; ``inside``: they are CUDA-only already."""
        for statement in statements:
            inside = self.statement(statement, inside) or inside

    def statement(self, node: ast.stmt, inside: bool) -> bool:
        """Looks through one; returns whether what follows it in its block is CUDA-only."""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            # its own line is executed by every import
            self.block(node.body, inside or "cuda" in node.name.lower())
            return False
        if isinstance(node, ast.If):
            side = _asks(node.test)
            if inside:
                self.found.add(node.lineno)
            self.block(node.body, inside or side is True)
            self.block(node.orelse, inside or side is False)
            return side is False and isinstance(node.body[-1], ENDS)
        parts = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        handlers = [handler.body for handler in getattr(node, "handlers", [])]
        if any(parts) or handlers:
            if inside:
                self.found.add(node.lineno)
            for each in (*parts, *handlers):
                self.block(each, inside)
        elif inside or _calls_cuda(node):
            self.found.add(node.lineno)
        return False


def cuda_lines(path: Path) -> set[int]:
    """Lines of a module that only a run with CUDA executes."""
    lines = _Lines()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    whole = path.relative_to(PACKAGE).as_posix() in WHOLE
    for node in tree.body:
        inside = whole and isinstance(node, ast.FunctionDef | ast.ClassDef)
        if inside:
            lines.block(node.body, True)
        else:
            lines.statement(node, False)
    return lines.found


def main() -> int:
    """Prints the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default=".coverage", help="coverage's data file")
    options = parser.parse_args()
    if not Path(options.data).is_file():
        parser.error(f"expected coverage's data file, found none at {options.data}: run pytest -m gpu --cov first")
    measured = coverage.Coverage(data_file=options.data)
    measured.load()
    total = missed = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        _, statements, _, missing, _ = measured.analysis2(str(path))
        wanted = cuda_lines(path) & set(statements)
        absent = sorted(wanted & set(missing))
        total, missed = total + len(wanted), missed + len(absent)
        if wanted:
            lines = f"  not executed: {', '.join(map(str, absent))}" if absent else ""
            print(f"{path.relative_to(PACKAGE).as_posix():32} {len(wanted) - len(absent):4} of {len(wanted):4}{lines}")
    share = 1 - missed / total
    print(f"CUDA-only lines executed: {total - missed} of {total}, {share:.1%} (at least {LEAST:.0%})")
    return int(share < LEAST)


if __name__ == "__main__":
    sys.exit(main())
