"""The encoder for XARES-LLM: (waves at 16 kHz, mask) -> (frames, mask).

CODECSSL_UPSTREAM=model python -m xares_llm.run codecssl.superb.suites.xares_llm.CodecSSLEncoder task1 task1
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from codecssl.pretrain.model.lengths import lengths_to_mask
from codecssl.superb.suites.wave_features import WaveFeatures


class CodecSSLEncoder(nn.Module):
    """An upstream as XARES-LLM takes it. Without arguments it comes from the environment (see `wave_features`)."""

    def __init__(self, upstream: str | None = None, layer: int | None = None) -> None:
        super().__init__()
        self.features = WaveFeatures(upstream, layer)
        self.output_dim = self.features.dim

    @torch.no_grad()
    def forward(self, audio: Tensor, audio_attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Waves [B, T] and 1 at their own samples, which come first -> [B, T', output_dim], and 1 at their own frames.

        Frames beyond a wave's own are zeros.
        """
        lengths = [audio.shape[1]] * len(audio)
        if audio_attention_mask is not None:
            lengths = audio_attention_mask.bool().sum(1).tolist()
        frames = self.features([wave[: max(1, length)] for wave, length in zip(audio, lengths)])
        padded = pad_sequence(frames, batch_first=True)
        mask = lengths_to_mask([len(one) for one in frames], padded.shape[1], padded.device)
        return padded, mask.long()
