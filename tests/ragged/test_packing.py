import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from camera_serve.ragged.packing import PACKED_BITS, pack, unpack, words_per_row


@pytest.mark.parametrize("bits", PACKED_BITS)
@given(rows=st.integers(0, 5), units=st.integers(1, 4), seed=st.integers(0, 1000))
def test_codes_survive_packing(bits: int, rows: int, units: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 32 * units), generator=generator)
    words = pack(codes, bits)
    assert words.shape == (rows, words_per_row(32 * units, bits))
    assert unpack(words, bits, 32 * units).equal(codes.to(torch.uint8))


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_a_row_is_a_little_endian_bit_string(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (1, 64))
    number = sum(code << (position * bits) for position, code in enumerate(codes[0].tolist()))
    wanted = number.to_bytes(8 * bits, "little")
    assert pack(codes, bits).numpy().tobytes() == wanted


def test_the_highest_bit_of_a_word_is_kept() -> None:
    codes = torch.ones(1, 32, dtype=torch.int64)
    assert pack(codes, 1).tolist() == [[-1]]


def test_a_width_that_does_not_fill_words_is_refused() -> None:
    with pytest.raises(ValueError, match="d_model 48 is not a multiple of 32"):
        words_per_row(48, 3)
