from pathlib import Path

import pytest
import torch

from bench.speed import limits

HAS_BF16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("streams", limits.STREAMS)
def test_every_word_is_read_once(streams: int, threads: int) -> None:
    # No multiple of a block, so that parts and streams have remainders.
    words = torch.randint(-(2**63), 2**63 - 1, (100_003,), dtype=torch.int64)
    assert limits.read_words(words, streams, threads) == int(words.sum()) % 2**64


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 3 * 2**20)
    monkeypatch.setattr(limits, "PART_BYTES", 2**20)
    monkeypatch.setattr(limits, "ROUNDS", 1000)


def test_rates_are_medians_of_the_best_of_a_few_tries(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruler = limits.Ruler(threads=2)
    times = iter([0.5, 0.9, 0.001, 0.9, 0.9, 0.25, 0.9, 0.004, 0.125, 0.9, 0.9, 0.002])
    monkeypatch.setattr(limits, "seconds", lambda run: run() and next(times))
    monkeypatch.setattr(limits, "TRIES", 2)
    if not HAS_BF16:
        monkeypatch.setattr(limits, "multiply_add", lambda rounds, threads: 1)
    for _ in range(3):
        ruler.measure()
    found = ruler.limits()
    assert (found.threads, found.read_bytes_per_second) == (2, 2**20 / 0.25)
    # 2 threads, 1000 rounds of 16 instructions, each 32 multiply-adds.
    expected = 2 * 1000 * 16 * 64 if HAS_BF16 else 1000
    assert found.bf16_flop_per_second == expected / 0.002


def test_every_part_is_read_in_turn(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ruler, read = limits.Ruler(threads=1), []

    def note(words: torch.Tensor, streams: int, threads: int) -> int:
        read.append((words.data_ptr(), words.nbytes))
        return 1

    monkeypatch.setattr(limits, "read_words", note)
    ruler.measure()
    assert limits.TRIES == 4 and len(set(read[:3])) == 3 and read[3] == read[0]
    assert sum(size for _, size in read[:3]) == 3 * 2**20


def test_several_are_summed_up_by_their_medians() -> None:
    found = limits.Limits.middle(
        limits.Limits(threads=2, read_bytes_per_second=read, bf16_flop_per_second=flop)
        for read, flop in ((3.0, 10.0), (1.0, 30.0), (2.0, 20.0))
    )
    assert (found.read_bytes_per_second, found.bf16_flop_per_second) == (2.0, 20.0)


def test_a_machine_without_the_instruction_has_no_such_limit() -> None:
    found = limits.Limits(threads=1, read_bytes_per_second=21.4e9, bf16_flop_per_second=None)
    assert str(found) == "reads 21 GB/s"
