"""The residual quantizer against transformers' DAC, loops in float64, and finite differences."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from codecssl.superb.task_codec.rvq import Rvq, RvqConfig, VectorQuantizer, kmeans, masked_square, quantizer_dropout
from codecssl.tokenize.common.errors import UserError


def random_rvq(num_codebooks=3, size=16, width=4, dim=12, seed=0):
    torch.manual_seed(seed)
    config = RvqConfig(num_codebooks=num_codebooks, codebook_size=size, codebook_dim=width)
    return Rvq(dim, config).double()


def frames(batch=3, length=7, dim=12, seed=1):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything(x):
    return torch.ones(x.shape[:2], dtype=torch.bool)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def naive(rvq, x, mask, kept):
    """Search each frame over all entries in a loop."""
    batch, length, _ = x.shape
    features, codes = torch.zeros_like(x), torch.zeros(batch, len(rvq.books), length, dtype=torch.int64)
    loss, real = 0.0, int(mask.sum())
    for b, t in itertools.product(range(batch), range(length)):
        residual = x[b, t].clone()
        for k, book in enumerate(rvq.books):
            projected = book.down.weight @ residual + book.down.bias
            cosines = [float(projected @ e / (projected.norm() * e.norm())) for e in book.entries]
            code = max(range(len(cosines)), key=cosines.__getitem__)
            codes[b, k, t] = code
            found = book.up.weight @ book.entries[code] + book.up.bias
            if kept[b] > k:
                features[b, t] += found
                if mask[b, t]:
                    loss += float(((projected - book.entries[code]) ** 2).sum()) / len(projected) / real
            residual = residual - found
    return features, codes, loss


def test_equals_naive_loops_with_padding_and_dropped_codebooks():
    rvq, x = random_rvq(), frames()
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    kept = torch.tensor([3, 1, 2])
    with torch.no_grad():
        found = rvq(x, mask, kept)
        features, codes, loss = naive(rvq, x, mask, kept)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.features, features, rtol=1e-12, atol=1e-12)
    assert float(found.commitment) == pytest.approx(loss, rel=1e-12)
    assert float(found.codebook) == pytest.approx(loss, rel=1e-12)
    assert loss > 0.1


def test_equals_dac_of_transformers():
    from transformers import DacConfig
    from transformers.models.dac.modeling_dac import DacResidualVectorQuantize

    rvq, x = random_rvq(num_codebooks=4, width=5), frames(seed=3)
    config = DacConfig(n_codebooks=4, codebook_size=16, codebook_dim=5, hidden_size=12, quantizer_dropout=0.0)
    theirs = DacResidualVectorQuantize(config).double().eval()
    with torch.no_grad():
        for book, other in zip(rvq.books, theirs.quantizers, strict=True):
            for mine, conv in ((book.down, other.in_proj), (book.up, other.out_proj)):
                conv.weight.copy_(mine.weight[:, :, None])
                conv.bias.copy_(mine.bias)
            other.codebook.weight.copy_(book.entries)
        found = rvq(x, everything(x))
        features, codes, _, commitment, codebook = theirs(x.transpose(1, 2))
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.features, features.transpose(1, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.commitment, commitment.mean())
    torch.testing.assert_close(found.codebook, codebook.mean())


def test_losses_pass_gradcheck():
    rvq, x = random_rvq(num_codebooks=1), frames(2, 4).requires_grad_()
    mask, book = torch.tensor([[True, True, True, False], [True, False, False, False]]), rvq.books[0]
    assert gradcheck(lambda x: rvq(x, mask).commitment, (x,))
    fixed = x.detach()

    def moved(entries, up, bias):
        with torch.no_grad():
            codes = book.lookup(book.down(fixed))
        picked = entries[codes]
        return masked_square(picked, book.down(fixed).detach(), mask), F.linear(picked, up, bias)

    inputs = [p.detach().clone().requires_grad_() for p in (book.entries, book.up.weight, book.up.bias)]
    assert gradcheck(moved, inputs)
    # and the module's own gradients are those of that function
    rvq.zero_grad()
    found = rvq(fixed, mask)
    found.codebook.backward(retain_graph=True)
    expected = torch.autograd.grad(moved(*inputs)[0], inputs[0])[0]
    torch.testing.assert_close(book.entries.grad, expected)
    assert book.down.weight.grad is None or not book.down.weight.grad.any()  # the entries alone are moved by it


def test_straight_through_gradient():
    """d features / d x is up * down, as if there were no lookup; of the residual, the rest of it."""
    rvq, x = random_rvq(num_codebooks=2), frames(1, 1).requires_grad_()
    weights = frames(1, 1, seed=9)
    (rvq(x, everything(x)).features * weights).sum().backward()
    first, second = (book.up.weight @ book.down.weight for book in rvq.books)
    jacobian = first + second @ (torch.eye(12, dtype=torch.float64) - first)
    torch.testing.assert_close(x.grad[0, 0], weights[0, 0] @ jacobian)


def test_padding_has_no_effect():
    rvq, x, mask = random_rvq(), frames(), torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    other = torch.where(mask[..., None], x, 100 * torch.ones_like(x))
    gradients, losses = [], []
    for each in (x, other):
        rvq.zero_grad()
        for book in rvq.books:
            book.uses.zero_()
        found = rvq.train()(each, mask)
        (found.commitment + found.codebook).backward()
        gradients.append([p.grad.clone() for p in rvq.parameters() if p.grad is not None])
        losses.append(float(found.commitment.detach()))
        assert sum(float(book.uses.sum()) for book in rvq.books) == 3 * int(mask.sum())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_fewer_codebooks_are_a_prefix():
    rvq, x = random_rvq(), frames()
    with torch.no_grad():
        codes = rvq.encode(x)
        for k in (1, 2, 3):
            found = rvq(x, everything(x), torch.full((3,), k))
            torch.testing.assert_close(found.features, rvq.dequantise(codes[:, :k]))
            assert torch.equal(found.codes, codes)


def test_quantizer_dropout_draws_the_stated_distribution():
    kept = quantizer_dropout(20_000, 4, 0.5, seeded())
    shares = torch.bincount(kept, minlength=5) / len(kept)
    assert shares.tolist() == pytest.approx([0, 0.125, 0.125, 0.125, 0.625], abs=0.01)
    assert quantizer_dropout(50, 4, 0.0, seeded()).tolist() == [4] * 50


def test_kmeans_finds_separate_clusters():
    """Three directions are found for vectors of any length. Each entry is the mean of its frames."""
    directions = torch.eye(3, dtype=torch.float64)
    lengths = torch.rand(90, 1, dtype=torch.float64, generator=seeded()) + 0.5
    points = directions.repeat(30, 1) * lengths
    entries = kmeans(points, 3, 20, seeded(2))
    order = F.normalize(entries, dim=1).argmax(dim=1).argsort()
    expected = torch.stack([points[i::3].mean(dim=0) for i in range(3)])
    torch.testing.assert_close(entries[order], expected)


def test_kmeans_lives_with_fewer_frames_than_entries():
    entries = kmeans(frames(1, 3)[0], 8, 5, seeded())
    assert entries.shape == (8, 12)
    assert bool(entries.isfinite().all())


def test_more_codebooks_start_closer_to_the_states():
    x = frames(1, 600, seed=5) @ torch.diag(torch.linspace(2, 0.1, 12, dtype=torch.float64)) + 3
    rvq = random_rvq(num_codebooks=3, size=32, width=6)
    before = float((rvq.dequantise(rvq.encode(x)) - x).square().mean())
    rvq.fit(x[0], seeded())
    with torch.no_grad():
        errors = [float((rvq.dequantise(rvq.encode(x)[:, :k]) - x).square().mean()) for k in (1, 2, 3)]
    assert errors[2] < errors[1] < errors[0] < float((x - x.mean(dim=1)).square().mean()) < before


def test_dead_entries_are_counted_and_revived():
    rvq, x = random_rvq(num_codebooks=2, size=8), frames(2, 40)
    rvq.fit(x.flatten(0, 1), seeded())
    with torch.no_grad():
        rvq.books[0].entries[:3] = -1e3 * rvq.books[0].down(x).mean(dim=(0, 1))  # opposite to all
        rvq.books[0].entries[:2] *= 2.0
    rvq.train()(x, everything(x))
    unused = [int((book.uses == 0).sum()) for book in rvq.books]
    dead = rvq.revive(x, everything(x), 1.0, seeded())
    assert dead == unused
    assert dead[0] >= 2
    assert all(float(book.uses.sum()) == 0 for book in rvq.books)
    assert set(range(2)) & set(rvq.encode(x)[:, 0].unique().tolist())  # in use again
    rvq(x, everything(x))
    assert int((rvq.books[0].uses == 0).sum()) < dead[0]


def test_equal_cosines_take_the_first_entry():
    book = VectorQuantizer(4, 3, 2).double()
    with torch.no_grad():
        book.entries.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 0.0]]))
    assert book.lookup(torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)).tolist() == [1, 0]


def test_refuses_sizes():
    with pytest.raises(UserError, match="codebook_size 1: must be at least 2"):
        RvqConfig(codebook_size=1)


def test_initialization_uses_the_wanted_directions():
    """A lookup of two dimensions loses the smallest of three directions, unless it is the wanted one."""
    x = torch.randn(400, 3, dtype=torch.float64, generator=seeded()) * torch.tensor([3.0, 2.0, 0.1])
    wanted = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    lost = {}
    for name, given in (("plain", None), ("wanted", wanted)):
        book = VectorQuantizer(3, 64, 2).double()
        book.fit(x, 20, seeded(1), given)
        back = book.up(book.down(x))
        lost[name] = float((back - x)[:, 2].square().mean() / x[:, 2].square().mean())
    assert lost["plain"] > 0.9
    assert lost["wanted"] < 0.1
