"""Give an answer again that was given before, several tokens a pass, as far as the model still says the same.

Every token is the model's own: what is remembered is fed, and each token is compared with the likeliest behind those
before it. A stale answer costs the pass in which it goes wrong, and nothing after that.

Source: verification as in Leviathan et al. 2023, arXiv:2211.17192, of a draft that costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowvram_lab.decoding.decision import BOTH_PLANES, GUESS_OF_MEMORY, ONE_PLANE, Decision
from lowvram_lab.decoding.decode import Decoder
from lowvram_lab.decoding.speculate import Drafting, came_true
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.sampling import likeliest

KIND = "the answer remembered"
"""Whose tokens ``Drafting`` counts them as."""


class Replay:
    """Verifies a remembered answer.

    Args:
        decoder: Whose ``most_tokens`` is more than one.
        remembered: Ids of the answer; ids that the model does not have end it.
        drafting: Where to count.

    Attributes:
        ended: Whether the answer came to an end; else whoever asked goes on by other means.
    """

    def __init__(self, decoder: Decoder, remembered: list[int], drafting: Drafting):
        vocabulary, self.ended = loaded(decoder.model).plan.spec.vocab_size, False
        known = next((at for at, token in enumerate(remembered) if not 0 <= token < vocabulary), len(remembered))
        self._decoder, self._remembered, self._drafting = decoder, remembered[:known], drafting
        self._first_by = BOTH_PLANES if loaded(decoder.model).plan.low_planes() else ONE_PLANE

    @torch.no_grad()
    def tokens(self, ids: torch.Tensor, max_new_tokens: int, stop_ids: frozenset[int]) -> Iterator[int]:
        """The answer's tokens, greedily, until one is another than remembered, or no more are.

        Args:
            ids: ``(1, tokens)``, the part of the prompt that the cache has not seen.
            max_new_tokens: Stop after so many.
            stop_ids: Stop at one of these; it is not yielded.
        """
        cache, at = self._decoder.cache, 0
        found, by = [int(likeliest(self._decoder.prefill(ids))[0, 0])], self._first_by
        self.ended = max_new_tokens < 1
        if self.ended:
            return
        while True:
            for token in found:
                if token in stop_ids:
                    self.ended = True
                    return
                self._drafting.decisions.append(Decision(token, None, None, by))
                yield token
                by = GUESS_OF_MEMORY
            right = found == self._remembered[at : at + len(found)]
            at += len(found)
            if at == max_new_tokens:
                self.ended = True
                return
            if not right or at >= len(self._remembered):
                return
            most = min(self._decoder.most_tokens, max_new_tokens - at, cache.forgettable) - 1
            guess = self._remembered[at : at + max(most, 0)]
            before = cache.get_seq_length()
            try:
                logits = self._decoder.decode_several(torch.tensor([[found[-1], *guess]]))
                said = likeliest(logits)[:, 0].tolist()
            except BaseException:  # Ctrl-C too
                cache.keep(before)
                raise
            kept = came_true(guess, said)
            cache.keep(before + kept + 1)
            found = said[: kept + 1]
            self._note(len(guess), kept)

    def _note(self, proposed: int, accepted: int) -> None:
        self._drafting.passes += 1
        self._drafting.tokens += accepted + 1
        self._drafting.drafted[KIND] += proposed
        self._drafting.accepted[KIND] += accepted
