import math

from bench import reference
from bench.quality import drafts
from bench.quality.drafts import Answer
from bench.stored import stored


def row(draft: str, accepted: int, equal: int, gap: float) -> dict[str, object]:
    counts = {"drafts": 100, "draft_tokens": 300, "accepted_tokens": accepted}
    ends = {"equal_answers": equal, "largest_gap": gap}
    return {"draft": draft, "expert_bytes_left": 0.6, **counts, **ends}


RESULT = {
    "version": 1,
    "environment": {"cpu": "c", "vllm": "0", "commit": "abc"},
    "text": "code",
    "prompts": 20,
    "prompt_tokens": 64,
    "answer_tokens": 32,
    "speculative_tokens": 3,
    "rows": [row("--prune 0.4", 240, 20, 0.0)],
}


def test_the_table_shows_the_accepted_share_and_the_tokens_of_a_step() -> None:
    lines = drafts.render(RESULT).splitlines()
    assert lines[2] == "| `--prune 0.4` | 60% | 80% | 3.40 | 20 of 20 |"
    assert "differ" not in lines[-1]


def test_answers_that_differ_are_explained() -> None:
    rows = [*RESULT["rows"], row("--bits 2", 150, 18, 0.0313)]  # type: ignore[misc]
    lines = drafts.render({**RESULT, "rows": rows}).splitlines()
    assert lines[3] == "| `--bits 2` | 60% | 50% | 2.50 | 18 of 20 |"
    assert "The others differ first where the original gives both tokens" in lines[-1]
    assert "to within 0.031:" in lines[-1]


def test_the_gap_is_that_of_the_first_difference() -> None:
    top = ({1: -0.1, 2: -3.0}, {1: -0.5, 2: -0.75}, {1: -0.1, 2: -4.0})
    alone = Answer((1, 1, 1), top)
    assert drafts.gap(alone, alone) is None
    assert drafts.gap(alone, Answer((1, 2, 2), top)) == 0.25
    assert drafts.gap(alone, Answer((1, 7, 1), top)) == math.inf


def test_prompts_come_from_all_over_the_text() -> None:
    text = reference.HELDOUT[drafts.TEXT]
    prompts = drafts.prompts_of(reference.MODEL, text)
    assert [len(prompt) for prompt in prompts] == [64] * 20
    assert len(set(map(tuple, prompts))) == 20


def test_stored_drafts_are_of_the_original_to_within_a_rounding() -> None:
    result = stored(drafts.RESULTS, drafts.RESULT_VERSION)
    assert [row["draft"] for row in result["rows"]] == [
        *("--prune 0.2", "--prune 0.4", "--prune 0.6", "--bits 2")
    ]
    # Logits of this model lie below 32, where bfloat16 has steps of 2^-3.
    assert all(row["largest_gap"] <= 0.125 for row in result["rows"])
