"""What the kernel's build says when something it needs is not there."""

from pathlib import Path

import pytest

from camera_serve.errors import KernelBuildError
from camera_serve.kernels.cpu.build import cache_folder, compile_library, find_compiler


@pytest.mark.parametrize("named", [" ", "no-such-compiler -O3"])
def test_a_compiler_that_is_not_there_is_named(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    with pytest.raises(KernelBuildError, match=r"no C\+\+ compiler found \(looked for .*in CXX"):
        find_compiler()


def test_what_the_compiler_says_is_passed_on(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho too old >&2\nexit 3\n")
    compiler.chmod(0o755)
    with pytest.raises(KernelBuildError, match=r"failed with code 3: (.|\n)*too old"):
        compile_library([str(compiler)], tmp_path)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAMERA_SERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(KernelBuildError, match="in CAMERA_SERVE_CACHE"):
        cache_folder()
    monkeypatch.setenv("CAMERA_SERVE_CACHE", "/kept")
    assert cache_folder() == Path("/kept")
