"""Build upstreams from their parsed names."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from codecssl.superb.tokens.codec_at_16khz import encode
from codecssl.superb.tokens.token_cache import CachedCodec, TokenCache
from codecssl.superb.upstreams import s3prl_upstreams, spectral, transformers_upstreams
from codecssl.superb.upstreams.codec_upstream import CodecUpstream, CodeTables, frames_only
from codecssl.superb.upstreams.names import Upstream, is_model
from codecssl.tokenize.codec import Codec, CodecCard
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.registry import load_codec, load_codec_for

if TYPE_CHECKING:
    from codecssl.pretrain.config import ModelConfig

DEFAULT_CODEC = "tiny_16khz"  # codec of bare `codes` and `random` if no model is named with them
DEFAULT_CONFIG = "codec2vec_tiny_codes"  # architecture of that `random`
BUILD_SPECTRA: dict[str, Callable[[], nn.Module]] = {
    "fbank": lambda: s3prl_upstreams.fbank("fbank"),
    "logmel": spectral.LogMel,
    "mfcc": spectral.Mfcc,
}
"""The constructor of each of `SPECTRA` (superb/rows.py)."""


class UpstreamBuilder:
    """Build upstreams in one process.

    Upstreams with the same codec share its codes, and the codec runs once per wave. `code_folder`: folder of a token
    cache. The codec does not run on waves in this cache.
    """

    def __init__(self, *, device: str = "cpu", code_folder: Path | None = None, seed: int = 0) -> None:
        self.device = device
        self.code_folder = code_folder
        self.seed = seed
        self._codecs: dict[str, tuple[Codec, CachedCodec]] = {}

    def build(self, upstream: Upstream) -> nn.Module:
        """Build the upstream, frozen and on the device."""
        if make := BUILD_SPECTRA.get(upstream.kind):
            return make().to(self.device)
        if upstream.kind == "s3prl":
            return s3prl_upstreams.from_s3prl(upstream.argument or "").to(self.device)
        if upstream.kind == "hf":
            return transformers_upstreams.load(upstream.argument or "").to(self.device)
        card, encoder = self.encoder(upstream)
        if not upstream.runs_codec:
            return CodecUpstream(card, frames_only(card), encoder).to(self.device)
        _, codes = self._codec(card.fingerprint, lambda: load_codec_for(card, device=self.device))
        return CodecUpstream(card, codes, encoder).to(self.device)

    def build_unnormalised(self, upstream: Upstream) -> nn.Module:
        """Build the upstream, with fbank unnormalised.

        s3prl's normalisation makes the mean over time of every fbank utterance zero.
        """
        return (
            s3prl_upstreams.fbank("fbank_no_cmvn").to(self.device) if upstream.kind == "fbank" else self.build(upstream)
        )

    def encoder(self, upstream: Upstream) -> tuple[CodecCard, nn.Module]:
        """Build the encoder from codes to hidden states, for data that is already encoded."""
        from codecssl.pretrain.export.export import load_pretrained
        from codecssl.pretrain.model.model import untrained

        assert upstream.reads_codes
        if upstream.argument and is_model(upstream.argument):
            model = load_pretrained(upstream.argument)
            if upstream.kind == "model":
                return model.card, model
            if not upstream.runs_codec:
                return model.card, untrained(model.config, model.card, None, self.seed, model.mel_spec)
            codec, _ = self._codec(model.card.fingerprint, lambda: load_codec_for(model.card, device=self.device))
            return model.card, self._baseline(upstream.kind, codec, model.config, model.mel_spec)
        from codecssl.configs.load import load_config
        from codecssl.pretrain.config import RunConfig

        codec = load_codec(upstream.argument or DEFAULT_CODEC, device=self.device)
        codec, _ = self._codec(codec.card.fingerprint, lambda: codec)
        if upstream.kind == "model":
            return codec.card, codec.quantised  # type: ignore[attr-defined]  # task codec
        return codec.card, self._baseline(
            upstream.kind, codec, load_config(RunConfig, "pretrain", DEFAULT_CONFIG).model
        )

    def codec(self, upstream: Upstream) -> tuple[Codec, Callable[[], Codec]]:
        """Codec of an upstream that reads codes, and a function that loads it in another process."""
        from codecssl.pretrain.export.export import load_pretrained

        if upstream.argument and is_model(upstream.argument):
            load = functools.partial(load_codec_for, load_pretrained(upstream.argument).card, device=self.device)
        else:
            load = functools.partial(load_codec, upstream.argument or DEFAULT_CODEC, device=self.device)
        return load(), load

    def _baseline(self, kind: str, codec: Codec, config: "ModelConfig", mel: MelSpec | None = None) -> nn.Module:
        from codecssl.pretrain.build import first_tables
        from codecssl.pretrain.model.model import untrained

        if kind == "codes":
            return CodeTables([table.cpu() for table in codec.embeddings()])
        return untrained(config, codec.card, first_tables(config, codec), self.seed, mel)

    def _codec(self, fingerprint: str, load: Callable[[], Codec]) -> tuple[Codec, CachedCodec]:
        if fingerprint not in self._codecs:
            codec = load()
            stored = TokenCache(self.code_folder, codec.card) if self.code_folder else None
            self._codecs[fingerprint] = codec, CachedCodec(lambda wavs: encode(codec, wavs, self.device), stored)
        codec, codes = self._codecs[fingerprint]
        if codes.cache is not None:
            codes.cache.refresh()
        return codec, codes
