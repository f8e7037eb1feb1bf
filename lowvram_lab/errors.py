"""The errors a user can cause or meet. Each message says what was expected, what was found, and what to do."""


class LowvramError(Exception):
    """Base of every error this library raises on purpose. The command line prints it as one line and exits 2."""


class UnitError(LowvramError, ValueError):
    """A byte count that cannot be read, or that reads as something its writer can hardly have meant."""


class SourceError(LowvramError):
    """A model that cannot be found, fetched, or trusted (pickled weights, remote code, a wrong hash)."""


class CheckpointError(LowvramError):
    """Weights or a config that were found but are damaged, truncated, or do not belong to the model."""


class PlanError(LowvramError, ValueError):
    """A plan that does not fit its model, or asks for something no kernel here can do. Names the module."""


class BudgetError(LowvramError):
    """A byte budget too small for what was asked. Says what is short and what would help."""


def first_line(error: object) -> str:
    """The first line of what an error, or any value, says of itself; of one that says nothing, its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
