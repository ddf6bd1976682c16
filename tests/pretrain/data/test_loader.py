from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data import loader
from codecssl.pretrain.data.corpus import TokenCorpus, with_codebooks
from codecssl.pretrain.data.loader import Batch, Loader
from codecssl.pretrain.data.open_data import held_out_utterances, open_data
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.ranks import Ranks
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.write_codes import write_shards


def same(left: Batch, right: Batch) -> bool:
    tensors = all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("codes", "mask", "kept"))
    return tensors and (left.frames, left.masked_total) == (right.frames, right.masked_total)


@pytest.fixture
def train(make_shards: Callable[..., Path], small_config: Callable[..., RunConfig]) -> Loader:
    dirs = [make_shards("a", count=25, seed=0), make_shards("b", count=25, seed=1)]
    return open_data(small_config(dirs), Ranks(rank=0, world_size=1, local_rank=0))[0]


def test_batches_are_the_planned_codes(train: Loader, tmp_path: Path) -> None:
    shards = [Shards(tmp_path / "a"), Shards(tmp_path / "b")]
    seen = set()
    for step in range(train.plan.steps_per_epoch):
        (batch,), pieces = train.step(step), train.plan.batch(step)
        assert batch.frames == pieces.frames.tolist()
        parts = zip(batch.codes.split(batch.frames, 1), pieces.utterance, pieces.start, pieces.frames, strict=True)
        for own, index, start, frames in parts:
            seen.add(index >= 25)
            codes = shards[index // 25].codes(int(index % 25))[:, start : start + frames]
            assert torch.equal(own, torch.from_numpy(codes.astype("int64")))
    assert seen == {False, True}, "both folders must be read"


def test_the_native_pipeline_gives_the_pure_functions_batches_in_order(
    train: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loader.NATIVE_DATA, "the pinned fairseq2n must have its native data pipeline"
    piped = list(train.steps(3, 12, workers=3, prefetch=2))
    monkeypatch.setattr(loader, "NATIVE_DATA", False)
    plain = list(train.steps(3, 12, workers=3, prefetch=2))
    assert len(piped) == len(plain) == 9
    assert all(same(left[0], right[0]) for left, right in zip(piped, plain, strict=True))
    assert not same(plain[0][0], plain[1][0])


def test_a_readers_own_error_comes_through_the_pipeline(train: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int, start: int, frames: int) -> None:
        raise UserError("shard 3: cannot be read")

    monkeypatch.setattr(train.corpus, "codes", fail)
    with pytest.raises(UserError, match="shard 3: cannot be read"):
        next(train.steps(0, 5, workers=2, prefetch=1))


def test_ranks_and_accumulation_share_one_global_batch(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig]
) -> None:
    """Two ranks with two micro-batches each read and mask what one process does, with its denominators."""
    config = small_config(make_shards(count=60))
    corpus = TokenCorpus(config.data.dirs)
    one = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))[0]
    ranks = [
        Loader(
            corpus,
            one.plan,
            config.mask,
            config.objective,
            seed=config.seed,
            rank=r,
            world_size=2,
            accumulation=2,
        )
        for r in range(2)
    ]
    (whole,) = one.step(1)
    shares = [ranks[r].step(1)[a] for a in range(2) for r in range(2)]
    assert {share.masked_total for share in shares} == {whole.masked_total} == {int(whole.mask.sum())}
    assert sum(int(share.mask.sum()) for share in shares) == whole.masked_total
    assert [n for share in shares for n in share.frames] == whole.frames
    for name in ("codes", "mask", "kept"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares], -1), getattr(whole, name)), name


def test_held_out_utterances_are_stable_and_disjoint(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig]
) -> None:
    config = small_config(make_shards(count=200), data={"valid_frames": 10**6})
    corpus = TokenCorpus(config.data.dirs)
    train, _, _ = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))
    chosen = set(np.concatenate([train.plan.batch(s).utterance for s in range(train.plan.steps_per_epoch)]).tolist())
    held_out = set(held_out_utterances(corpus, config.data).tolist())
    assert not chosen & held_out
    assert chosen | held_out == {i for i in range(200) if corpus.frames[i] >= 20}
    assert 0.08 < len(held_out) / 200 < 0.25
    again = small_config(make_shards("more", count=260), data={"valid_frames": 10**6})  # the same and sixty more
    assert held_out <= set(held_out_utterances(TokenCorpus(again.data.dirs), again.data).tolist())


def test_validation_masks_are_fixed_and_inputs_whole(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig]
) -> None:
    train, valid, _ = open_data(small_config(make_shards()), Ranks(rank=0, world_size=1, local_rank=0))
    assert valid is not None
    assert same(valid.step(0)[0], valid.step(0)[0])
    assert valid.step(0)[0].kept.all()
    assert sum(sum(valid.step(i)[0].frames) for i in range(valid.plan.steps_per_epoch)) <= 300
    steps = train.plan.steps_per_epoch
    masks = {str(train.step(e * steps)[0].visible_frames) for e in range(3)}
    assert len(masks) == 3, "training masks must change with the step"


def test_two_codecs_are_refused_on_one_line(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig]
) -> None:
    dirs = [make_shards("a"), make_shards("b", codec="another")]
    with pytest.raises(UserError, match=r"b: written with codec another, .*a with synthetic .*one codec") as error:
        open_data(small_config(dirs), Ranks(rank=0, world_size=1, local_rank=0))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="validate on shards of the same codec"):
        open_data(small_config(dirs[0], data={"valid_dirs": [str(dirs[1])]}), Ranks(rank=0, world_size=1, local_rank=0))


def test_fewer_codebooks_by_option(make_shards: Callable[..., Path], small_config: Callable[..., RunConfig]) -> None:
    path = make_shards()
    train = open_data(small_config(path, data={"num_codebooks": 2}), Ranks(rank=0, world_size=1, local_rank=0))[0]
    assert train.corpus.card.codebook_sizes == (16, 12)
    assert train.step(0)[0].codes.shape[0] == 2
    with pytest.raises(UserError, match=r"data.num_codebooks: 4, but .* has 3"):
        open_data(small_config(path, data={"num_codebooks": 4}), Ranks(rank=0, world_size=1, local_rank=0))


def test_shards_of_more_and_of_fewer_codebooks_train_together_on_those_of_both(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    many = make_shards("many")
    shards = Shards(many)
    items = [(f"one-{i}", shards.codes(i)[:1], {}) for i in range(len(shards))]
    write_shards(tmp_path / "one", with_codebooks(shards.card, 1), items)
    for dirs in ([many, tmp_path / "one"], [tmp_path / "one", many]):
        with pytest.raises(UserError, match="read the 1 that both have: --data.num_codebooks 1"):
            TokenCorpus(dirs)
        corpus = TokenCorpus(dirs, num_codebooks=1)
        assert corpus.card.codebook_sizes == (16,)
        frames = int(corpus.frames[3])
        assert np.array_equal(corpus.codes(3, 0, frames), corpus.codes(3 + len(shards), 0, frames))
        with pytest.raises(UserError, match="data.num_codebooks: 2, but .*one has 1; lower it"):
            TokenCorpus(dirs, num_codebooks=2)


def label(data: Path, output: Path, *, classes: int = 5, of: str | None = None, drop: int = 0) -> Path:
    """A label folder by hand: label = (first code + frame) % classes."""
    shards = Shards(data)
    card = replace(
        shards.card, name="labels", weights_sha256=f"{classes:064x}", codebook_sizes=(classes,), codes_per_frame=(1,),
        policies={"labels_of": shards.fingerprint if of is None else of},
    )  # fmt: skip
    items = []
    for index in range(len(shards) - drop):
        codes = shards.codes(index)[:1].astype(int)
        items.append((shards.utterance(index).id, (codes + np.arange(codes.shape[1])) % classes, {}))
    write_shards(output, card, items)
    return output


def test_labels_are_those_of_the_same_piece(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    dirs = [make_shards("a", count=25, seed=0), make_shards("b", count=25, seed=1)]
    labels = [str(label(path, tmp_path / f"labels-{path.name}")) for path in dirs]
    config = small_config(dirs, data={"labels": labels}, objective={"target": "labels"})
    train, valid, _ = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))
    assert valid is not None
    assert train.corpus.label_sizes == (5,)
    for step in range(train.plan.steps_per_epoch):
        (batch,), pieces = train.step(step), train.plan.batch(step)
        assert batch.labels is not None
        places = [torch.arange(int(a), int(a + n)) for a, n in zip(pieces.start, pieces.frames, strict=True)]
        assert torch.equal(batch.labels[0], (batch.codes[0] + torch.cat(places)) % 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": "another"}, "labels of other data than"),
        ({"drop": 1}, "not as many frames"),
        (None, "2 folders for 1 of data.dirs"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path,
    changes: dict[str, object] | None, message: str,
) -> None:  # fmt: skip
    data = make_shards(count=25)
    made = str(label(data, tmp_path / "labels", **(changes or {})))
    config = small_config(data, data={"labels": [made] if changes else [made, made]}, objective={"target": "labels"})
    with pytest.raises(UserError, match=message):
        open_data(config, Ranks(rank=0, world_size=1, local_rank=0))


def test_validation_labels_of_another_clustering_are_refused(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Two k-means of the same size would train and show a rising validation loss."""
    dirs = [make_shards(name, count=25, seed=seed) for seed, name in enumerate("ab")]
    labels = [label(path, tmp_path / f"labels-{path.name}") for path in dirs]
    card = Shards(labels[1]).card
    items = [(u.id, Shards(labels[1]).codes(u.index), {}) for u in Shards(labels[1]).utterances()]
    write_shards(tmp_path / "other", replace(card, weights_sha256="f" * 64), items)
    for valid, fits in ((labels[1], True), (tmp_path / "other", False)):
        config = small_config(
            dirs[0], objective={"target": "labels"},
            data={"labels": [str(labels[0])], "valid_dirs": [str(dirs[1])], "valid_labels": [str(valid)]},
        )  # fmt: skip
        if fits:
            open_data(config, Ranks(rank=0, world_size=1, local_rank=0))
            continue
        with pytest.raises(UserError, match="of clustering ffffffff, data.labels of 0000000.*label both with one"):
            open_data(config, Ranks(rank=0, world_size=1, local_rank=0))


def test_a_grid_of_codes_is_masked_by_whole_columns_of_time(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """SemantiCodec: 8 bands a frame in each of two codebooks. A mask over single cells would leak the target."""
    card = CodecCard(
        name="grid", weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=2560,
        codebook_sizes=(32, 16), codes_per_frame=(8, 8), latent_dim=12,
    )  # fmt: skip
    random = np.random.default_rng(0)
    items = ((f"u{i}", random.integers(0, 16, (16, 64)).astype(np.uint16), {}) for i in range(30))
    write_shards(tmp_path / "grid", card, items)
    config = small_config(tmp_path / "grid", objective={"quantizer_dropout": 1.0}, data={"valid_fraction": 0.0})
    train, _, _ = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))
    (batch,) = train.step(0)
    assert batch.codes.shape == (16, 60 * len(batch.frames))
    assert batch.mask.shape == (60 * len(batch.frames),), "all cells of a frame must share one decision"
    assert torch.equal(batch.kept[:8], batch.kept[:1].expand(8, -1)), "a codebook must be dropped with all its cells"
    assert not batch.kept[8:].all()
    model = untrained(config.model, card, None, seed=0).eval()
    dirty = torch.where(batch.mask, (batch.codes + 1) % 16, batch.codes)
    with torch.no_grad():
        first, second = (model(codes, batch.frames, batch.mask) for codes in (batch.codes, dirty))
    assert torch.equal(first, second), "masked codes must not reach the output"
