"""Packing: the codes of a micro-expert as one little-endian bit string (checkpoint format 1).

Code i of a row takes the bits `[i·b, (i+1)·b)` of the row, counted from the lowest bit of its first
32-bit word. 32 codes of b bits fill exactly b words, so d_model must be a multiple of 32.
"""

import torch

CODES_PER_UNIT = 32
PACKED_BITS = (8, 4, 3, 2, 1)


def words_per_row(d_model: int, bits: int) -> int:
    """32-bit words of one packed row; raises `ValueError` when d_model is no multiple of 32."""
    if d_model % CODES_PER_UNIT:
        raise ValueError(f"d_model {d_model} is not a multiple of {CODES_PER_UNIT}")
    return d_model // CODES_PER_UNIT * bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes `[num_rows, d_model]` in `[0, 2**bits)` to int32 `[num_rows, words]`."""
    num_rows, d_model = codes.shape
    units = codes.view(num_rows, d_model // CODES_PER_UNIT, CODES_PER_UNIT)
    words = torch.zeros(num_rows, units.shape[1], bits, dtype=torch.int64, device=codes.device)
    for position in range(CODES_PER_UNIT):
        word, shift = divmod(position * bits, 32)
        code = units[:, :, position].long() << shift
        words[:, :, word] |= code
        if shift + bits > 32:
            words[:, :, word + 1] |= code >> 32
    low = words & 0xFFFFFFFF
    signed = torch.where(low >= 2**31, low - 2**32, low)
    return signed.to(torch.int32).view(num_rows, words_per_row(d_model, bits))


def unpack(words: torch.Tensor, bits: int, d_model: int) -> torch.Tensor:
    """Undo `pack`: int32 `[num_rows, words]` to uint8 codes `[num_rows, d_model]`."""
    num_rows = words.shape[0]
    units = words.view(num_rows, d_model // CODES_PER_UNIT, bits).long() & 0xFFFFFFFF
    start = torch.arange(CODES_PER_UNIT, device=words.device) * bits
    word, shift = start // 32, start % 32
    # A code that ends in the next word takes its high bits from there; for the others, shifting
    # the next word up moves it past the mask.
    following = (word + 1).clamp(max=bits - 1)
    codes = units[:, :, word] >> shift | units[:, :, following] << (32 - shift)
    return (codes & (2**bits - 1)).to(torch.uint8).view(num_rows, d_model)
