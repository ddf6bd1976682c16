"""The faster modules match those of torch and s3prl, gradients included."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from codecssl.superb.patches import import_patches
from codecssl.superb.patches.faster_modules import PaddedLSTM, quicken

import_patches.install()  # before s3prl is imported
LENGTHS = torch.tensor([5, 9, 1, 9, 5])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_outputs_and_gradients_are_those_of_packed_sequences(bidirectional: bool) -> None:
    torch.manual_seed(0)
    genuine = nn.LSTM(4, 6, batch_first=True, bidirectional=bidirectional)
    ours = quicken(copy.deepcopy(genuine))
    assert type(ours) is PaddedLSTM
    waves = torch.randn(5, 11, 4)
    found = []
    for lstm in (genuine, ours):
        inputs = waves.clone().requires_grad_()
        packed = pack_padded_sequence(inputs, LENGTHS, batch_first=True, enforce_sorted=False)
        output, lengths = pad_packed_sequence(lstm(packed)[0], batch_first=True)
        assert torch.equal(lengths, LENGTHS)
        (output * torch.arange(output.numel()).view_as(output).sin()).sum().backward()
        found.append([output, inputs.grad, *(weight.grad for weight in lstm.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_other_recurrent_layers_and_inputs_stay_torchs_own() -> None:
    model = quicken(nn.ModuleList([nn.GRU(2, 3, batch_first=True), nn.LSTM(2, 3)]))
    assert [type(layer) for layer in model] == [nn.GRU, nn.LSTM]
    torch.manual_seed(0)
    deep = nn.LSTM(2, 3, num_layers=2, batch_first=True)
    frames = torch.randn(2, 4, 2)
    packed = pack_padded_sequence(frames, torch.tensor([4, 2]), batch_first=True)
    plain, (state, _) = deep(frames)
    output = deep(packed)[0]
    ours = quicken(deep)
    assert torch.equal(ours(frames)[0], plain)
    assert torch.equal(ours(frames)[1][0], state)
    again = ours(packed)[0]
    assert isinstance(again, PackedSequence)
    assert torch.equal(again.data, output.data)


def test_batches_of_mostly_padding_stay_packed() -> None:
    ours = quicken(nn.LSTM(2, 3, batch_first=True))
    for lengths, padded in (([9, 5, 3, 6], True), ([9, 5, 3, 5], False)):
        packed = pack_padded_sequence(
            torch.randn(4, 9, 2), torch.tensor(lengths), batch_first=True, enforce_sorted=False
        )
        assert (ours(packed)[1] is None) == padded


def test_weighted_sums_equal_those_of_s3prl() -> None:
    from types import SimpleNamespace

    from s3prl.nn import Featurizer

    torch.manual_seed(0)
    upstream = SimpleNamespace(hidden_sizes=[4] * 3, downsample_rates=[320] * 3, num_layers=3)
    states, lengths = [torch.randn(2, 5, 4) for _ in range(3)], [torch.tensor([5, 3])] * 3
    found = []
    for change in (lambda model: model, quicken):
        featurizer = change(Featurizer(upstream))
        featurizer.weights.data = torch.tensor([0.5, -1.0, 2.0])
        output, kept = featurizer(states, lengths)
        (output * torch.arange(40).view(2, 5, 4).sin()).sum().backward()
        assert torch.equal(kept, lengths[0])
        found.append([output, featurizer.weights.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
