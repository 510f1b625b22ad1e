"""`camera-serve compress`: CAMERA on a model folder, into a checkpoint that vLLM serves."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from camera_serve.cli.formatting import human_bytes, human_seconds, percent, skipped_line
from camera_serve.cli.options import (
    BUDGETS,
    CALIBRATION_FLAGS,
    RUN_FLAGS,
    SOLVERS,
    BitsType,
    SizeType,
    output_option,
    recipe_from,
    with_flags,
)
from camera_serve.cli.progress import shown_progress
from camera_serve.errors import quoted

if TYPE_CHECKING:
    from camera_serve.checkpoint.report import CompressionReport, StoredOriginal
    from camera_serve.compression.sizing import Allocation, Estimate
    from camera_serve.recipe import Recipe


@click.command(short_help="Compress a MoE model into a checkpoint that `vllm serve` loads.")
@click.argument("model")
@output_option
@click.option(
    "--prune", type=float, metavar="SHARE", help="Remove this share of all micro-experts."
)
@click.option(
    "--bits",
    type=int,
    metavar="B",
    help="Quantize to B bits (1 to 3) on average: tiers of B+1, B and B-1 bits.",
)
@click.option(
    "--tier-ratio",
    type=float,
    default=0.2,
    show_default=True,
    help="With --bits: the share of micro-experts in the highest, and in the lowest tier.",
)
@click.option(
    "--plan",
    metavar="BITS:SHARE,…",
    help="The tier plan, most important first: 16:0.6,0:0.4 is the same as --prune 0.4, "
    "3:0.2,2:0.6,1:0.2 the same as --bits 2.",
)
@click.option(
    "--bits-per-weight",
    type=float,
    metavar="B",
    help="Let the experts take so many bits per weight of the original, scales and zeros counted, "
    "at the bits for each micro-expert that serve the model best.",
)
@click.option(
    "--size",
    type=SizeType(),
    metavar="SIZE",
    help="The same for all weights of the checkpoint together: 12GB, or 11.5GiB.",
)
@click.option(
    "--allow",
    type=BitsType(),
    metavar="BITS,…",
    default="16,8,4,3,2,1,0",
    show_default=True,
    help="With --bits-per-weight or --size: the bits to choose from; 0 is removal.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="All settings from a file, such as the camera_recipe.yaml of an earlier run.",
)
@click.option(
    "--budget",
    type=click.Choice(BUDGETS),
    default="model",
    show_default=True,
    help="Whose micro-experts the shares of --prune, --bits and --plan are of.",
)
@click.option(
    "--sweeps",
    type=int,
    default=0,
    show_default=True,
    help="After pruning, fit each layer as a whole so many times more.",
)
@click.option(
    "--paper",
    is_flag=True,
    help="The published algorithm to the letter: by energy alone, a share of every layer, nothing "
    "fitted afterwards.",
)
@click.option(
    "--align",
    type=int,
    default=32,
    show_default=True,
    help="Every expert's width in every tier is a multiple of this.",
)
@click.option(
    "--group-size",
    type=int,
    default=128,
    show_default=True,
    help="Weights of a micro-expert that share a scale and a zero, in tiers below 16 bits.",
)
@click.option(
    "--solver",
    type=click.Choice(SOLVERS),
    default="gptq",
    show_default=True,
    help="How codes are chosen: gptq, or rtn (round to nearest).",
)
@click.option(
    "--keep-fp8",
    is_flag=True,
    help="Of a model that is published in FP8, keep what is outside the experts in FP8; else it is "
    "written in 16 bits.",
)
@with_flags(CALIBRATION_FLAGS)
@click.option(
    "--analysis",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="What camera-serve analyze wrote of MODEL, in place of a pass over it: one serves any "
    "number of sizes. Its calibration flags are taken where none are given.",
)
@with_flags(RUN_FLAGS)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print sizes, memory, disk and time, with --analysis also the bits that micro-experts "
    "get; write nothing.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run, to the same bytes.")
@click.pass_context
def compress(ctx: click.Context, model: str, output: Path, **flags: Any) -> None:
    """Compress MODEL, a local folder or a hub name, into the new folder given with -o.

    Exactly one of --prune, --bits, --plan, --bits-per-weight, --size and --recipe says what to
    keep, and at how many bits.
    """
    recipe = recipe_from(ctx)
    if flags["dry_run"]:
        _estimate(model, recipe, flags["device"], flags["analysis"])
        return
    from camera_serve import compress as run

    with shown_progress() as on_progress:
        report = run(
            model,
            output,
            recipe,
            device=flags["device"],
            analysis=flags["analysis"],
            resume=flags["resume"],
            overwrite=flags["overwrite"],
            on_progress=on_progress,
            on_note=_show_note,
        )
    click.echo(_summary(report, output))


def _show_note(note: str) -> None:
    click.echo(note, err=True)


def _estimate(model: str, recipe: "Recipe", device: str, analysis: Path | None) -> None:
    from camera_serve import estimate

    found = estimate(model, recipe, device=device, analysis=analysis, on_note=_show_note)
    click.echo(_estimate_summary(found))
    click.echo("nothing was written; next: the same command without --dry-run")


def _estimate_summary(estimate: "Estimate") -> str:
    experts = f"{human_bytes(estimate.expert_bytes_before)} -> "
    parts = (
        (estimate.layer_bytes, "of weights"),
        (estimate.mapped_bytes, "of mapped files"),
        (estimate.tier_bytes, "of finished experts"),
    )
    lines = [
        ("expert weights", experts + _size(estimate, estimate.expert_bytes_after)),
        ("checkpoint", _size(estimate, estimate.output_bytes)),
        *_allocation_lines(estimate.allocation),
        *_stored_lines(estimate.stored, estimate.output_bytes),
        ("peak memory", f"{human_bytes(estimate.peak_memory_bytes)}, beside Python and torch"),
        ("  one layer", ", ".join(f"{human_bytes(size)} {what}" for size, what in parts)),
    ]
    if estimate.layers_at_once > 1:
        lines.append(("  twice", "weights and files: the next layer is read while one computes"))
    if estimate.solver_bytes:
        at_once = f"for {estimate.experts_at_once} of {estimate.num_experts} experts at a time"
        lines.append(("  solver", f"{human_bytes(estimate.solver_bytes)} {at_once}"))
    lines += [
        ("disk needed", human_bytes(estimate.disk_bytes)),
        ("time", f"about {human_seconds(estimate.seconds)}"),
    ]
    return "\n".join(f"{name:<15} {value}" for name, value in lines)


def _size(estimate: "Estimate", num_bytes: int) -> str:
    """How sure it is: of a size it is a limit until the model has been analyzed."""
    if estimate.allocation:
        return f"{human_bytes(num_bytes)} ({num_bytes:,} bytes)"
    if not estimate.spare_bytes:
        return human_bytes(num_bytes)
    share = estimate.spare_bytes / num_bytes
    near = "0.1%" if share <= 0.001 else human_bytes(estimate.spare_bytes)
    return f"at most {human_bytes(num_bytes)}, within {near}"


def _allocation_lines(allocation: "Allocation | None") -> list[tuple[str, str]]:
    """The tiers that a model gets, and what that is expected to lose."""
    if allocation is None:
        return []
    every = sum(allocation.micro_experts.values())
    lines = [
        (
            f"  {bits} bit{'s' if bits > 1 else ''}" if bits else "  removed",
            f"{count:,} of {every:,} micro-experts, {percent(count / every)}",
        )
        for bits, count in allocation.micro_experts.items()
        if count
    ]
    loss = f"{100 * allocation.expected_loss:.3g}% of what the micro-experts add to the model"
    return [*lines, ("expected loss", loss)]


def _summary(report: "CompressionReport", output: Path) -> str:
    experts = _change(report.expert_bytes_before, report.expert_bytes_after)
    total = _change(report.total_bytes_before, report.total_bytes_after)
    lines = [f"{'expert weights':<15} {experts}", f"{'all weights':<15} {total}"]
    stored = _stored_lines(report.stored, report.total_bytes_after)
    lines += [f"{name:<15} {value}" for name, value in stored]
    lines += [skipped_line(report.skipped)] if report.skipped else []
    lines += _error_lines(report)
    more = "give more calibration text if they matter"
    if unseen := [len(r.unseen_experts) for r in report.layers if r.unseen_experts]:
        lines.append(
            "experts that saw no calibration token and were ranked last: "
            f"{sum(unseen)}, in {len(unseen)} of {len(report.layers)} layers; {more}"
        )
    rounded = sum(len(r.rounded_experts) for r in report.layers)
    if rounded and report.recipe.solver == "gptq":
        lines.append(
            "experts that saw too few calibration tokens for GPTQ and were rounded to nearest: "
            f"{rounded} (inspect shows the least seen); {more}"
        )
    lines += [_refused_line(report)] if any(_refused(report).values()) else []
    where = ", on a GPU or a CPU with AMX, as it holds FP8" if report.recipe.keep_fp8 else ""
    lines.append(f"wrote {output}; next{where}: vllm serve {quoted(output)}")
    return "\n".join(lines)


def _refused(report: "CompressionReport") -> dict[str, int]:
    """How many experts each step has left to the paper's own, as it would not have been better."""
    return {
        "ranked by energy": sum(len(r.ranked_by_energy) for r in report.layers),
        "not refitted": sum(len(r.unfitted_experts) for r in report.layers),
        "not compensated": sum(len(r.uncompensated_experts) for r in report.layers),
        "not polished": sum(len(r.unpolished_experts) for r in report.layers),
    }


def _refused_line(report: "CompressionReport") -> str:
    parts = ", ".join(f"{count} {what}" for what, count in _refused(report).items() if count)
    return (
        f"experts whose tokens do not bear a step out, so that it was left out: {parts} "
        f"(camera_report.json names them); more calibration text bears out more"
    )


def _error_lines(report: "CompressionReport") -> list[str]:
    """What was expected to be lost and what was, where both are known."""
    known = [
        (layer.predicted_error, layer.output_error, layer.layer)
        for layer in report.layers
        if layer.predicted_error is not None and layer.output_error is not None
    ]
    if not known:
        return []
    expected, found = (sum(errors) / len(known) for errors in list(zip(*known, strict=True))[:2])
    furthest = max(known, key=lambda layer: abs(layer[1] - layer[0]))
    return [
        f"{'lost energy':<15} {percent(found)} on average over {len(known)} layers, "
        f"{percent(expected)} expected; furthest off is {furthest[2]}: {percent(furthest[1])}, "
        f"{percent(furthest[0])} expected"
    ]


def _stored_lines(stored: "StoredOriginal | None", after: int) -> list[tuple[str, str]]:
    """What an original that is published quantized takes in its files, beside its 16-bit size."""
    if stored is None:
        return []
    share = after / stored.total_bytes - 1
    change = f"{percent(abs(share))} {'larger' if share > 0 else 'smaller'} than that"
    return [
        ("published as", f"{stored.format}; above it is counted in 16 bits"),
        (
            "  bytes",
            f"{human_bytes(stored.total_bytes)}, {human_bytes(stored.expert_bytes)} of them "
            "in experts",
        ),
        ("  checkpoint", change),
    ]


def _change(before: int, after: int) -> str:
    share = percent(1 - after / before)
    return f"{human_bytes(before)} -> {human_bytes(after)} ({share} smaller)"
