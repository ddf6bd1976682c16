"""All imports from fairseq2.

fairseq2's native part (fairseq2n) links libsndfile.so.1. The soundfile wheel contains that library under another name.
It is loaded here, with global symbols, before fairseq2 looks for it. No system package is needed.
"""

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import torch


def _preload_libsndfile() -> None:
    """Load soundfile's own libsndfile, if its wheel has one. Otherwise fairseq2n uses the system's."""
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
    StandardFeedForwardNetwork,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerEncoder,
    TransformerNormOrder,
)
from fairseq2.models.transformer.sdpa.base import SDPA  # noqa: E402
from fairseq2.models.wav2vec2.position_encoder import Wav2Vec2PositionEncoder  # noqa: E402
from fairseq2.nn import BatchLayout, Linear, RotaryEncoder, StandardLayerNorm  # noqa: E402
from fairseq2.nn.projection import init_bert_projection  # noqa: E402
from fairseq2.optim.lr_schedulers import PolynomialDecayLR, TriStageLR  # noqa: E402

NATIVE_DATA = not getattr(fairseq2n, "IS_STUB", False)
"""True if fairseq2's native data pipeline works. A stub of fairseq2n supports the layers only."""

__all__ = [
    "NATIVE_DATA",
    "SDPA",
    "AttentionBiasCache",
    "BatchLayout",
    "DataPipeline",
    "DataPipelineError",
    "Linear",
    "PolynomialDecayLR",
    "RotaryEncoder",
    "StandardFeedForwardNetwork",
    "StandardLayerNorm",
    "StandardMultiheadAttention",
    "StandardTransformerEncoder",
    "StandardTransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerNormOrder",
    "TriStageLR",
    "Wav2Vec2PositionEncoder",
    "init_bert_projection",
    "read_sequence",
    "unsharded",
]


def unsharded() -> dict[str, Any]:
    """Return the arguments that declare a fairseq2 module unsharded.

    Without them a module queries fairseq2's registry, which imports all models of fairseq2, with transformers, pandas
    and s3fs. These imports take half of the startup time of a run.
    """
    return {"gangs": create_fake_gangs(torch.device("cpu")), "device": torch.get_default_device()}
