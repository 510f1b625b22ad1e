import pytest

from bench.stored import with_table
from camera_serve.errors import CameraError

START, END = "<!-- speed:start -->", "<!-- speed:end -->"


def test_only_the_text_between_the_markers_changes() -> None:
    assert with_table(f"a\n{START}\nold\n{END}\nb\n", "speed", "new") == (
        f"a\n{START}\nnew\n{END}\nb\n"
    )


@pytest.mark.parametrize("page", ["", f"a\n{START}\n", f"{END}\n", f"{END}\n{START}\n"])
def test_a_page_without_both_markers_is_not_touched(page: str) -> None:
    with pytest.raises(CameraError, match=f"put {START} and {END} in it"):
        with_table(page, "speed", "new")
