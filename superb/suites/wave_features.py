"""Frozen features of waves for evaluation suites, by any upstream of `codecssl-superb run`.

Suites construct their encoders without arguments. The upstream is then taken from the environment:

    CODECSSL_UPSTREAM   as in `codecssl-superb run --upstream`; by default laptop_16khz
    CODECSSL_LAYER      hidden state 0 to L (negative: from the last), or mean (of all; the default)
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from codecssl.superb.embed.states import LayerChoice, WaveStates
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import Upstream, parse
from codecssl.tokenize.common.errors import UserError

DEFAULT = "laptop_16khz"


def from_environment() -> tuple[str, int | None]:
    """Return the upstream's name and the layer, None for the mean. Raises UserError for another layer."""
    layer = os.environ.get("CODECSSL_LAYER", "mean")
    if layer != "mean" and not layer.lstrip("-").isdigit():
        raise UserError(f"CODECSSL_LAYER {layer}: give a number, or mean")
    return os.environ.get("CODECSSL_UPSTREAM", DEFAULT), None if layer == "mean" else int(layer)


class WaveFeatures(nn.Module):
    """Waves at 16 kHz to frames of one hidden state, or of the mean of all.

    A wave's frames do not depend on its batch. Waves longer than 30 s are cut into windows as in `codecssl-superb
    embed`. `to(device)` moves the encoder; the codec stays on the CPU, whose codes the encoder was trained on.
    """

    def __init__(self, upstream: str | Upstream | None = None, layer: int | None = None) -> None:
        super().__init__()
        given, chosen = (upstream, layer) if upstream is not None else from_environment()
        parsed = parse(given) if isinstance(given, str) else given
        self.upstream, self.layer = parsed, chosen
        self.expert = UpstreamBuilder().build_unnormalised(parsed)
        self.register_buffer("place", torch.zeros(0), persistent=False)  # its device is the module's
        options = {"window_seconds": 30.0, "overlap_seconds": 1.0}
        self._states = WaveStates(self.expert, LayerChoice(chosen), "cpu", **options)
        self.hop = self._states.shift
        """Samples at 16 kHz per frame."""
        try:
            self.dim = int(self._states.batch([np.zeros(SAMPLE_RATE, np.float32)])[0].shape[1])
        except IndexError:
            raise UserError(f"layer {chosen}: {parsed.name} has fewer hidden states") from None

    def forward(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """1-D float waves at 16 kHz of any lengths -> float32 frames [T_i, D] of each, on the module's device."""
        device = self.get_buffer("place").device
        self._states.device = str(device)
        arrays = [wave.detach().float().cpu().numpy() for wave in waves]
        limit = self._states.window + self._states.overlap
        short = [index for index, wave in enumerate(arrays) if len(wave) <= limit]
        found = dict(zip(short, self._states.batch([arrays[i] for i in short]) if short else []))
        for index in set(range(len(arrays))) - set(short):
            found[index] = np.concatenate(list(self._states.windows([arrays[index]])))
        return [torch.from_numpy(found[index]).to(device) for index in range(len(arrays))]
