"""The data of a run: its corpus, the held-out utterances, and the loaders of training and validation."""

from dataclasses import replace

import numpy as np

from codecssl.pretrain.config import DataConfig, RunConfig
from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.data.hashed_random import hashed
from codecssl.pretrain.data.loader import Loader
from codecssl.pretrain.data.plan import Ints, Plan, UtterancePool, is_held_out
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.pretrain.ranks import Ranks
from codecssl.tokenize.common.errors import UserError

_VALID = 201  # a stream of random numbers
_CHUNK = 1 << 17


def open_data(config: RunConfig, ranks: Ranks) -> tuple[Loader, Loader | None, TokenCorpus]:
    """Return the training loader, the validation loader (None if nothing is held out), and the validation corpus.

    Lengths in seconds are converted at the frame rate of the data's codec.
    """
    data = config.data
    labels = data.labels if config.objective.target == "labels" else ()
    if config.objective.target == "labels" and not labels:
        raise UserError("data.labels: none given for objective.target labels; make some with codecssl-pretrain label")
    corpus = TokenCorpus(
        data.dirs, num_codebooks=data.num_codebooks, labels=labels, retry_seconds=config.log.retry_seconds
    )
    config = at_frame_rate(config, corpus.card.frame_rate)
    data = config.data
    with_mel = corpus.require_mel(config.model.input) is not None
    other, held_out = _validation(config, corpus)
    pool = UtterancePool(
        corpus.frames,
        first=corpus.first.tolist(),
        weights=_weights(data, len(corpus.first) - 1),
        min_frames=data.min_frames,
        held_out=0.0 if data.valid_dirs else data.valid_fraction,
    )
    parts = ranks.world_size * config.engine.accumulation
    plan = Plan(
        pool,
        seed=config.seed,
        batch_frames=data.batch_frames,
        crop_frames=data.crop_frames,
        bucket_ratio=data.bucket_ratio,
        parts=parts,
    )
    train = Loader(
        corpus,
        plan,
        config.mask,
        config.objective,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=config.engine.accumulation,
        with_mel=with_mel,
    )
    return train, _valid_loader(config, other, held_out, parts), other


def held_out_utterances(corpus: TokenCorpus, config: DataConfig) -> Ints:
    """Return held-out utterances (`valid_fraction`) that are long enough, about `valid_frames` frames at most."""
    found = [np.zeros(0, dtype=np.int64)]
    if config.valid_fraction:
        for begin, end in zip(corpus.first[:-1].tolist(), corpus.first[1:].tolist()):
            for start in range(begin, end, _CHUNK):
                utterance = np.arange(start, min(start + _CHUNK, end))
                found.append(utterance[is_held_out(utterance - begin, config.valid_fraction)])
    return limited(corpus, np.concatenate(found), config)


def limited(corpus: TokenCorpus, utterances: Ints, config: DataConfig) -> Ints:
    """Select usable `utterances`, spread over the corpus, with `valid_frames` frames in total.

    Selects at least one if any is usable.
    """
    usable = utterances[corpus.frames[utterances] >= config.min_frames]
    usable = usable[np.argsort(hashed(usable), kind="stable")]
    lengths = corpus.frames[usable].astype(np.int64)
    seen = np.cumsum(np.maximum(lengths // config.crop_frames, 1) * np.minimum(lengths, config.crop_frames))
    return np.sort(usable[: max(1, int(np.searchsorted(seen, config.valid_frames, side="right")))])


def _weights(data: DataConfig, folders: int) -> tuple[float, ...]:
    if data.weights and len(data.weights) != folders:
        raise UserError(f"data.weights: {len(data.weights)} for {folders} of data.dirs; give one for each, in order")
    return data.weights


def _validation(config: RunConfig, corpus: TokenCorpus) -> tuple[TokenCorpus, Ints]:
    """Return the validation corpus and the indices of its utterances to validate on."""
    data = config.data
    if not data.valid_dirs:
        return corpus, held_out_utterances(corpus, data)
    labels = data.valid_labels if config.objective.target == "labels" else ()
    other = TokenCorpus(
        data.valid_dirs, num_codebooks=data.num_codebooks, labels=labels, retry_seconds=config.log.retry_seconds
    )
    if other.require_mel(config.model.input) != corpus.require_mel(config.model.input):
        raise UserError(f"{data.valid_dirs[0]}: another log-mel plane than the training data; tokenize both alike")
    if other.card.fingerprint != corpus.card.fingerprint:
        raise UserError(
            f"{data.valid_dirs[0]}: codec {other.card.name}, training data {corpus.card.name}"
            f" ({other.card.difference(corpus.card)}); validate on shards of the same codec"
        )
    if other.clustering != corpus.clustering:
        raise UserError(
            f"data.valid_labels: of clustering {other.clustering[:8] or 'none'}, data.labels of {corpus.clustering[:8]}"
            "; label both with one (codecssl-pretrain label --clustering)"
        )
    return other, limited(other, np.arange(len(other)), data)


def _valid_loader(config: RunConfig, corpus: TokenCorpus, held_out: Ints, parts: int) -> Loader | None:
    if not len(held_out):
        return None
    data = config.data
    seed = int(hashed(config.seed, _VALID)[0] >> np.uint64(1))
    plan = Plan(
        Listed(corpus.frames, held_out),
        seed=seed,
        batch_frames=max(data.batch_frames // parts, 2 * data.crop_frames),
        crop_frames=data.crop_frames,
        bucket_ratio=data.bucket_ratio,
    )
    whole_input = replace(config.objective, quantizer_dropout=0.0)
    return Loader(
        corpus,
        plan,
        config.mask,
        whole_input,
        seed=seed,
        fixed_masks=True,
        with_mel=config.model.input != "codes",
    )


class Listed(UtterancePool):
    """A pool of a few utterances, given as a list."""

    def __init__(self, frames: np.ndarray, utterances: Ints) -> None:  # type: ignore[type-arg]
        super().__init__(np.asarray(frames[utterances]))
        self._listed = utterances

    def name(self, utterances: Ints) -> Ints:
        return self._listed[utterances]
