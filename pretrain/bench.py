"""`codecssl-pretrain bench`: a training step of codecssl, without DeepSpeed, and of a waveform HuBERT.

The HuBERT has the same encoder. All variants process the same seconds of audio with the same masked frames. They run
alternately in one process. The fastest of several steps is reported.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codecssl.pretrain.build import build_objective
from codecssl.pretrain.config import ModelConfig, RunConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.data.random_batch import random_batch
from codecssl.pretrain.engine.distributed import join_ranks
from codecssl.pretrain.engine.engine import after_update, backward, start_engine, take_step
from codecssl.pretrain.engine.optimizer import make_optimizer, uncompiled
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.monitor.telemetry import machine_row
from codecssl.pretrain.objectives.objective import Objective
from codecssl.pretrain.ranks import Ranks
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.shards import Shards

HUBERT_CLASSES = 504
HUBERT_RATE, HUBERT_HOP = 16_000, 320
_LABEL_CLASSES = 500

SYNTHETIC = CodecCard(
    name="synthetic",
    weights="none",
    weights_sha256="0" * 64,
    sample_rate=16_000,
    hop_length=320,
    codebook_sizes=(1024,) * 12,
    codes_per_frame=(1,) * 12,
    latent_dim=1024,
)
"""Card of DAC at 16 kHz: 12 codebooks of 1,024 entries, 50 frames per second."""


def bench(
    config: RunConfig, *, seconds: float = 30.0, clip_seconds: float = 15.0, steps: int = 3, hubert: bool = True
) -> Iterator[dict[str, Any]]:
    """Yield one row per variant: seconds per step, hours of audio per hour, TFLOP/s.

    If the config has data, the last rows are the speed of the loader and the processor time of first reads, which
    compare codes and log-mel planes with their CRC-32. seconds: audio in one step, in clips of
    `clip_seconds`. Codes are random because the speed of an encoder does not depend on them. Raises UserError for clips
    longer than the step.
    """
    if not 0 < clip_seconds <= seconds:
        raise UserError(f"--clip-seconds {clip_seconds}: must be above 0 and at most --seconds ({seconds})")
    group = join_ranks()
    card = _card(config)
    config = at_frame_rate(config, card.frame_rate)
    batch = make_batch(config, card, seconds, clip_seconds).to(group.device)
    ways: dict[str, Callable[[], None]] = {"DeepSpeed": _deepspeed(config, card, batch)}
    objective = make_objective(config, card)
    ways["plain loop, no DeepSpeed"] = _plain(objective, batch, config, group.device)
    if hubert:
        ways["waveform HuBERT, same encoder"] = torch_step(
            *hubert_step(config, batch, clip_seconds, group.device), config, group.device
        )
    best = in_turns(ways, steps)
    frames = sum(batch.frames)
    flops = objective.flops(batch)
    audio = frames / float(card.frame_rate)
    for name, took in best.items():
        row = {"what": name, "step_seconds": took, "audio_hours_per_hour": audio / took}
        if "HuBERT" in name:
            row["times_slower_than_ours"] = took / best["DeepSpeed"]
        else:
            row |= {"frames_per_second": frames / took} | machine_row(flops / took, config.engine.precision)
        yield row
    if config.data.dirs:
        yield _loader(config, best["DeepSpeed"] / frames)
        yield _first_touch(config, best["DeepSpeed"] / frames)


def _card(config: RunConfig) -> CodecCard:
    """Card of the data's codec, or of DAC if the config has no data."""
    if not config.data.dirs:
        kept = config.data.num_codebooks or SYNTHETIC.num_codebooks
        return replace(SYNTHETIC, codebook_sizes=(1024,) * kept, codes_per_frame=(1,) * kept)
    from codecssl.pretrain.data.corpus import TokenCorpus

    return TokenCorpus(config.data.dirs, num_codebooks=config.data.num_codebooks).card


def _mel(config: RunConfig, card: CodecCard) -> MelSpec | None:
    """Specification of the log-mel plane that the model reads, with 80 bands."""
    return None if config.model.input == "codes" else MelSpec.for_codec(80, card)


def make_batch(config: RunConfig, card: CodecCard, seconds: float, clip_seconds: float) -> Batch:
    """Build a batch of random codes and labels with the config's masking."""
    clips, frames = max(1, round(seconds / clip_seconds)), int(clip_seconds * card.frame_rate)
    return random_batch(config, card, clips, frames, label_sizes=(_LABEL_CLASSES,), mel=_mel(config, card))


def step_cpu_seconds(config: RunConfig, steps: int = 5) -> float:
    """Return the processor time of one DeepSpeed step on a whole batch of the config's longest crops, seconds."""
    join_ranks()
    card, rate = _card(config), float(_card(config).frame_rate)
    config = at_frame_rate(config, rate)
    batch = make_batch(config, card, config.data.batch_frames / rate, config.data.crop_frames / rate)
    step = _deepspeed(config, card, batch)
    step()
    began = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - began) / steps


def in_turns(ways: Mapping[str, Callable[[], None]], steps: int) -> dict[str, float]:
    """Return the fastest of `steps` runs of each variant, in seconds, after a warm-up.

    The variants alternate, which spreads the effect of other load on the machine evenly.
    """
    best: dict[str, float] = {}
    for turn in range(steps + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - began)
    return best


# ---------------------------------------------------------------- the ways


def make_objective(config: RunConfig, card: CodecCard) -> Objective:
    model = untrained(config.model, card, None, config.seed, _mel(config, card))
    return build_objective(config, model, (_LABEL_CLASSES,)).train()


def _deepspeed(config: RunConfig, card: CodecCard, batch: Batch) -> Callable[[], None]:
    one = replace(config, engine=replace(config.engine, accumulation=1))
    engine = start_engine(make_objective(config, card), one)

    def step() -> None:
        backward(engine, engine(batch).total)
        take_step(engine, want_norm=False)
        after_update(engine, 1)

    return step


def _plain(objective: Objective, batch: Batch, config: RunConfig, device: torch.device) -> Callable[[], None]:
    objective = objective.to(device)
    objective.place(device)
    update = torch_step(objective, lambda: objective(batch).total, config, device)

    def step() -> None:
        update()
        objective.after_update(1)

    return step


def torch_step(
    module: nn.Module, loss: Callable[[], Tensor], config: RunConfig, device: torch.device
) -> Callable[[], None]:
    """Build a training step in plain torch. bf16 uses autocast, as is usual without DeepSpeed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(module, config.optim)
    half = config.engine.precision == "bf16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            value = loss()
        value.backward()
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, config.optim.clip_norm)
        with uncompiled(config.optim):
            optimizer.step()
        optimizer.zero_grad()

    return step


def hubert_step(
    config: RunConfig, batch: Batch, clip_seconds: float, device: torch.device, *, conv_dim: int = 512
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return transformers' HuBERT on audio samples, and its loss.

    It has a convolutional front end, the same encoder, and cross-entropy over 504 classes at masked frames.
    """
    model, hubert = config.model, hubert_model(config.model, conv_dim=conv_dim)
    both = nn.ModuleList([hubert, nn.Linear(model.dim, HUBERT_CLASSES)]).to(device).train()
    clips = len(batch.frames)
    waves = torch.randn(clips, int(clip_seconds * HUBERT_RATE), device=device)
    frames = int(hubert._get_feat_extract_output_lengths(waves.shape[1]))
    own = batch.mask.unflatten(0, (clips, -1))
    mask = own[:, np.linspace(0, own.shape[1] - 1, frames).round().astype(int)]  # the same frames, at HuBERT's rate
    labels = torch.randint(0, HUBERT_CLASSES, (int(mask.sum()),), device=device)

    def loss() -> Tensor:
        hidden = both[0](waves, mask_time_indices=mask).last_hidden_state
        return torch.nn.functional.cross_entropy(both[1](hidden[mask]).float(), labels)

    return both, loss


def hubert_model(model: ModelConfig, *, conv_dim: int = 512) -> Any:
    """Build an untrained `transformers.HubertModel` with this encoder. conv_dim: channels of the front end."""
    from transformers import HubertConfig, HubertModel

    return HubertModel(
        HubertConfig(
            hidden_size=model.dim,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            intermediate_size=model.ffn_dim,
            conv_dim=(conv_dim,) * 7,
            do_stable_layer_norm=model.norm == "pre",
            hidden_dropout=model.dropout,
            attention_dropout=model.attention_dropout,
            activation_dropout=model.activation_dropout,
            feat_proj_dropout=model.input_dropout,
            layerdrop=model.layerdrop,
            attn_implementation="sdpa",
        )
    )


def _loader(config: RunConfig, seconds_per_frame: float) -> dict[str, Any]:
    """Measure the speed of the loader relative to that of the model."""
    train, _, _ = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))
    steps = train.steps(0, 20, workers=config.data.workers, prefetch=config.data.prefetch)
    next(steps)
    began, frames = time.perf_counter(), 0
    for parts in steps:
        frames += sum(sum(part.frames) for part in parts)
    took = time.perf_counter() - began
    return {
        "what": "loader alone",
        "frames_per_second": frames / took,
        "times_what_the_model_takes": frames / took * seconds_per_frame,
    }


def _first_touch(config: RunConfig, seconds_per_frame: float) -> dict[str, Any]:
    """Measure the checks of the first reads of all data, per frame, relative to the model's time."""
    with_mel = config.model.input != "codes"
    frames, took = 0, 0.0
    for path in config.data.dirs:
        shards = Shards(path, remote=True)
        first, again = (_reads(shards, with_mel) for _ in range(2))
        frames, took = frames + int(shards.frames.sum(dtype=np.int64)), took + max(0.0, first - again)
    return {
        "what": "checksums of first reads",
        "frames_per_second": frames / max(took, 1e-9),
        "percent_of_a_step": 100 * took / frames / seconds_per_frame,
    }


def _reads(shards: Shards, with_mel: bool) -> float:
    """Return the processor time, in seconds, of reads of no frame, one a block and, of a plane, one an utterance."""
    began = time.process_time()
    for index in shards.blocks["first"].tolist():
        shards.codes(index, stop=0)
    for index in range(len(shards) if with_mel else 0):
        shards.mel(index, stop=0)
    return time.process_time() - began


def table(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Format the rows as lines of a table."""
    units = {
        "step_seconds": "{:.3f} s/step",
        "audio_hours_per_hour": "{:.1f} h/h",
        "frames_per_second": "{:.0f} frames/s",
        "tflops": "{:.3f} TFLOP/s",
        "mfu_percent": "MFU {:.1f} %",
        "memory_gib": "{:.2f} GiB",
        "times_slower_than_ours": "{:.2f} x ours",
        "times_what_the_model_takes": "{:.0f} x what the model takes",
        "percent_of_a_step": "{:.3f} % of a step",
    }
    for row in rows:
        yield f"{row['what']:<32}" + ", ".join(text.format(row[key]) for key, text in units.items() if key in row)
