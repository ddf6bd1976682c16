"""Packing against a naive bit string, over random lengths and widths."""

import numpy as np
import pytest

from codecssl.tokenize.format.bits import CHUNK, pack, pack_planes, packed_size, unpack


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


@pytest.mark.parametrize("bits", [3, 10, 13])
def test_more_codes_than_are_packed_at_a_time(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 2 * CHUNK + 13)
    packed = pack(codes, bits)
    assert packed == naive(codes, bits)
    buffer = np.frombuffer(packed, np.uint8)
    assert np.array_equal(unpack(buffer, bits, CHUNK - 3, CHUNK + 9), codes[CHUNK - 3 : CHUNK + 9])


@pytest.mark.parametrize("bits", [1, 4, 7, 10, 11, 16])
def test_stacked_planes_are_unpacked_at_once(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 5, 61))
    size = packed_size(61, bits)
    buffer = np.frombuffer(b"".join(pack(plane, bits) for row in codes for plane in row), np.uint8)
    for start, stop in [(0, 61), (0, 60), (7, 61), (30, 31), (9, 9)]:
        unpacked = unpack(buffer.reshape(3, 5, size), bits, start, stop)
        assert unpacked.dtype == np.uint16
        assert np.array_equal(unpacked, codes[:, :, start:stop])


def test_bytes_that_hold_other_codes_do_not_matter():
    codes = np.arange(80)
    buffer = np.frombuffer(pack(codes, 10), np.uint8).copy()
    buffer[:50], buffer[60:] = 255, 255  # codes 40..47 lie in bytes 50..59
    assert unpack(buffer, 10, 40, 48).tolist() == codes[40:48].tolist()


@pytest.mark.parametrize(
    ("code", "message"), [(1024, "code 1024 does not fit in 10 bits"), (-1, "code -1: must be 0 or more")]
)
def test_a_code_out_of_range_is_refused(code, message):
    with pytest.raises(ValueError, match=message):
        pack(np.array([3, code]), 10)


@pytest.mark.parametrize("bits", range(1, 17))
def test_planes_packed_together_are_those_packed_alone(bits):
    rng = np.random.default_rng(bits)
    for lengths in ([5, 5, 5], rng.integers(0, 40, 50), [0], [], [0, 3, 0], [CHUNK + 3, 9]):
        planes = [rng.integers(0, 1 << bits, length).astype(np.uint16) for length in lengths]
        assert pack_planes(planes, bits) == b"".join(pack(plane, bits) for plane in planes)
    if bits < 16:
        with pytest.raises(ValueError, match="does not fit in"):
            pack_planes([np.array([0]), np.array([1 << bits])], bits)
