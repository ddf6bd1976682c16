"""Checkpoints of transformers (HuBERT, wav2vec 2.0, WavLM) as frozen upstreams.

s3prl's own `hf_hubert` and `hf_wav2vec2` pass a padded batch to the model. In a network with group normalisation (the
base models), the features of a wave then depend on the lengths of the others in its batch. The last frames of all but
the longest wave come from padding. Here the features of a wave do not depend on its batch, and equal those of s3prl for
that wave alone.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.pretrain.model.lengths import lengths_to_mask
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.superb.upstreams.frozen import FrozenUpstream
from codecssl.tokenize.common.errors import UserError

MODEL_TYPES = {"hubert": "HubertModel", "wav2vec2": "Wav2Vec2Model", "wavlm": "WavLMModel"}


class TransformersUpstream(FrozenUpstream):
    """An s3prl upstream of a transformers model with a convolutional front end.

    The L + 1 hidden states are those of transformers. State 0 is the input of the first layer with positions added. A
    post-norm model also normalises it, a pre-norm model does not. State i is the output of layer i with its residual.
    In a post-norm model it is taken after the layer's last norm. The last state of a pre-norm model is taken after the
    encoder's final norm.
    """

    def __init__(self, model: Any, extractor: Any) -> None:
        super().__init__(model)
        self.extractor = extractor
        config = model.config
        self.stride = int(torch.tensor(config.conv_stride).prod())
        self.least = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            self.least = (self.least - 1) * stride + kernel  # samples for one frame
        self.same_lengths = config.feat_extract_norm == "group"

    def get_downsample_rates(self, key: str) -> int:
        """Samples at 16 kHz per frame of hidden state."""
        return self.stride

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """1-D float waves at 16 kHz -> {"hidden_states": [[B, T, D], ...]}.

        A wave of n samples has ceil(n / stride) frames. As in s3prl, the last frame is repeated if the network gives
        fewer. Frames beyond are zeros.
        """
        self.frozen.eval()
        front = self._front([self._normalised(wav) for wav in wavs])
        frames = [len(x) for x in front]
        x = nn.utils.rnn.pad_sequence(front, batch_first=True)
        mask = lengths_to_mask(frames, x.shape[1], x.device)
        x = self.frozen.feature_projection(x)
        x = x[0] if isinstance(x, tuple) else x
        states = self.frozen.encoder(x, attention_mask=mask, output_hidden_states=True).hidden_states
        index = [self._index(len(wav), count) for wav, count in zip(wavs, frames, strict=True)]
        pad = nn.utils.rnn.pad_sequence
        return {"hidden_states": [pad([s[i, at] for i, at in enumerate(index)], batch_first=True) for s in states]}

    def _normalised(self, wav: Tensor) -> Tensor:
        """Scale the wave as the checkpoint's preprocessor_config requires, and pad it to at least one frame."""
        out = self.extractor(wav.detach().cpu().float().numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        wave = out.input_values[0].to(device=wav.device, dtype=next(self.frozen.parameters()).dtype)
        return nn.functional.pad(wave, (0, max(0, self.least - len(wave))))

    def _front(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Features before the encoder, [T, C] for each wave. Waves of one length run in one batch."""
        groups: dict[int, list[int]] = defaultdict(list)
        for i, wave in enumerate(waves):
            groups[len(wave) if self.same_lengths else 0].append(i)
        features: list[Any] = [None] * len(waves)
        for group in groups.values():
            batch = nn.utils.rnn.pad_sequence([waves[i] for i in group], batch_first=True)
            for i, x in zip(group, self.frozen.feature_extractor(batch).transpose(1, 2), strict=True):
                features[i] = x[: self._frames(len(waves[i]))]
        return features

    def _frames(self, samples: int) -> int:
        for kernel, stride in zip(self.frozen.config.conv_kernel, self.frozen.config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def _index(self, samples: int, frames: int) -> Tensor:
        return torch.arange(-(-samples // self.stride)).clamp(max=frames - 1)


def load(source: str) -> TransformersUpstream:
    """Load the upstream `hf:SOURCE`: a folder in the hub's format, or a NAME of the hub (from its cache if offline).

    Raises UserError for another kind of model, and if loading fails.
    """
    import transformers

    try:
        kind = transformers.AutoConfig.from_pretrained(source).model_type
        if kind not in MODEL_TYPES:
            raise UserError(f"upstream hf:{source}: a {kind}, give one of {', '.join(MODEL_TYPES)}")
        kind_of_model: Any = getattr(transformers, MODEL_TYPES[kind])
        model, found = kind_of_model.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(
            f"upstream hf:{source}: cannot be loaded ({(str(error).splitlines() or [''])[0][:160]}); give a folder "
            f"with config.json and weights, or `huggingface-cli download {source}`"
        ) from error
    if lacking := sorted(key for key in found["missing_keys"] if not key.endswith("masked_spec_embed")):
        raise UserError(f"upstream hf:{source}: lacks the weights {lacking[0]}; give the whole checkpoint")
    return TransformersUpstream(model.float(), _extractor(source))


def _extractor(source: str) -> Any:
    """Load the checkpoint's feature extractor. Without one, each wave is normalised, as s3prl does."""
    from transformers import Wav2Vec2FeatureExtractor

    try:
        return Wav2Vec2FeatureExtractor.from_pretrained(source)
    except (OSError, ValueError):
        return Wav2Vec2FeatureExtractor(do_normalize=True)


def is_checkpoint(path: str) -> bool:
    """True if the folder holds a transformers model of MODEL_TYPES."""
    try:
        return json.loads((Path(path) / "config.json").read_text()).get("model_type") in MODEL_TYPES
    except (OSError, ValueError, AttributeError):
        return False
