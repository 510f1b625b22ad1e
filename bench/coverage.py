"""Every MoE model type that transformers knows, and what camera-serve does with it.

    python -m bench.coverage

Writes the table in `docs/models.md`.
"""

import sys

from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from bench.stored import DOCS, put_in_page
from camera_serve.models.coverage import REFUSED, has_experts
from camera_serve.models.families import FAMILIES

PAGE = DOCS / "models.md"


def moe_model_types() -> set[str]:
    """Those whose config, as transformers fills it in, has settings of experts."""
    found = set()
    for model_type in CONFIG_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:  # Pairs of other models, and parts that another package describes.
            continue
        if has_experts(config):
            found.add(model_type)
    return found


def render() -> str:
    """The table: a line for the supported types, and one for each reason of the others."""
    rows = {"**supported**": sorted(FAMILIES)}
    for model_type, reason in sorted(REFUSED.items()):
        rows.setdefault(f"refused: {reason}", []).append(model_type)
    lines = [
        f"| {', '.join(f'`{name}`' for name in names)} | {what} |" for what, names in rows.items()
    ]
    return "\n".join(["| model types | |", "|---|---|", *lines])


def main() -> int:
    """Put the table in docs/models.md."""
    put_in_page(PAGE, "coverage", render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
