import numpy as np
import pytest

from codecssl.pretrain.data.hashed_random import permuted
from codecssl.pretrain.data.plan import SHUFFLE_WINDOW, Pieces, Plan, UtterancePool, cut, equal_cuts, is_held_out
from codecssl.tokenize.common.errors import UserError

CROP, BATCH = 100, 1000


def lengths(count: int = 300) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 460, count).astype(np.uint32)


def plan(frames: np.ndarray, *, seed: int = 1, parts: int = 1, crop: int = CROP, window: int = SHUFFLE_WINDOW) -> Plan:
    pool = UtterancePool(frames)
    return Plan(pool, seed=seed, batch_frames=BATCH, crop_frames=crop, bucket_ratio=1.04, parts=parts, window=window)


def rows(pieces: Pieces) -> list[tuple[int, int, int]]:
    return list(zip(pieces.utterance.tolist(), pieces.start.tolist(), pieces.frames.tolist(), strict=True))


@pytest.mark.parametrize("window", [SHUFFLE_WINDOW, 64, 7])
def test_an_epoch_takes_every_utterance_in_whole_disjoint_pieces(window: int) -> None:
    frames = lengths()
    made = plan(frames, window=window)
    assert made.windows == max(1, round(len(frames) / window))
    for epoch in range(2):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        seen = [np.zeros(n, dtype=int) for n in frames]
        for step in steps:
            for utterance, start, count in rows(made.batch(step)):
                assert 0 <= start <= start + count <= frames[utterance]
                seen[utterance][start : start + count] += 1
        for count, n in zip(seen, frames, strict=True):
            assert count.max() == 1, "each frame must be taken once"
            assert count.sum() == (n if n <= CROP else n // CROP * CROP)


def test_batches_have_equal_frames() -> None:
    made = plan(lengths())
    sums = [int(made.batch(step).frames.sum()) for step in range(made.steps_per_epoch)]
    share = sum(sums) / len(sums)
    assert share <= BATCH
    assert max(abs(total - share) for total in sums) <= CROP
    assert sum(sums) == made.frames_per_epoch


def test_batches_hold_like_lengths() -> None:
    """Without bucketing, this data would need 20 % padding or more."""
    made = plan(lengths(2000), crop=400)
    padded = [len(b) * b.frames.max() for b in map(made.batch, range(made.steps_per_epoch))]
    assert 1.0 - made.frames_per_epoch / sum(padded) < 0.03


def test_a_step_depends_on_nothing_but_seed_and_step() -> None:
    frames = lengths()
    steps = plan(frames).steps_per_epoch
    forward = [rows(made.batch(s)) for made in [plan(frames)] for s in range(2 * steps)]
    assert [rows(plan(frames).batch(s)) for s in (2 * steps - 1, steps, 0)] == [forward[i] for i in (-1, steps, 0)]
    assert sorted(map(str, forward[:steps])) != sorted(map(str, forward[steps:])), "epochs must have different batches"
    assert rows(plan(frames, seed=2).batch(0)) != forward[0]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (2, 3), (4, 1)])
def test_ranks_partition_the_same_global_batch(world: int, accumulation: int) -> None:
    """OLMo-core has a similar test: over the ranks no item is lost or repeated, and every rank has work."""
    frames = lengths()
    made = plan(frames, parts=world * accumulation)
    for step in (0, 7, made.steps_per_epoch + 3):
        shares = cut(made.batch(step), world * accumulation)
        assert all(len(share) for share in shares)
        assert [row for share in shares for row in rows(share)] == rows(plan(frames).batch(step))
        sums = [int(share.frames.sum()) for share in shares]
        assert max(sums) - min(sums) <= 2 * CROP


def test_too_many_parts_are_refused() -> None:
    with pytest.raises(UserError, match="use fewer parts"):
        plan(lengths(8), parts=64)
    with pytest.raises(UserError, match="no utterance is left"):
        Plan(UtterancePool(lengths(), min_frames=500), seed=1, batch_frames=BATCH, crop_frames=CROP, bucket_ratio=1.04)


def test_equal_cuts_against_a_loop() -> None:
    random = np.random.default_rng(3)
    for _ in range(50):
        frames, parts = random.integers(1, 30, random.integers(1, 40)), int(random.integers(1, 9))
        owners = [int(start * parts // frames.sum()) for start in np.cumsum(frames) - frames]
        bounds = equal_cuts(frames, parts)
        assert [p for p in range(parts) for _ in range(bounds[p], bounds[p + 1])] == owners


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 1000])
def test_permuted_is_a_permutation_of_its_keys(size: int) -> None:
    places = np.arange(size)
    first, second = permuted(places, size, 1, 2), permuted(places, size, 1, 3)
    assert sorted(first) == sorted(second) == places.tolist()
    assert np.array_equal(permuted(places[::-1], size, 1, 2), first[::-1]), "a place's value must not depend on others"
    if size > 100:
        assert (first != second).mean() > 0.9
        ranks = np.corrcoef(places, first)[0, 1]
        assert abs(ranks) < 0.15, "neighbours must not stay neighbours"


def test_weights_repeat_and_thin_out_folders() -> None:
    """Folder 0 twice an epoch, folder 1 in half of the epochs, folder 2 never: counted over many epochs."""
    frames = np.full(300, 50, dtype=np.uint16)
    pool = UtterancePool(frames, first=[0, 100, 200, 300], weights=[2.0, 0.5, 0.0])
    made = Plan(pool, seed=1, batch_frames=BATCH, crop_frames=CROP, bucket_ratio=1.04, window=90)
    epochs = 40
    seen = np.zeros(300, dtype=int)
    for step in range(epochs * made.steps_per_epoch):
        np.add.at(seen, made.batch(step).utterance, 1)
    assert (seen[:100] == 2 * epochs).all()
    assert not seen[200:].any()
    assert 0.45 < seen[100:200].mean() / epochs < 0.55
    assert made.frames_per_epoch == 50 * 250


def test_short_and_held_out_utterances_are_never_drawn() -> None:
    frames = lengths(1000)
    pool = UtterancePool(frames, first=[0, 400, 1000], min_frames=60, held_out=0.2)
    made = Plan(pool, seed=1, batch_frames=BATCH, crop_frames=CROP, bucket_ratio=1.04, window=128)
    drawn = np.unique(np.concatenate([made.batch(s).utterance for s in range(made.steps_per_epoch)]))
    number = np.concatenate([np.arange(400), np.arange(600)])
    expected = np.flatnonzero((frames >= 60) & ~is_held_out(number, 0.2))
    assert np.array_equal(drawn, expected)
    assert 0.15 < is_held_out(number, 0.2).mean() < 0.25
    share = made.frames_per_epoch / made.steps_per_epoch
    sums = [int(made.batch(s).frames.sum()) for s in range(made.steps_per_epoch)]
    assert sum(sums) == made.frames_per_epoch
    assert max(abs(total - share) for total in sums) < 0.25 * share, "windows must be nearly equal"
