"""`keep_fp8`: outside the experts, an FP8 original's own bytes; everything else as without it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from camera_serve.converters.dense import convert_to_dense
from safetensors.torch import load_file, save_file

from camera_serve import Calibration, Recipe, TierPlan, compress, estimate
from camera_serve.checkpoint.reader import Checkpoint, read_json
from camera_serve.errors import CheckpointError, OutputError, RecipeError
from camera_serve.evaluation.inspection import inspect
from camera_serve.evaluation.verification import verify
from camera_serve.progress import Progress
from tests import tiny_models
from tests.editing import WEIGHTS, Tensors, digest, edit_config, edit_weights
from tests.keep_fp8 import PER_TENSOR
from tests.originals import FP8_BLOCKS, WAYS, Published, fp8_whole, publish

QUERY = "model.layers.1.self_attn.q_b_proj.weight"


def add_draft(tensors: Tensors) -> None:
    last = [name for name in tensors if name.startswith("model.layers.2.")]
    tensors |= {name.replace(".2.", ".3.", 1): tensors[name].clone() for name in last}
    tensors["model.layers.3.eh_proj.weight"] = torch.eye(64, 128, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_models.save("deepseek_v3", tmp_path_factory.mktemp("models") / "dense")
    edit_weights(path, add_draft)
    return path


@pytest.fixture(scope="module", params=["blocks", "per tensor"])
def fp8(request: pytest.FixtureRequest, dense: Path) -> Path:
    path = dense.with_name(request.param)
    publish(dense, path, FP8_BLOCKS if request.param == "blocks" else PER_TENSOR)
    return path


@pytest.fixture(scope="module")
def outputs(fp8: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What becomes of it with `keep_fp8`, and without."""
    folder = tmp_path_factory.mktemp("outputs")
    compress(fp8, folder / "kept", recipe(text))
    compress(fp8, folder / "decoded", recipe(text, keep_fp8=False))
    return folder / "kept", folder / "decoded"


@pytest.fixture
def kept(outputs: tuple[Path, Path], tmp_path: Path) -> Path:
    """An output of the test's own, its files in one, without the report that knows their bytes."""
    path, tensors = tmp_path / "kept", stored(outputs[0])
    path.mkdir()
    for file in outputs[0].iterdir():
        if not file.name.startswith(("model", "camera")):
            (path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path


def recipe(text: Path, plan: str = "16:0.6,0:0.4", **changes: Any) -> Recipe:
    calibration = Calibration(source=str(text), samples=4, seq_len=64)
    settings: dict[str, Any] = {"calibration": calibration, "align": 4, "keep_fp8": True}
    return Recipe.paper(plan=TierPlan.parse(plan), **settings | changes)


def stored(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_what_is_outside_the_experts_has_the_bytes_of_the_original(
    fp8: Path, outputs: tuple[Path, Path]
) -> None:
    before, after, plain = stored(fp8), stored(outputs[0]), stored(outputs[1])
    outside = read_json(outputs[0] / "config.json")["quantization_config"]["outside_experts"]
    # Four of the attention in each of 3 layers, and the MLP of the dense one; q_a and kv_a too.
    assert len(outside["modules"]) == 3 * 5 + 3
    for module in outside["modules"]:
        name, scale = f"{module}.weight", f"{module}.weight{suffix_of(outside)}"
        assert after[name].dtype == torch.float8_e4m3fn
        assert bytes_of(after[name]) == bytes_of(before[name])
        assert bytes_of(after[scale]) == bytes_of(before[scale])
        del after[name], after[scale], plain[name]
    assert after.keys() == plain.keys()
    for name, tensor in plain.items():
        assert after[name].equal(tensor), name
        assert tensor.dtype in (torch.bfloat16, torch.float32)


def suffix_of(outside: dict[str, Any]) -> str:
    return "_scale_inv" if outside.get("weight_block_size") else "_scale"


def test_it_is_read_as_the_same_weights_in_16_bits(outputs: tuple[Path, Path]) -> None:
    found, wanted = (Checkpoint.open(path) for path in outputs)
    assert found.entries.keys() == wanted.entries.keys()
    for name in wanted.entries:
        assert found.get(name).equal(wanted.get(name)), name


def test_its_size_is_what_lies_on_the_disk(
    fp8: Path, text: Path, outputs: tuple[Path, Path]
) -> None:
    on_disk = sum(tensor.nbytes for tensor in stored(outputs[0]).values())
    report = read_json(outputs[0] / "camera_report.json")
    assert report["total_bytes_after"] == on_disk == inspect(outputs[0]).total_bytes
    assert estimate(fp8, recipe(text), device="cpu").output_bytes == on_disk
    index = read_json(outputs[0] / f"{WEIGHTS}.index.json")
    assert index["metadata"]["total_size"] == on_disk
    assert index["weight_map"].keys() == stored(outputs[0]).keys()


def test_it_is_verified_and_converted_like_any_other(
    fp8: Path, outputs: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = fp8.with_name(f"{fp8.name}-16bit")
    for original in (fp8, copy):
        assert verify(outputs[0], original).layers == verify(outputs[1], original).layers
    for output, name in zip(outputs, ("a", "b"), strict=True):
        convert_to_dense(output, tmp_path / name)
    weights = [
        {n: h for n, h in digest(tmp_path / name).items() if n.endswith(".safetensors")}
        for name in ("a", "b")
    ]
    assert weights[0] == weights[1] != {}


@pytest.mark.parametrize("part", ["", "scale"])
def test_a_flipped_bit_is_found(fp8: Path, kept: Path, part: str) -> None:
    config = read_json(kept / "config.json")["quantization_config"]["outside_experts"]
    name = f"{QUERY}{suffix_of(config)}" if part else QUERY

    def flip(tensors: Tensors) -> None:
        # The last bit of a float32 scale: weights in bf16 do not show it.
        tensors[name].flatten().view(torch.uint8)[0] ^= 1

    verify(kept, fp8)
    edit_weights(kept, flip)
    with pytest.raises(CheckpointError, match=f"tensor {name}, row 0 differs from"):
        verify(kept, fp8)


def test_recipes_without_it_are_written_as_before(outputs: tuple[Path, Path]) -> None:
    kept, decoded = (read_json(path / "config.json")["quantization_config"] for path in outputs)
    assert kept["recipe"]["keep_fp8"] is True
    assert "keep_fp8" not in decoded["recipe"]
    assert "outside_experts" not in decoded
    assert "keep_fp8" not in (outputs[1] / "camera_recipe.yaml").read_text()
    assert Recipe.load(outputs[0] / "camera_recipe.yaml").keep_fp8
    assert "keep_fp8" not in json.dumps(read_json(outputs[1] / "camera_report.json"))


def test_a_run_without_it_is_not_resumed_with_it(fp8: Path, text: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 1:
            raise KeyboardInterrupt

    wanted = recipe(text, keep_fp8=False)
    with pytest.raises(KeyboardInterrupt):
        compress(fp8, tmp_path / "out", wanted, on_progress=stop)
    with pytest.raises(OutputError, match="keep_fp8: then unset, now True"):
        compress(fp8, tmp_path / "out", recipe(text), resume=True)
    compress(fp8, tmp_path / "out", wanted, resume=True)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("int4 groups", "is published as compressed-tensors .int4 in groups"),
        ("fp8 per tensor", "has static scales of activations"),
        ("compressed-tensors fp8 blocks", "is published as compressed-tensors .FP8 in blocks"),
    ],
)
def test_what_cannot_be_kept_is_said(way: str, message: str, text: Path, tmp_path: Path) -> None:
    dense = tiny_models.save("qwen3_moe", tmp_path / "dense")
    publish(dense, tmp_path / "model", WAYS[way])
    for run in (lambda: estimate(tmp_path / "model", recipe(text)), _compressing(tmp_path, text)):
        with pytest.raises(RecipeError, match=f"--keep-fp8: .* {message}.*without --keep-fp8"):
            run()


def _compressing(tmp_path: Path, text: Path) -> Callable[[], object]:
    return lambda: compress(tmp_path / "model", tmp_path / "out", recipe(text))


def test_16_bit_originals_and_scales_per_row_cannot_be_kept(text: Path, tmp_path: Path) -> None:
    dense = tiny_models.save("qwen3_moe", tmp_path / "dense")
    with pytest.raises(RecipeError, match="holds 16-bit weights"):
        compress(dense, tmp_path / "out", recipe(text))
    way = Published(fp8_whole("_scale", lambda rows: (rows, 1)), PER_TENSOR.config)
    publish(dense, tmp_path / "model", way)
    with pytest.raises(RecipeError, match=r"a scale per row of .*k_proj"):
        compress(tmp_path / "model", tmp_path / "out", recipe(text))


def _listed(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["outside_experts"]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s: t.pop(f"{QUERY}{s}"), f"{QUERY}_scale(_inv)? is missing"),
        (lambda t, s: t.pop(QUERY), f"{QUERY} is missing"),
        (
            lambda t, s: t.update({f"{QUERY}{s}": torch.ones(7, 7)}),
            rf"{QUERY}_scale(_inv)? has shape \[7, 7\], wanted",
        ),
        (
            lambda t, s: (t.pop(f"{QUERY}{s}"), t.update({QUERY: t[QUERY].bfloat16()})),
            f"{QUERY} is stored as BF16, but quantization_config lists its module among outs",
        ),
    ],
)
def test_an_output_whose_parts_do_not_fit_is_refused(
    kept: Path, change: Callable[[Tensors, str], object], message: str
) -> None:
    suffix = suffix_of(_listed(read_json(kept / "config.json")))
    edit_weights(kept, lambda tensors: change(tensors, suffix))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(kept)


def test_fp8_that_the_config_does_not_list_is_refused(kept: Path) -> None:
    edit_config(
        kept, lambda config: _listed(config)["modules"].remove(QUERY.removesuffix(".weight"))
    )
    with pytest.raises(CheckpointError, match=f"tensor {QUERY}_scale(_inv)? is not part of"):
        Checkpoint.open(kept)


def test_a_listed_module_that_does_not_exist_is_refused(kept: Path) -> None:
    edit_config(
        kept, lambda config: _listed(config)["modules"].append("model.layers.1.self_attn.z")
    )
    with pytest.raises(CheckpointError, match=r"self_attn\.z\.weight is missing, but"):
        Checkpoint.open(kept)


def test_only_what_vllm_serves_in_fp8_stays_in_it(text: Path, tmp_path: Path) -> None:
    """Not the router, which is a matrix of a decoder layer as well."""
    dense = tiny_models.save("deepseek_v3", tmp_path / "dense")
    blocks = replace(FP8_BLOCKS, quantized=f"{FP8_BLOCKS.quantized}|.*mlp.gate.weight")
    publish(dense, tmp_path / "fp8", blocks)
    assert Checkpoint.open(tmp_path / "fp8").entries["model.layers.1.mlp.gate.weight"].coding
    compress(tmp_path / "fp8", tmp_path / "out", recipe(text))
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert "model.layers.1.self_attn.o_proj" in config["outside_experts"]["modules"]
    assert not [m for m in config["outside_experts"]["modules"] if m.endswith(".mlp.gate")]


def test_a_family_whose_fp8_layers_vllm_cannot_name_is_refused(text: Path, tmp_path: Path) -> None:
    publish(tiny_models.save("deepseek", tmp_path / "dense"), tmp_path / "fp8", FP8_BLOCKS)
    with pytest.raises(RecipeError, match="names no attention layer: start without --keep-fp8"):
        compress(tmp_path / "fp8", tmp_path / "out", recipe(text))
