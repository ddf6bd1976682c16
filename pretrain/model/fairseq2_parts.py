"""The one door to fairseq2, and what this project takes from it.

fairseq2's native half (fairseq2n) links libsndfile.so.1. The soundfile wheel carries that library under
another name, so it is loaded here, with its symbols shared, before fairseq2 looks for it: no system package
is needed.
"""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import torch


def _preload_libsndfile() -> None:
    """Load soundfile's own libsndfile, if its wheel has one; else fairseq2n finds the system's."""
    spec = importlib.util.find_spec("_soundfile_data")
    if spec is None or not spec.submodule_search_locations:
        return
    for folder in spec.submodule_search_locations:
        for library in sorted(Path(folder).glob("libsndfile*.so*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


_preload_libsndfile()

import fairseq2n  # noqa: E402  (after the preload, which is the point of this file)
from fairseq2.data.data_pipeline import DataPipeline, DataPipelineError, read_sequence  # noqa: E402
from fairseq2.gang import create_fake_gangs  # noqa: E402
from fairseq2.models.transformer import (  # noqa: E402
    AttentionBiasCache,
    IdentityBias,
    StandardFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerEncoder,
    TransformerNormOrder,
)
from fairseq2.models.transformer.sdpa.torch import TorchSDPA  # noqa: E402
from fairseq2.models.wav2vec2.position_encoder import Wav2Vec2PositionEncoder  # noqa: E402
from fairseq2.nn import BatchLayout, Linear, RotaryEncoder, StandardLayerNorm  # noqa: E402
from fairseq2.nn.projection import init_bert_projection  # noqa: E402
from fairseq2.optim.lr_schedulers import PolynomialDecayLR, TriStageLR  # noqa: E402

NATIVE_DATA = not getattr(fairseq2n, "IS_STUB", False)
"""Whether fairseq2's native data pipeline works here; a stand-in fairseq2n has the layers only."""

__all__ = [
    "NATIVE_DATA",
    "AttentionBiasCache",
    "BatchLayout",
    "DataPipeline",
    "DataPipelineError",
    "IdentityBias",
    "Linear",
    "PolynomialDecayLR",
    "RotaryEncoder",
    "StandardFeedForwardNetwork",
    "StandardLayerNorm",
    "StandardMultiheadAttention",
    "StandardTransformerEncoder",
    "StandardTransformerEncoderLayer",
    "TorchSDPA",
    "TransformerEncoder",
    "TransformerNormOrder",
    "TriStageLR",
    "Wav2Vec2PositionEncoder",
    "init_bert_projection",
    "read_sequence",
    "unsharded",
]


def unsharded() -> dict[str, Any]:
    """What tells a module of fairseq2 that this process has all of it.

    A module that is not told asks fairseq2's registry, which imports every model that fairseq2 has, with transformers,
    pandas and s3fs: half of the time that a run needs to start.
    """
    return {"gangs": create_fake_gangs(torch.device("cpu")), "device": torch.get_default_device()}
