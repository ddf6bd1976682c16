"""Token shards through an upstream: no codec and no audio is needed."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import Upstream
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards


class TokenReader:
    """Hidden states of utterances of token shards.

    Raises UserError for an upstream that reads audio, of another codec, or of a log-mel plane that the shards lack.
    """

    def __init__(self, builder: UpstreamBuilder, upstream: Upstream, shards: Shards) -> None:
        if not upstream.reads_codes:
            raise UserError(f"upstream {upstream.name}: reads audio, and {shards.path} holds codes; give the audio")
        card, encoder = builder.encoder(upstream)
        theirs = shards.card
        if (card.weights_sha256, card.codebook_sizes) != (theirs.weights_sha256, theirs.codebook_sizes):
            where = card.difference(theirs)
            raise UserError(f"upstream {upstream.name}: its codec is not the one of {shards.path} ({where})")
        self.encoder: Any = encoder.to(builder.device).eval()
        self._mel_spec = getattr(encoder, "mel_spec", None)
        if self._mel_spec not in (None, shards.mel_spec):
            raise UserError(f"upstream {upstream.name}: reads a log-mel plane that {shards.path} does not have")
        self._shards, self._device = shards, builder.device

    @torch.no_grad()
    def states(self, index: int, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """L + 1 hidden states [T, D] of frames start..stop of an utterance, encoded alone."""
        codes = self._shards.codes(index, start=start, stop=stop).astype(np.int64)
        inputs = [torch.from_numpy(codes)[None].to(self._device), [codes.shape[1]]]
        if self._mel_spec is not None:
            mel = self._shards.mel(index, start=start, stop=stop)
            inputs.append(torch.from_numpy(mel.T.copy())[None].to(self._device))
        return [layer[0] for layer in self.encoder.extract(*inputs)]
