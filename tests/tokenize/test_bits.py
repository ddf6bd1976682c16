"""Packing against a naive bit string, over random lengths and widths."""

import numpy as np
import pytest

from codecssl.tokenize.bits import pack, packed_size, unpack


def naive(codes, bits):
    text = "".join(format(int(c), f"0{bits}b")[::-1] for c in codes)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


@pytest.mark.parametrize("bits", range(1, 17))
def test_round_trip_and_layout(bits):
    rng = np.random.default_rng(bits)
    for length in [0, 1, 2, 7, 8, *rng.integers(9, 300, 6)]:
        codes = rng.integers(0, 1 << bits, length).astype(np.uint16)
        packed = pack(codes, bits)
        assert packed == naive(codes, bits)
        assert len(packed) == packed_size(int(length), bits)
        buffer = np.frombuffer(packed, np.uint8)
        assert np.array_equal(unpack(buffer, bits, 0, int(length)), codes)
        start = int(rng.integers(0, length + 1))
        stop = int(rng.integers(start, length + 1))
        assert np.array_equal(unpack(buffer, bits, start, stop), codes[start:stop])


def test_a_code_too_large_is_refused():
    with pytest.raises(ValueError, match="code 1024 does not fit in 10 bits"):
        pack(np.array([3, 1024], np.uint16), 10)
