"""Check an exercise in a notebook: says "right", or "not yet" with the expected value beside yours; never raises.

Before there is an answer it does not show the expected one.

Knows nothing about any particular exercise: the expected value is computed in the notebook.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What ``check`` found.

    Attributes:
        right: Whether the answer is the expected one.
        text: What the reader sees.
    """

    right: bool
    text: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.text


def check(name: str, yours: object, expected: object, tolerance: float = 0.0) -> Verdict:
    """Compares an answer with the expected one.

    Args:
        name: Of the exercise, to begin the line with.
        yours: The reader's answer; ``None`` or ``...`` stands for one not given yet.
        expected: A number, text, list, tuple, set, dict, or anything that compares with ``==``.
        tolerance: Largest relative error of a number (also inside a list) that still counts as right.

    Returns:
        A ``Verdict``; as the last expression of a cell it shows itself.
    """
    if yours is None or yours is ...:
        return Verdict(False, f"{name}: not yet: no answer so far")
    try:
        right = _same(yours, expected, tolerance)
    except Exception as error:  # whatever the reader's object does when compared, the notebook goes on
        return Verdict(False, f"{name}: not yet (your answer cannot be compared: {error})")
    if right:
        return Verdict(True, f"{name}: right, {_show(expected)}")
    return Verdict(False, f"{name}: not yet: yours is {_show(yours)}, expected {_show(expected)}")


def _same(yours: object, expected: object, tolerance: float) -> bool:
    if isinstance(expected, list | tuple):
        return len(yours) == len(expected) and all(
            _same(mine, theirs, tolerance) for mine, theirs in zip(yours, expected, strict=True)
        )
    if isinstance(expected, int | float) and not isinstance(expected, bool):
        return abs(float(yours) - expected) <= tolerance * abs(expected)
    equal = yours == expected
    if hasattr(equal, "all"):  # tensors and arrays; of another shape they would be stretched
        return getattr(yours, "shape", None) == getattr(expected, "shape", None) and bool(equal.all())
    return bool(equal)


def _show(value: object) -> str:
    try:
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value!r}"
    except Exception:  # an object whose repr fails, a number of thousands of digits
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."
