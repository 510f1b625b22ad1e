"""The model card of a compressed checkpoint: what it is, from what, how, and how to serve it."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from camera_serve.checkpoint.report import CompressionReport
from camera_serve.recipe import Recipe

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")

BODY = """
# {name}, compressed with CAMERA

The original is {original}.
[CAMERA](https://arxiv.org/abs/2508.02322) ranks the micro-experts of every MoE layer by their
decoding-time energy on calibration text. This checkpoint holds them by what they are worth:
{plan}. So every expert has its own widths.

| | original{in_16_bits} | this checkpoint |
|---|---|---|
| expert weights | {expert_before:.3f} GB | {expert_after:.3f} GB ({expert_saved:.1%} smaller) |
| whole model | {total_before:.3f} GB | {total_after:.3f} GB ({total_saved:.1%} smaller) |
{published}
Calibration: {samples} × {seq_len} tokens of `{source}`, α = {alpha}. `camera_recipe.yaml` holds all
settings, `camera_report.json` the kept widths and the tokens each expert saw.

## Use

    pip install 'camera-serve[vllm]'
    vllm serve PATH_OR_NAME_OF_THIS_MODEL

With transformers: `import camera_serve.hf`, then `{auto_class}.from_pretrained(...)`;
without that import transformers refuses this checkpoint. With lm-eval{in_transformers}:

    pip install 'camera-serve[vllm,evaluation]'
    export MODEL=PATH_OR_NAME_OF_THIS_MODEL
    lm_eval --model vllm --model_args pretrained=$MODEL --tasks wikitext
{lm_eval_hf}"""

LM_EVAL_HF = """\
    python -m camera_serve.hf lm_eval --model hf --model_args pretrained=$MODEL --tasks wikitext
"""


def model_card(source: Path, report: CompressionReport, auto_class: str) -> str:
    """README.md with metadata: `base_model`, its licence and language, and the figures.

    auto_class: which of transformers' classes loads the model.
    """
    data = ModelCardData(
        base_model=report.model,
        base_model_relation="quantized",
        library_name="vllm",
        tags=["camera", "moe", *_what_was_done(report)],
        **_inherited(source / "README.md"),
    )
    calibration = report.recipe.calibration
    # The only class that lm-eval scores text with in transformers.
    scored = auto_class == "AutoModelForCausalLM"
    body = BODY.format(
        auto_class=auto_class,
        in_transformers=", in vLLM or in transformers" if scored else ", in vLLM",
        lm_eval_hf=LM_EVAL_HF if scored else "",
        name=report.model.rsplit("/", 1)[-1],
        original=_original(report),
        plan=_plan(report.recipe),
        expert_before=report.expert_bytes_before / 1e9,
        expert_after=report.expert_bytes_after / 1e9,
        expert_saved=report.saved_of_experts,
        total_before=report.total_bytes_before / 1e9,
        total_after=report.total_bytes_after / 1e9,
        total_saved=report.saved_of_all,
        samples=calibration.samples,
        seq_len=calibration.seq_len,
        source=", ".join(Path(source).name for source in calibration.sources),
        alpha=report.recipe.alpha,
        **_stored(report),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _plan(recipe: Recipe) -> str:
    """What was kept, in words."""
    if recipe.plan:
        return f"`{recipe.plan}` (bits:share, most important first, 0 bits is removal)"
    return f"{recipe.goal}, 0 bits being removal"


def _original(report: CompressionReport) -> str:
    if report.revision is None:
        return f"`{report.model}`"
    page = f"https://huggingface.co/{report.model}"
    commit = f"[`{report.revision}`]({page}/tree/{report.revision})"
    return f"[`{report.model}`]({page}) at commit {commit}"


def _stored(report: CompressionReport) -> dict[str, str]:
    """What is said of an original that is published quantized."""
    if report.stored is None:
        return {"in_16_bits": "", "published": ""}
    size = report.stored.total_bytes / 1e9
    published = f"\nThe original is published as {report.stored.format}, in {size:.3f} GB.\n"
    return {"in_16_bits": ", in 16 bits", "published": published}


def _what_was_done(report: CompressionReport) -> list[str]:
    recipe = report.recipe
    return ["pruned"] * recipe.removes + ["quantized"] * bool(recipe.packed)


def _inherited(readme: Path) -> dict[str, Any]:
    if not readme.is_file():
        return {}
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return {key: data[key] for key in INHERITED if key in data}
