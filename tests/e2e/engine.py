"""vLLM engines in a process of their own: `run` starts it, `python -m tests.e2e.engine` is it.

One process serves many checkpoints one after another, because importing vLLM takes longer than
building a tiny engine. The engines run eagerly and inside the process unless a job says otherwise;
with several ranks, each rank is such a process.
"""

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ([5, 9, 200, 31, 7], [17] * 3 + [300, 4, 88, 90, 41, 250], list(range(40, 90)), [3])
NUM_TOKENS = 8
SECONDS, SECONDS_PER_JOB, MOST_SECONDS = 300, 60, 1500
"""How long a process may take to begin, and an engine to answer; less than pytest's own limit."""

SECONDS_TO_WRITE = 2
_MODELS = "vllm.model_executor.models"
Prompts = Sequence[Sequence[int]]
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # `apply_model` sends a function to the workers.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class Job:
    """One engine: a checkpoint, the arguments of `vllm.LLM` beside the common ones, token ids.

    calls: what its workers are asked to do before the prompts, with arguments; forgotten: whether
    all weights are overwritten before that; refused: whether an error is what is wanted.
    """

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    prompts: Prompts = PROMPTS
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    forgotten: bool = False
    refused: bool = False


@dataclass(frozen=True)
class Answer:
    """Greedy tokens after one prompt, and the top-5 log-probabilities at each."""

    tokens: list[int]
    top: list[dict[str, float]]


@dataclass(frozen=True)
class Result:
    """Answers to the prompts; resident bytes of routed and packed shared experts, first rank.

    error: kind and message, where the job is one to be refused; drafts, drafted, accepted: how
    often tokens were guessed, how many, and how many of them stood, where the job speculates.
    """

    answers: list[Answer]
    expert_bytes: int
    error: str = ""
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0


def run(
    jobs: list[Job],
    folder: Path,
    ranks: int = 1,
    module: str = "tests.e2e.engine",
    **environment: str,
) -> list[Result]:
    """Serve the jobs in one new process for each rank; fails with its output when one fails.

    module: what is run, this one or one that prepares vLLM and then runs this one.
    """
    # A port for each: a rank that is ahead would still find the last engine at the same one.
    ports = _free_ports(len(jobs))
    work = [{"job": asdict(job), "port": port} for job, port in zip(jobs, ports, strict=True)]
    (folder / "work.json").write_text(json.dumps(work))
    environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    processes = [_start(module, folder, rank, environment) for rank in range(ranks)]
    try:
        problem = wait_for(processes, min(SECONDS + SECONDS_PER_JOB * len(jobs), MOST_SECONDS))
    finally:
        for process in processes:
            # Workers outlive an engine that failed.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(SECONDS)
    logs = [f"rank {rank}:\n{_log(folder, rank).read_text()[-6000:]}" for rank in range(ranks)]
    assert not problem, "\n".join([problem, *logs])
    return [
        Result(**{**result, "answers": [Answer(**answer) for answer in result["answers"]]})
        for result in json.loads((folder / "results.json").read_text())
    ]


def wait_for(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> str:
    """Wait until all ranks have ended well; what is wrong where one has not, empty otherwise.

    A rank whose peer has ended, or is stuck, waits for it for ever. Where time is up, those that
    still run write where they are into their logs (`faulthandler`).
    """
    deadline = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        if any(codes):
            return f"ranks ended with {codes} (None: it still ran)"
        if None not in codes:
            return ""
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    running = [rank for rank, code in enumerate(codes) if code is None]
    for rank in running:
        processes[rank].send_signal(signal.SIGUSR1)
    time.sleep(SECONDS_TO_WRITE)
    return f"ranks {running} of {len(processes)} still run after {seconds:.0f} s"


def _start(
    module: str, folder: Path, rank: int, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with _log(folder, rank).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT, **environment, **ranked},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _log(folder: Path, rank: int) -> Path:
    return folder / f"log-{rank}"


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _serve(job: Job) -> Result:
    from vllm import LLM, SamplingParams

    _inspect_here(_architectures(job))
    small = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 128}
    small |= {"kv_cache_memory_bytes": 64 * 2**20}
    small |= {"disable_log_stats": "speculative_config" not in job.arguments}
    engine = LLM(job.model, **{**small, "enforce_eager": True, "dtype": "float32", **job.arguments})
    if job.forgotten:
        engine.apply_model(_forget)
    for call, kwargs in job.calls.items():
        engine.collective_rpc(call, kwargs=kwargs)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job.prompts],
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=5, ignore_eos=True),
        use_tqdm=False,
    )
    expert_bytes = engine.apply_model(_expert_bytes)[0]
    counts = _draft_counts(engine) if "speculative_config" in job.arguments else {}
    gc.freeze()
    return Result([_answer(output.outputs[0]) for output in outputs], expert_bytes, **counts)


def _refused(job: Job) -> Result:
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        _serve(job)
    except Exception as error:
        return Result([], 0, f"{type(error).__name__}: {error}")
    finally:
        # An engine that did not start leaves its groups behind.
        cleanup_dist_env_and_memory()
    raise AssertionError(f"{job} was served")


def _forget(model: Any) -> None:
    for weight in model.parameters():
        weight.data.zero_()


def _answer(output: Any) -> Answer:
    top = [{str(t): e.logprob for t, e in entries.items()} for entries in output.logprobs]
    return Answer(list(output.token_ids), top)


def _draft_counts(engine: Any) -> dict[str, int]:
    names = {"drafts": "drafts", "drafted": "draft_tokens", "accepted": "accepted_tokens"}
    found = {metric.name: metric for metric in engine.get_metrics()}
    return {key: found[f"vllm:spec_decode_num_{name}"].value for key, name in names.items()}


def _expert_bytes(model: Any) -> int:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    from camera_serve.vllm_plugin.packed_shared import PackedLinearMethod

    sizes = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, RoutedExperts) or isinstance(method, PackedLinearMethod):
            for tensor in held_tensors([vars(module), method]):
                if _is_weight(tensor):
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def held_tensors(value: Any) -> Iterator[Any]:
    """Wherever a second copy of weights could hide: in containers and in this project's objects."""
    if hasattr(value, "untyped_storage"):
        yield value
        return
    if type(value).__module__.startswith("camera_serve."):
        value = vars(value)
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        for item in items:
            yield from held_tensors(item)


def _is_weight(tensor: Any) -> bool:
    """Matrices, and packed rows; not offsets, nor the router's bias that vLLM keeps beside them."""
    if tensor.is_floating_point():
        return bool(tensor.dim() > 1)
    return bool(tensor.element_size() < 8)


def _provide_torchvision() -> None:
    """Put torchvision on the path, which vLLM's models that see pictures import.

    PyPI's is linked to CUDA's libraries. Beside torch's CPU build it works but for the operators
    of its own library, and it asks for two of these by name while it is imported.
    """
    import torch

    sys.path.append(str(Path(sys.prefix) / "torchvision"))
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


def _architectures(job: Job) -> list[str]:
    """The model of a job, and what drafts for it where that is its own layer."""
    from vllm.config import SpeculativeConfig
    from vllm.transformers_utils.config import get_config

    names = json.loads((Path(job.model) / "config.json").read_text())["architectures"]
    if job.arguments.get("speculative_config", {}).get("method") == "mtp":
        config = get_config(job.model, trust_remote_code=False)
        names += SpeculativeConfig.hf_config_override(config).architectures
    return list(names)


def _inspect_here(architectures: list[str]) -> None:
    """Let vLLM look at model classes in this process: by default it starts one just for that."""
    from vllm.model_executor.models.registry import _VLLM_MODELS, ModelRegistry

    for architecture in architectures:
        module, name = _VLLM_MODELS[architecture]
        found = importlib.import_module(module if "." in module else f"{_MODELS}.{module}")
        ModelRegistry.register_model(architecture, getattr(found, name))
    # Where numba is imported, as Kimi-K2.5's pictures ask for, vLLM's CPU workers fail: they look
    # into every object of every module, and this one's takes `__dict__` for a C function.
    sys.modules.pop("llvmlite.binding.ffi", None)


def _main(folder: Path) -> None:
    results, all_work = [], json.loads((folder / "work.json").read_text())
    configs = [Path(work["job"]["model"]) / "config.json" for work in all_work]
    if any("vision_config" in json.loads(config.read_text()) for config in configs):
        _provide_torchvision()
    for work in all_work:
        os.environ["MASTER_PORT"] = str(work["port"])
        # vLLM collects garbage seven times for each engine: not among all that it imported.
        gc.freeze()
        job = Job(**work["job"])
        results.append(asdict(_refused(job) if job.refused else _serve(job)))
        for worker in multiprocessing.active_children():
            worker.kill()
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _main(Path(sys.argv[1]))
