from pathlib import Path

from camera_serve.benchmark.memory import model_bytes, peak_resident_bytes, resident_bytes


def _process(proc: Path, pid: int, name: str, session: int, peak: int, now: int) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) S 1 {session} {session} 0 -1 4194304\n")
    status = f"Name:\t{name}\nVmPeak:\t 999999 kB\nVmHWM:\t  {peak} kB\nVmRSS:\t  {now} kB\n"
    (proc / str(pid) / "status").write_text(status)


def test_memory_is_that_of_all_processes_of_the_session_and_no_other(tmp_path: Path) -> None:
    _process(tmp_path, 10, "vllm", session=10, peak=100, now=90)
    _process(tmp_path, 11, "VLLM::Worker (0) 7 8", session=10, peak=2000, now=1500)
    _process(tmp_path, 12, "other", session=12, peak=50000, now=50000)
    (tmp_path / "13").mkdir()
    assert peak_resident_bytes(10, tmp_path) == 2100 * 1024
    assert resident_bytes(10, tmp_path) == 1590 * 1024


def test_without_processes_memory_is_unknown(tmp_path: Path) -> None:
    assert peak_resident_bytes(10, tmp_path) is None
    assert resident_bytes(10, tmp_path / "no_proc") is None


def test_the_model_s_own_memory_is_what_the_log_says() -> None:
    log = (
        "INFO 11-22 [gpu_model_runner.py:5150] Model loading took 56.93 GiB memory and 9.2 seconds"
    )
    assert model_bytes(log) == round(56.93 * 2**30)
    assert model_bytes("INFO loaded") is None
