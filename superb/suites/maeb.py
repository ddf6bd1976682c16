"""The encoder for MAEB, the audio part of MTEB (package `mteb`): one embedding a clip, the mean of its frames.

import mteb
from codecssl.superb.suites.maeb import load

mteb.evaluate(load("model"), mteb.get_tasks(modalities=["audio"], task_types=["AudioClassification"]))
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.modality_collators import AudioCollator
from numpy.typing import NDArray

from codecssl.superb.suites.wave_features import WaveFeatures, from_environment
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.superb.upstreams.names import Upstream
from codecssl.tokenize.common.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class CodecSSLAudio(AbsEncoder):
    """An upstream as MTEB takes it. `model_name` is its name in MTEB, `upstream` and `layer` choose the features."""

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        upstream: str | Upstream | None = None,
        layer: int | None = None,
        **options: Any,
    ) -> None:
        self.model = WaveFeatures(upstream, layer).to(device or "cpu")

    @torch.no_grad()
    def encode(
        self,
        inputs: "DataLoader[Any]",
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> NDArray[np.float32]:
        """Embeddings [N, D] of a loader's `audio` column. Raises UserError for data without one."""
        if "audio" not in inputs.dataset.features:  # type: ignore[attr-defined]
            raise UserError(f"MTEB task {task_metadata.name}: has no audio; choose tasks with modality audio")
        inputs.collate_fn = AudioCollator(target_sampling_rate=SAMPLE_RATE)
        found = []
        for batch in inputs:
            waves = [torch.from_numpy(np.asarray(clip["array"], np.float32)) for clip in batch["audio"]]
            found += self.embed(waves)
        return np.stack(found)

    def embed(self, waves: Sequence[torch.Tensor]) -> list[NDArray[np.float32]]:
        """1-D waves at 16 kHz -> the mean over frames of each, [D]."""
        return [frames.double().mean(0).float().cpu().numpy() for frames in self.model(waves)]


def model_meta(upstream: str | None = None, layer: int | None = None) -> ModelMeta:
    """Build MTEB's description of an upstream, by default the one that the environment names."""
    if upstream is None:
        upstream, layer = from_environment()
    features = WaveFeatures(upstream, layer)
    frozen = getattr(features.expert, "frozen", features.expert)
    parameters = sum(p.numel() for p in frozen.parameters())
    state = "mean" if layer is None else f"layer{layer}"
    return ModelMeta(
        loader=CodecSSLAudio,  # type: ignore[arg-type]  # its description is set by MTEB
        loader_kwargs={"upstream": upstream, "layer": layer},
        name=f"codecssl/{upstream.rstrip('/').rpartition('/')[2].replace(':', '-')}-{state}",
        revision=None,
        release_date=None,
        languages=None,
        n_parameters=parameters,
        n_embedding_parameters=0,
        memory_usage_mb=4 * parameters / 2**20,
        max_tokens=None,
        embed_dim=features.dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name="cosine",  # type: ignore[arg-type]
        use_instructions=False,
        training_datasets=None,
        modalities=["audio"],
    )


def load(upstream: str | None = None, layer: int | None = None) -> CodecSSLAudio:
    """Load an upstream with its description, as `mteb.evaluate` takes it."""
    meta = model_meta(upstream, layer)
    model = CodecSSLAudio(meta.name or "", None, **meta.loader_kwargs)
    model.mteb_model_meta = meta
    return model
