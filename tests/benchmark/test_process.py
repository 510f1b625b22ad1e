import os
import signal
import sys
from pathlib import Path

import pytest

from camera_serve.benchmark import process
from camera_serve.benchmark.process import VllmError, running, termination_as_exit, vllm_command
from tests.benchmark import fake_vllm


def test_the_command_beside_python_is_taken_before_one_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("environment", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vllm").write_text("#!/bin/sh\n")
        (tmp_path / name / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "environment" / "python"))
    assert vllm_command() == str(tmp_path / "environment" / "vllm")
    (tmp_path / "environment" / "vllm").unlink()
    assert vllm_command() == str(tmp_path / "path" / "vllm")
    (tmp_path / "path" / "vllm").unlink()
    with pytest.raises(VllmError, match=r"no vllm command here: pip install"):
        vllm_command()


def test_a_setting_of_the_user_goes_over_the_default_and_under_the_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-31")
    found = process.environment({"VLLM_CPU_OMP_THREADS_BIND": "0"})
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "40"
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0"
    assert found["VLLM_NO_USAGE_STATS"] == "1"


def test_a_process_that_ignores_sigterm_is_killed_even_when_waiting_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    fake_vllm.install(monkeypatch, tmp_path, f"{deaf}; time.sleep(600)")
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt), running(log=log) as started:
        while log.read_text() != "1\n":
            assert started.poll() is None
        monkeypatch.setattr(started, "wait", _interrupted(started.wait))
    assert not fake_vllm.is_alive(started.pid)


def _interrupted(wait):  # type: ignore[no-untyped-def]
    def first(timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return int(wait())

    return first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_lets_blocks_end_first(number: signal.Signals) -> None:
    # These tests may run under nohup.
    signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    ended = False
    with pytest.raises(SystemExit) as caught, termination_as_exit():
        try:
            os.kill(os.getpid(), number)
        finally:
            ended = True
    assert ended and caught.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_under_nohup_a_hangup_is_still_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_as_exit():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
