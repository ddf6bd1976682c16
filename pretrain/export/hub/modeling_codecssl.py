"""An encoder of neural-codec tokens, pretrained with codecssl. It needs torch and transformers only.

    from transformers import AutoFeatureExtractor, AutoModel

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()
    extractor = AutoFeatureExtractor.from_pretrained(FOLDER, trust_remote_code=True)
    output = model(**extractor([codes, other]), output_hidden_states=True)  # codes: int [K, T]

`model.config.codec` describes the codec whose codes the model reads. `model.config.input` is codes, mel (a log-mel
plane that the extractor computes from waves), or both.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BatchFeature, FeatureExtractionMixin, PretrainedConfig, PreTrainedModel
from transformers.audio_utils import mel_filter_bank
from transformers.modeling_outputs import BaseModelOutput


class CodecSSLConfig(PretrainedConfig):
    """Shape of the encoder, and what it reads.

    codebook_sizes: entries of the codebook of each row of the codes. codec: fields that identify the codec. mel: fields
    of the log-mel plane, or None.
    """

    model_type = "codecssl"

    def __init__(
        self,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        norm="post",
        positions="conv",
        input="codes",
        fusion="sum",
        tie_ffn=False,
        conv_kernel=128,
        conv_groups=16,
        max_frames=30000,
        embedding_dim=128,
        codebook_sizes=(1024,),
        codec=None,
        mel=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.norm = norm
        self.positions = positions
        self.input = input
        self.fusion = fusion
        self.tie_ffn = tie_ffn
        self.conv_kernel = conv_kernel
        self.conv_groups = conv_groups
        self.max_frames = max_frames
        self.embedding_dim = embedding_dim
        self.codebook_sizes = list(codebook_sizes)
        self.codec = codec
        self.mel = mel


class CodecSSLFeatureExtractor(FeatureExtractionMixin):
    """Pads codes [K, T] of several utterances to a batch, and computes the log-mel plane of models that read one."""

    model_input_names = ("audio_codes", "attention_mask")

    def __init__(self, codebook_sizes=(1024,), input="codes", mel=None, codec=None, **kwargs):
        super().__init__(**kwargs)
        self.codebook_sizes = list(codebook_sizes)
        self.input = input
        self.mel = mel
        self.codec = codec

    def __call__(self, codes=None, mel=None, raw_speech=None, sampling_rate=None, return_tensors="pt", **kwargs):
        """Return audio_codes int64 [B, K, T], attention_mask [B, T], and mel uint8 [B, bands, T].

        codes: one array [K, T], or a list. raw_speech: one mono wave [n], or a list, at the codec's rate; the log-mel
        plane is computed from it. mel: the planes [bands, T] instead. Raises ValueError for input that does not fit.
        """
        if self.input != "codes" and mel is None:
            if raw_speech is None:
                raise ValueError("this model reads a log-mel plane: give raw_speech, or mel [bands, T]")
            mel = [self.log_mel(wave, sampling_rate) for wave in _listed(raw_speech, 1)]
        planes = None if mel is None or self.input == "codes" else [_array(one) for one in _listed(mel, 2)]
        if self.input == "mel":
            codes = [np.zeros((len(self.codebook_sizes), plane.shape[1]), np.int64) for plane in planes]
        elif codes is None:
            raise ValueError(f"this model reads codes: give int [{len(self.codebook_sizes)}, T] of each utterance")
        codes = [self._checked(_array(one)) for one in _listed(codes, 2)]
        lengths = [one.shape[1] for one in codes]
        if planes is not None and [plane.shape[1] for plane in planes] != lengths:
            raise ValueError(f"mel: {[plane.shape[1] for plane in planes]} frames, the codes have {lengths}")
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        data = {"audio_codes": _padded(codes, np.int64), "attention_mask": mask.astype(np.int64)}
        if planes is not None:
            data["mel"] = _padded(planes, np.uint8)
        return BatchFeature(data, tensor_type=return_tensors)

    def log_mel(self, wave, sampling_rate):
        """Return the log-mel plane uint8 [bands, T] of a mono wave [n]; a step is (high - low) / 255 of log10 power."""
        spec = self.mel
        if sampling_rate != spec["sample_rate"]:
            raise ValueError(f"sampling_rate {sampling_rate}: must be {spec['sample_rate']}; resample the wave")
        if spec["segment_samples"]:
            raise ValueError(
                f"mel: {self.codec['name']} has overlapping segments; give the planes of codecssl-tokenize"
            )
        wave = _array(wave).astype(np.float32)
        if wave.ndim != 1 or not len(wave) or not np.isfinite(wave).all():
            raise ValueError(f"raw_speech: shape {wave.shape}, must be finite mono samples [n]")
        hop, window = spec["hop_length"], spec["window"]
        frames, margin = -(-len(wave) // hop), (window - hop) // 2
        wave = np.pad(wave, (margin, frames * hop + window - len(wave)))
        windows = np.lib.stride_tricks.sliding_window_view(wave, window)[: frames * hop : hop]
        hann = np.hanning(window + 1)[:-1]
        spectrum = np.fft.rfft(windows * hann, spec["fft"], axis=1)
        bank = self._filters().T
        band, bins = np.nonzero(bank)
        weighted = (spectrum.real**2 + spectrum.imag**2)[:, bins] * (bank[band, bins] / (hann.sum() / 2) ** 2)
        power = np.add.reduceat(weighted, np.searchsorted(band, np.arange(spec["bands"])), axis=1)
        scaled = (np.log10(np.maximum(power, 1e-30)) - spec["low"]) / (spec["high"] - spec["low"]) * 255.0
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8).T

    def _filters(self):
        """Triangular filters of height 1, evenly spaced on the plane's mel scale, [fft // 2 + 1, bands]."""
        spec = self.mel
        return mel_filter_bank(
            num_frequency_bins=spec["fft"] // 2 + 1,
            num_mel_filters=spec["bands"],
            min_frequency=spec["low_hz"],
            max_frequency=spec["high_hz"],
            sampling_rate=spec["sample_rate"],
            mel_scale=spec.get("scale", "htk"),
        )

    def _checked(self, codes):
        rows = len(self.codebook_sizes)
        if codes.ndim != 2 or codes.shape[0] != rows or not codes.shape[1] or codes.dtype.kind not in "iu":
            raise ValueError(f"codes: {codes.dtype} {codes.shape}, must be integers [{rows}, T] with T at least 1")
        if codes.min() < 0 or (codes.max(1) >= np.array(self.codebook_sizes)).any():
            raise ValueError(f"codes: from {codes.min()} to {codes.max()}, must be below {self.codebook_sizes}")
        return codes


def _array(values):
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _listed(values, dims):
    """One item of `dims` dimensions, or several, as a list."""
    alone = isinstance(values, (np.ndarray, torch.Tensor)) and values.ndim == dims
    items = [values] if alone else list(values)
    if not items:
        raise ValueError("an empty batch; give at least one utterance")
    return items


def _padded(arrays, dtype):
    batch = np.zeros((len(arrays), arrays[0].shape[0], max(one.shape[1] for one in arrays)), dtype)
    for row, one in zip(batch, arrays):
        row[:, : one.shape[1]] = one
    return batch


class CodecSSLModel(PreTrainedModel):
    """The encoder. Its hidden states are the input of the first layer, then each layer's output."""

    config_class = CodecSSLConfig
    base_model_prefix = "codecssl"
    main_input_name = "audio_codes"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        dim = config.hidden_size
        part = dim // 2 if config.fusion == "concat" else dim
        if config.input != "mel":
            # The last row is zero: it stands for dropped codebooks in training.
            self.embedding = nn.Embedding(sum(config.codebook_sizes) + 1, config.embedding_dim)
            self.input_norm = nn.LayerNorm(config.embedding_dim)
            self.projection = nn.Linear(config.embedding_dim, part)
        if config.input != "codes":
            self.mel_projection = nn.Linear(config.mel["bands"], part)
        self.mask_vector = nn.Parameter(torch.zeros(dim))
        if config.positions == "conv":
            kernel, groups = config.conv_kernel, config.conv_groups
            self.position_conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=groups)
        if config.positions == "sinusoidal":
            self.position_scale = nn.Parameter(torch.ones(1))
        if config.norm == "post":
            self.encoder_norm = nn.LayerNorm(dim)
        owners = 1 if config.tie_ffn and config.norm == "residual" else config.num_hidden_layers
        self.layers = nn.ModuleList(CodecSSLLayer(config, owns_ffn=i < owners) for i in range(config.num_hidden_layers))
        if config.norm != "post":
            self.final_norm = nn.LayerNorm(dim)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
            module.weight.data.normal_(0.0, 0.02)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(1.0)
            module.bias.data.zero_()

    def forward(
        self,
        audio_codes=None,
        attention_mask=None,
        mel=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Compute hidden states [B, T, D].

        audio_codes: int64 [B, K, T]. attention_mask: [B, T], 1 at each utterance's own frames, which come first. mel:
        uint8 [B, bands, T]. Values beyond an utterance's frames are undefined.
        """
        config = self.config
        given = mel if config.input == "mel" else audio_codes
        if given is None or (config.input != "codes" and mel is None):
            raise ValueError(f"this model reads {config.input}: give audio_codes [B, K, T], mel [B, bands, T], or both")
        if config.positions == "rotary" and given.shape[2] > config.max_frames:
            raise ValueError(f"input: {given.shape[2]} frames, at most {config.max_frames}; cut it")
        mask = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        states = self._positioned(self._embedded(audio_codes, mel), mask)
        if config.norm == "post":
            states = self.encoder_norm(states)
        rotation = self._rotation(states) if config.positions == "rotary" else None
        hidden = [states]
        residual = states
        for layer in self.layers:
            ffn = self.layers[0].ffn if layer.ffn is None else layer.ffn
            states, residual = layer(states, residual, mask, rotation, ffn)
            hidden.append(states)
        if config.norm == "pre":
            states = self.final_norm(states)
        elif config.norm == "residual":
            states = states + self.final_norm(residual)
        hidden[-1] = states
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = BaseModelOutput(last_hidden_state=states, hidden_states=tuple(hidden) if wanted else None)
        return output if (config.use_return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _embedded(self, codes, mel):
        dtype = self.mask_vector.dtype
        parts = []
        if self.config.input != "mel":
            offsets = torch.tensor([0, *self.config.codebook_sizes[:-1]], device=codes.device).cumsum(0)
            summed = self.embedding(codes + offsets[:, None]).sum(dim=1)
            parts.append(self.projection(self.input_norm(summed)))
        if self.config.input != "codes":
            # Stored values of speech have a mean of about 80 and a deviation of about 48.
            parts.append(self.mel_projection(((mel.transpose(1, 2).float() - 80.0) / 48.0).to(dtype)))
        return torch.cat(parts, dim=2) if self.config.fusion == "concat" else sum(parts)

    def _positioned(self, x, mask):
        if self.config.positions == "conv":
            if mask is not None:
                x = x * mask[:, :, None].to(x.dtype)
            found = self.position_conv(x.transpose(1, 2))[:, :, : x.shape[1]]
            return x + F.gelu(found).transpose(1, 2)
        if self.config.positions == "sinusoidal":
            dim = x.shape[2]
            rates = torch.exp(torch.arange(0, dim, 2, device=x.device) * (-np.log(10_000.0) / dim))
            angles = torch.arange(x.shape[1], device=x.device)[:, None] * rates
            waves = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim]
            return x + self.position_scale * waves.to(x.dtype)
        return x

    def _rotation(self, x):
        """Cosines and sines, each [T, head_dim / 2], of rotary position embeddings."""
        width = self.config.hidden_size // self.config.num_attention_heads
        rates = 1.0 / 10_000.0 ** (torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=torch.float32), rates)
        return angles.cos(), angles.sin()


class CodecSSLLayer(nn.Module):
    """Self-attention and feed-forward, with norms after (post), before (pre), or as in ResiDual (residual)."""

    def __init__(self, config, owns_ffn):
        super().__init__()
        dim = config.hidden_size
        self.norm, self.heads = config.norm, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = CodecSSLFeedForward(config) if owns_ffn else None

    def forward(self, x, residual, mask, rotation, ffn):
        """Return the layer's output [B, T, D] and the sum of the blocks without norms, which ResiDual keeps."""
        if self.norm == "pre":
            x = x + self._attention(self.attention_norm(x), mask, rotation)
            return x + ffn(self.ffn_norm(x)), residual
        attended = self._attention(x, mask, rotation)
        x = self.attention_norm(x + attended)
        changed = ffn(x)
        return self.ffn_norm(x + changed), residual + attended + changed

    def _attention(self, x, mask, rotation):
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        keys = None if mask is None else mask[:, None, None, :]
        return self.output_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2))


class CodecSSLFeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.inner_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = F.gelu if config.hidden_act == "gelu" else F.relu

    def forward(self, x):
        return self.output_proj(self.activation(self.inner_proj(x)))


def _rotated(x, cosine, sine):
    """Rotate each pair of neighbouring features of x [B, H, T, head_dim] by its frame's angle."""
    even, odd = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).type_as(x)
