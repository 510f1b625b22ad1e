"""Write a model of a published shape with random weights.

    python -m bench.shapes qwen3-30b-a3b OUT [--layers 4] [--vocab 12288] [--plan 16:0.6,0:0.4]

Writes a model that `vllm serve` and `vllm bench` load, dense, or compressed by a plan without any
calibration: energies are drawn with the spread that was measured on the reference MoE.
"""

import argparse
import sys
import time
from pathlib import Path

from bench.shapes.published import ALIGN, SHAPES
from bench.shapes.random_model import write_model
from camera_serve.errors import CameraError, RecipeError
from camera_serve.recipe import Calibration, Recipe, TierPlan


def main() -> int:
    """Write a model; a mistake of the user ends with one line, and 2 where a flag is wrong."""
    options = _parse_options()
    shape, start = SHAPES[options.shape], time.monotonic()
    try:
        written = write_model(
            shape,
            options.output,
            layers=options.layers or shape.layers,
            vocab=options.vocab or shape.vocab,
            recipe=_recipe(options),
            seed=options.seed,
            balanced=options.balanced,
        )
    except CameraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    print(f"wrote {options.output}: {written / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.shapes")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--layers", type=_positive, help="default: 2 or 4, by shape")
    parser.add_argument(
        "--vocab", type=_positive, help="default: as many as weigh like the real head"
    )
    parser.add_argument("--plan", help="a tier plan such as 16:0.6,0:0.4; default: dense")
    parser.add_argument("--align", type=_positive, default=ALIGN)
    parser.add_argument("--group-size", type=_positive, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--balanced",
        action="store_true",
        help="all experts see as many tokens; default: those with more energy see more",
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _recipe(options: argparse.Namespace) -> Recipe | None:
    if options.plan is None:
        return None
    return Recipe.paper(
        plan=TierPlan.parse(options.plan),
        calibration=Calibration(source="none: energies were drawn", seed=options.seed),
        align=options.align,
        group_size=options.group_size,
    )


if __name__ == "__main__":
    sys.exit(main())
