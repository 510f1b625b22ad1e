from pathlib import Path

import pytest
import torch

from bench import limits


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("streams", limits.STREAMS)
def test_every_word_is_read_once(streams: int, threads: int) -> None:
    # No multiple of a block, so that parts and streams have remainders.
    words = torch.randint(-(2**63), 2**63 - 1, (100_003,), dtype=torch.int64)
    assert limits.read_words(words, streams, threads) == int(words.sum()) % 2**64


def test_rates_are_those_of_the_fastest_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 2**20)
    monkeypatch.setattr(limits, "ROUNDS", 1000)
    times = iter([0.5, 0.25, 1.0, 0.5, 0.002])
    monkeypatch.setattr(limits, "_seconds", lambda run: run() and next(times))
    has_bf16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    found = limits.measure(threads=2)
    assert found.read_bytes_per_second == 2**20 / 0.25
    # 2 threads, 1000 rounds of 16 instructions, each 32 multiply-adds.
    expected = 2 * 1000 * 16 * 64 / 0.002 if has_bf16 else None
    assert found.bf16_flop_per_second == expected


def test_a_machine_without_the_instruction_has_no_such_limit() -> None:
    found = limits.Limits(threads=1, read_bytes_per_second=21.4e9, bf16_flop_per_second=None)
    assert str(found) == "reads 21 GB/s"
