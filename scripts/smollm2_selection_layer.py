"""Finds the layer of SmolLM2-135M at which TidalDecode should pick again, and writes the profile that ships.

python scripts/smollm2_selection_layer.py

On pieces of Python's language reference, the attention of tokens that follow a long prefix is taken from the exact
model. For every layer that could pick again, the share of each sparse layer's attention that falls on the tokens it
would read is averaged: the layer with the largest share is chosen.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DynamicCache

import fivefold
from fivefold.calibrate import Profile, save_profile, signature
from fivefold.evaluate.demo import document
from fivefold.models import smollm2

CONTEXT, QUERIES, TOP, FULL_LAYERS = 2048, 32, 256, 2
STARTS = (20_000, 160_000, 300_000, 440_000)


def main() -> None:
    model, tokenizer = smollm2.load()
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    layers = model.config.num_hidden_layers
    recall = torch.zeros(layers)
    for start in STARTS:
        text = document()[start : start + 8 * (CONTEXT + QUERIES)]
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : CONTEXT + QUERIES]
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model.set_attn_implementation("sdpa")
            model(ids[:, :CONTEXT], past_key_values=cache, logits_to_keep=1)
            model.set_attn_implementation("eager")
            attentions = model(ids[:, CONTEXT:], past_key_values=cache, output_attentions=True).attentions
        # [layer, kv_head, query, key]: the query heads of a kv head pick together.
        weights = torch.stack([a[0].unflatten(0, (-1, group)).sum(1) for a in attentions]) / group
        picked = weights.topk(TOP, -1).indices
        # share[i, j]: of layer j's attention, what falls on the tokens that layer i picks.
        share = torch.stack([weights.gather(-1, p.expand_as(weights[..., :TOP])).sum(-1).mean((1, 2)) for p in picked])
        for again in range(FULL_LAYERS + 1, layers):
            early, late = range(FULL_LAYERS + 1, again), range(again + 1, layers)
            covered = [share[FULL_LAYERS, j] for j in early] + [share[again, j] for j in late]
            recall[again] += torch.stack(covered).mean() / len(STARTS)
    best = int(recall.argmax())
    for again in range(FULL_LAYERS + 1, layers):
        print(f"layer {again:2d}: {recall[again]:.4f}{'  <-' if again == best else ''}")
    name = f"tidal-{signature(model.config)}"
    settings = {"context": CONTEXT, "queries": QUERIES, "top": TOP, "full_layers": FULL_LAYERS, "starts": list(STARTS)}
    tensors = {"layer": torch.tensor(best), "recall": recall}
    folder = Path(fivefold.__file__).parent / "profiles" / name
    save_profile(folder, Profile("tidal", signature(model.config), settings, tensors))
    print(folder)


if __name__ == "__main__":
    main()
