"""`ChunkedStream`: the buffering shared by all streaming encoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ChunkedStream:
    """Base class of streaming encoders (`codec.StreamEncoder`). Collects samples and encodes them in fixed chunks.

    A subclass implements `encode_chunk` and stores the state that its network carries between chunks as attributes:

        class MyStream(ChunkedStream):
            def __init__(self, codec):
                super().__init__(codec, chunk=24_000)
                self.state = None

            def encode_chunk(self, audio, last):
                latents, self.state = self.codec.encoder(audio, self.state)
                return self.codec.quantize(latents)

        stream = MyStream(codec)
        codes = torch.cat([stream.push(first), stream.push(second), stream.finish()], dim=1)

    A chunk starts every `chunk` samples. It is encoded as soon as `needed` samples from its start have arrived. It is
    passed `size` samples: more than `chunk` if the network looks ahead. By default, size = chunk and needed = size.
    `finish` passes the remainder, fewer than `needed` samples, with `last=True`, or nothing if no samples remain. Chunk
    bounds therefore do not depend on how the wave is pushed. The last dimension of a pushed wave is time.
    """

    def __init__(self, codec: Any, *, chunk: int, needed: int | None = None, size: int | None = None) -> None:
        self.codec = codec
        self._chunk, self._size = chunk, size or chunk
        self._needed = needed or self._size
        self.pending: list[Tensor] = []
        """Samples that were pushed and are not encoded yet."""
        self.samples = 0
        """Number of pending samples."""

    @property
    def scales(self) -> Tensor | None:
        """None: only codecs that work in segments have scales."""
        return None

    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        """Encode the next samples [..., n] to the codes [R, t] that they complete. `last`: the wave ends here."""
        raise NotImplementedError

    def push(self, wave: Tensor) -> Tensor:
        """See `StreamEncoder`."""
        self.pending.append(wave.to(self.device, self.dtype))
        self.samples += wave.shape[-1]
        return self._joined(self._whole_chunks())

    def finish(self) -> Tensor:
        """See `StreamEncoder`."""
        if not self.samples:
            return self._joined(iter(()))
        rest, self.pending, self.samples = torch.cat(self.pending, dim=-1), [], 0
        return self._joined(iter([self.encode_chunk(rest, True)]))

    @property
    def device(self) -> torch.device:
        return torch.device(self.codec.device)

    @property
    def dtype(self) -> torch.dtype:
        """Type to which samples are converted."""
        return getattr(self.codec, "dtype", torch.float32)

    def _whole_chunks(self) -> Iterator[Tensor]:
        if self.samples < self._needed:
            return
        audio = torch.cat(self.pending, dim=-1)
        while audio.shape[-1] >= self._needed:
            yield self.encode_chunk(audio[..., : self._size], False)
            audio = audio[..., self._chunk :]
        self.pending, self.samples = [audio.clone()], audio.shape[-1]

    def _joined(self, codes: Iterator[Tensor]) -> Tensor:
        none = torch.zeros(self.codec.card.num_rows, 0, dtype=torch.int64, device=self.device)
        return torch.cat([none, *codes], dim=1)
