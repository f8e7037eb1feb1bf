"""What chance alone explains of a few passes and failures: Wilson's interval, and McNemar's exact test of pairs."""

import math

Z_95 = 1.959964
"""Standard deviations of a normal distribution's middle 95 %."""


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share, trials taken as independent; within 0 and 1 whatever the share.

    Args:
        share: Found, from 0 to 1.
        count: Trials, one or more.

    Returns:
        Its lower and its upper end.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    middle = share + Z_95**2 / (2 * count)
    margin = Z_95 * math.sqrt(share * (1 - share) / count + (Z_95 / (2 * count)) ** 2)
    low, high = ((middle + sign * margin) / (1 + Z_95**2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)  # rounding may lead out by a last bit


def mcnemar_p_value(lost: int, gained: int) -> float:
    """How often chance alone would turn pairs at least as one-sidedly, where either way is as likely: exact, two-sided.

    Args:
        lost: Pairs of which the other alone passes.
        gained: Pairs of which this one alone passes.

    Returns:
        The p-value, 1 where no pair differs.

    Source: McNemar 1947, doi:10.1007/BF02295996; its exact form is the sign test.
    """
    differing = lost + gained
    tail = sum(math.comb(differing, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**differing)
