"""CSKV's projections: the closed form against the paper's way, an activation-aware SVD that is fine-tuned.

    python benchmarks/cskv_fit.py [--layers 0 10 20] [--keep 0.2] [--tokens 8192] [--steps 2000]

Keys before RoPE and values of the embedded model are captured from two halves of the calibration text. For each layer,
A and B start from the ASVD of the projection's weights and are fine-tuned with Adam on the reconstruction loss (mean
square, all heads of the layer, cosine decay from 1e-3), as the paper does; the closed form is the leading eigenvectors
of the first half's second moments. Both are judged on the second half, in percent of the energy that is lost.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fivefold.calibrate.reading import chunks, default_texts
from fivefold.models import embedded
from fivefold.models.capture import capturing


def asvd(weight: torch.Tensor, inputs: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[hidden, rank]` and B `[rank, channels]` after the official `init_asvd`, alpha 0.5."""
    scale = (inputs.abs().mean(0) + 1e-6).sqrt()
    u, s, vt = torch.linalg.svd(scale[:, None] * weight.T, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root / scale[:, None], root[:, None] * vt[:rank]


def fine_tune(
    a: torch.Tensor, b: torch.Tensor, inputs: torch.Tensor, target: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    optimiser = torch.optim.Adam([a, b], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (512,), generator=generator)
        loss = (inputs[batch] @ a @ b - target[batch]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return a.detach(), b.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20])
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    model, tokenizer = embedded.load()
    seen: dict[int, dict[str, list[torch.Tensor]]] = {layer: {} for layer in args.layers}

    def see(layer: int, captured: dict[Any, torch.Tensor]) -> None:
        if layer in seen:
            for name, x in captured.items():
                flat = x[0] if name == "inputs" else x[0].transpose(0, 1).flatten(1)
                seen[layer].setdefault(name, []).append(flat)

    with torch.no_grad(), capturing(model, ("keys", "values", "inputs"), see):
        for piece in chunks(tokenizer, default_texts(), args.tokens, 0, None):
            model(input_ids=piece, use_cache=False, logits_to_keep=1)
    print("energy lost on other text, percent: layer, what, svd of the weights, asvd, fine-tuned, closed form")
    for layer, captured in seen.items():
        whole = {name: torch.cat(parts) for name, parts in captured.items()}
        half = len(whole["inputs"]) // 2
        inputs, others = whole["inputs"][:half], whole["inputs"][half:]
        for name, projection in (("keys", "k_proj"), ("values", "v_proj")):
            weight = getattr(model.model.layers[layer].self_attn, projection).weight.detach()
            target, wanted = whole[name][:half], whole[name][half:]
            rank = round(args.keep * model.config.head_dim) * model.config.num_key_value_heads
            plain = torch.linalg.svd(weight.T, full_matrices=False)
            first = plain[0][:, :rank] * plain[1][:rank], plain[2][:rank]
            start = asvd(weight, inputs, rank)
            tuned = fine_tune(*start, inputs, target, args.steps)
            basis = torch.linalg.eigh((target.T @ target).double())[1].flip(1)[:, :rank].float()
            lost = [float((others @ a @ b - wanted).square().sum()) for a, b in (first, start, tuned)]
            lost.append(float((wanted @ basis @ basis.T - wanted).square().sum()))
            total = float(wanted.square().sum())
            print(layer, name, *(f"{100 * x / total:.2f}" for x in lost), flush=True)


if __name__ == "__main__":
    main()
