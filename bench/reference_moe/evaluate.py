"""Measure the reference MoE and write its model card.

Perplexity on both held-out texts, dense and with random micro-experts zeroed, and a sample.
"""

import argparse
import json
import math
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from camera_serve.evaluation.perplexity import likelihood, load_model, windows_of

HERE = Path(__file__).parent
TEXTS = {name: HERE / f"heldout_{name}.txt" for name in ("code", "prose")}
PROMPT = 'def read_lines(path):\n    """Return'


def zero_micro_experts(model: Any, share: float, seed: int) -> None:
    """Zero the down columns of a random share of every layer's micro-experts, shared included."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        routed = layer.mlp.experts.down_proj.data  # [experts, d_model, d_ff]
        shared = layer.mlp.shared_expert.down_proj.weight.data  # [d_model, d_ff of shared]
        columns = routed.shape[0] * routed.shape[2]
        kept = torch.ones(columns + shared.shape[1], dtype=routed.dtype)
        kept[torch.randperm(len(kept), generator=generator)[: round(share * len(kept))]] = 0
        routed.mul_(kept[:columns].view(routed.shape[0], 1, routed.shape[2]))
        shared.mul_(kept[columns:])


def expert_shares(model: Any, rows: Tensor) -> list[list[float]]:
    """Return, per layer, the share of rows' [n, L] routed tokens that went to every expert."""
    counts: list[list[float]] = []

    def count(router: Any, _: tuple, output: tuple[Tensor, ...]) -> None:
        chosen = output[-1].flatten().bincount(minlength=router.num_experts)
        counts.append((chosen / chosen.sum()).tolist())

    hooks = [layer.mlp.gate.register_forward_hook(count) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=rows)
    for hook in hooks:
        hook.remove()
    return counts


def sample(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """Continue the prompt greedily."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def pruned_perplexities(
    folder: Path, rows: dict[str, list[Tensor]], share: float, seeds: int
) -> dict[str, list[float]]:
    """Return, per text, the perplexity with a random share of micro-experts zeroed, by seed."""
    results: dict[str, list[float]] = {name: [] for name in rows}
    for seed in range(seeds):
        model = load_model(folder)
        zero_micro_experts(model, share, seed)
        for name, windows in rows.items():
            results[name].append(math.exp(likelihood(model, windows).mean))
    return results


def measure(folder: Path, share: float, seeds: int) -> dict:
    """Return every figure of the model card."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_model(folder)
    rows = {name: windows_of(folder, path) for name, path in TEXTS.items()}
    dense = {name: likelihood(model, windows) for name, windows in rows.items()}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "predictions": {name: int(result.tokens.sum()) for name, result in dense.items()},
        "perplexity": {name: math.exp(result.mean) for name, result in dense.items()},
        "expert_shares": expert_shares(model, torch.cat(rows["code"][:4])),
        "sample": sample(model, tokenizer),
        "pruned_share": share,
        "pruned_perplexity": pruned_perplexities(folder, rows, share, seeds),
    }


def card(figures: dict, log: list[dict]) -> str:
    """Fill the model card's template with the figures and the last line of the log."""
    last = log[-1]
    pruned = {n: ", ".join(f"{p:.2f}" for p in figures["pruned_perplexity"][n]) for n in TEXTS}
    shares = "; ".join(f"{min(s):.1%} to {max(s):.1%}" for s in figures["expert_shares"])
    return Template((HERE / "card.md").read_text("utf-8")).substitute(
        parameters=f"{figures['parameters']:,}",
        bytes=f"{figures['bytes']:,}",
        tokens=f"{last['tokens'] / 1e6:.1f}",
        steps=f"{last['step']:,}",
        minutes=f"{last['seconds'] / 60:.0f}",
        loss=f"{last['loss']:.3f}",
        code=f"{figures['perplexity']['code']:.2f}",
        prose=f"{figures['perplexity']['prose']:.2f}",
        code_predictions=f"{figures['predictions']['code']:,}",
        prose_predictions=f"{figures['predictions']['prose']:,}",
        share=f"{figures['pruned_share']:.0%}",
        pruned_code=pruned["code"],
        pruned_prose=pruned["prose"],
        usage=shares,
        sample=figures["sample"],
    )


def main() -> None:
    """Write the model card and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--log", type=Path, default=HERE / "training_log.jsonl")
    parser.add_argument("--share", type=float, default=0.2, help="micro-experts to zero")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    figures = measure(options.model, options.share, options.seeds)
    log = [json.loads(line) for line in options.log.read_text("utf-8").splitlines()]
    (options.model / "README.md").write_text(card(figures, log), encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
