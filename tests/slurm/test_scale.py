"""Scale by simulation: a corpus of millions of utterances begins at once, and 1,024 ranks share out its epochs exactly.

The corpus is a small dataset whose blocks are listed again and again: every utterance can be read, few are stored.
`python tests/slurm/test_scale.py 24000000 FOLDER` measures 60,000 hours.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from codecssl.configs.load import from_dict
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.loader import Loader
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.data.plan import Plan, UtterancePool, cut
from codecssl.pretrain.ranks import Ranks
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.format.layout import BLOCK, load_json, sealed
from codecssl.tokenize.write_codes import write_shards

BLOCK_UTTERANCES, MEAN_FRAMES = 2048, 450  # 9 s at 50 Hz: 24 million are 60,000 h
RANKS = 1024
SIZES = (1024,) * 8


def large(folder: Path, utterances: int) -> Path:
    """A dataset of `count` utterances (rounded up to whole blocks), one block per shard, all links to one file."""
    card = CodecCard(
        name="synthetic", weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=320,
        codebook_sizes=SIZES, codes_per_frame=(1,) * len(SIZES), latent_dim=12,
    )  # fmt: skip
    random = np.random.default_rng(0)
    lengths = random.integers(100, 2 * MEAN_FRAMES - 100, BLOCK_UTTERANCES)
    items = ((f"u{i}", random.integers(0, 1024, (8, n), np.uint16), {}) for i, n in enumerate(lengths))
    shards = write_shards(folder / "large", card, items)
    blocks, times = shards.blocks, -(-utterances // BLOCK_UTTERANCES)
    assert len(blocks) == 1
    repeated = np.repeat(blocks, times).astype(BLOCK)
    repeated["first"] = np.arange(times) * BLOCK_UTTERANCES
    repeated["shard"] = np.arange(times)
    for shard in range(1, times):
        (folder / f"large/shards/{shard:05d}.tar").hardlink_to(folder / "large/shards/00000.tar")
    np.save(folder / "large/blocks.npy", repeated)
    np.save(folder / "large/index.npy", np.tile(lengths.astype(np.uint16), times))
    header = load_json(folder / "large/dataset.json")
    header["totals"] |= {"utterances": times * BLOCK_UTTERANCES, "shards": times}
    (folder / "large/dataset.json").write_text(json.dumps(sealed({k: v for k, v in header.items() if k != "seal"})))
    return folder / "large"


def config(shards: Path, hours: float) -> RunConfig:
    """Codec2Vec base at a batch of `hours` of audio."""
    frames = round(hours * 3600 * 50)
    return from_dict(RunConfig, {"data": {"dirs": [str(shards)], "batch_frames": frames}})


def start(shards: Path) -> dict[str, float]:
    """Seconds until rank 1,000 of 1,024 has its first micro-batch, read; and the process's peak memory in GiB."""
    began = time.monotonic()
    train, valid, _ = open_data(config(shards, hours=6.0), Ranks(rank=1000, world_size=RANKS, local_rank=0))
    opened = time.monotonic() - began
    [batch] = train.step(0)
    assert valid is not None
    assert batch.codes.shape[0] == len(SIZES)
    return {
        "utterances": len(train.corpus),
        "hours": round(train.plan.frames_per_epoch / 50 / 3600),
        "steps_per_epoch": train.plan.steps_per_epoch,
        "open_seconds": round(opened, 2),
        "first_batch_seconds": round(time.monotonic() - began, 2),
        "peak_gib": round(_peak_kib() / 2**20, 2),
    }


def _peak_kib() -> int:
    """Peak resident memory of this program. ru_maxrss would count that of the process that started it as well."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1])


def test_a_large_corpus_begins_within_seconds_and_little_memory(tmp_path):
    """A twentieth of 60,000 h; opening is linear in the utterances, the first batch is not (windows)."""
    done = subprocess.run([sys.executable, __file__, "1200000", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["utterances"] >= 1_200_000
    assert found["hours"] > 2_800
    assert found["peak_gib"] < 1.5, "must stay below 1.5 GiB, of which torch takes half"
    assert found["open_seconds"] < 10, "must be quick (0.1 s on an idle core)"


def test_1024_ranks_take_every_piece_of_an_epoch_exactly_once():
    frames = np.random.default_rng(1).integers(100, 1600, 60_000).astype(np.uint16)
    plan = Plan(UtterancePool(frames), seed=3, batch_frames=2_000_000, crop_frames=780, bucket_ratio=1.04, parts=RANKS,
                window=20_000)  # fmt: skip
    assert plan.windows == 3
    assert plan.steps_per_epoch >= 20
    for epoch in (0, 1):
        change = np.zeros(int(frames.sum(dtype=np.int64)) + 1, np.int8)  # where pieces begin and end
        first = np.cumsum(frames, dtype=np.int64) - frames
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            shares = cut(plan.batch(step), RANKS)
            assert min(map(len, shares)) > 0, "every rank must have work at every step"
            sums = np.array([int(share.frames.sum()) for share in shares])
            assert np.ptp(sums) <= 2 * 780, "ranks must have equal work, up to one piece"
            for share in shares:
                begin = first[share.utterance] + share.start
                np.add.at(change, begin, 1)
                np.add.at(change, begin + share.frames, -1)
        seen = np.cumsum(change, dtype=np.int8)[:-1]
        assert seen.max() == 1, "each frame must be read once, by one rank"
        kept = np.where(frames <= 780, frames, frames // 780 * 780)
        assert np.array_equal(np.add.reduceat(seen, first, dtype=np.int64), kept), "each utterance must be read"


def test_each_rank_reads_its_own_share(tmp_path):
    """Loaders of some of 1,024 ranks read exactly the pieces that `cut` assigned to them."""
    shards = large(tmp_path, 40_000)
    ranks = [0, 1, 511, RANKS - 1]
    made = [open_data(config(shards, 6.0), Ranks(rank=r, world_size=RANKS, local_rank=0))[0] for r in ranks]
    shares = cut(made[0].plan.batch(5), RANKS)
    for rank, train in zip(ranks, made, strict=True):
        assert isinstance(train, Loader)
        [batch] = train.step(5)
        assert batch.frames == shares[rank].frames.tolist()
        piece = train.corpus.codes(int(shares[rank].utterance[0]), int(shares[rank].start[0]), batch.frames[0])
        assert np.array_equal(batch.codes[:, : batch.frames[0]].numpy(), piece)


if __name__ == "__main__":
    dataset = large(Path(sys.argv[2]), int(sys.argv[1]))
    print(json.dumps(start(dataset)))
