"""How far models with fewer layers are from the whole one: their predictions, compared from final hidden states."""

from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812

from lowvram_lab.weights.head import HEAD_TOKENS
from lowvram_lab.weights.layerwise import LayerByLayer


@torch.no_grad()
def divergences(
    stream: LayerByLayer, whole: torch.Tensor, others: Mapping[Hashable, torch.Tensor]
) -> dict[Hashable, float]:
    """Mean KL(whole || other) in nats a token, for each of several models that share norm and head.

    Args:
        stream: The model.
        whole: Its final states ``(windows, tokens, hidden)``, before the norm.
        others: The same of each other model, for the same tokens.
    """
    predict = stream.predictor()
    totals = dict.fromkeys(others, 0.0)
    pieces = {name: states.flatten(0, 1).split(HEAD_TOKENS) for name, states in others.items()}
    for at, states in enumerate(whole.flatten(0, 1).split(HEAD_TOKENS)):
        expected = predict(states)
        for name in others:
            totals[name] += F.kl_div(predict(pieces[name][at]), expected, reduction="sum", log_target=True).item()
    return {name: total / whole.shape[:-1].numel() for name, total in totals.items()}
