"""One model over several devices: the greedy tokens must be those of one GPU.

    python benchmarks/several_devices.py [--json FILE]

A random Llama (8 layers, 4 query heads a KV head, head_dim 64) runs on one GPU; split over two by accelerate; and with
its weights on the host, brought to the GPU layer by layer (`cpu_offload`). Needs two NVIDIA GPUs and accelerate.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, dispatch_model
from transformers import LlamaConfig, LlamaForCausalLM

import fivefold
from fivefold.benchmark import machine

LAYERS = 8
RECIPES = (
    "full()", "kivi(bits=2)", "kivi(bits=4, residual=32)", "streaming(sink=4, recent=100) + kivi(bits=4, residual=32)",
    f"duo(retrieval={[[i, i % 2] for i in range(LAYERS)]}, sink=4, recent=64) + kivi(bits=4, residual=32)",
    "h2o(keep=0.5)", "snapkv(keep=0.5)", "d2o(keep=0.5)", "mikv()", "gear()",
)  # fmt: skip
PROMPT, NEW = 300, 150


def build() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, initializer_range=0.08,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def split(model: Any) -> Any:
    """Half of the layers on each of two GPUs."""
    where: dict[str, int] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    where |= {f"model.layers.{i}": int(i >= LAYERS // 2) for i in range(LAYERS)}
    return dispatch_model(model, device_map=where)


def tokens(model: Any, recipe: str, ids: torch.Tensor, graph: bool) -> tuple[list[list[int]], str]:
    """Greedy tokens of a batch, and why steps did not run as a graph."""
    cache = fivefold.compress(model, recipe, cuda_graph=graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    why = "" if cache.step is None else cache.step.failed or f"{cache.step.replays} replays"
    cache.free()
    fivefold.restore(model)
    return out[:, PROMPT:].tolist(), why


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ids = torch.randint(3, 512, (2, PROMPT), generator=torch.Generator().manual_seed(1)).to("cuda:0")
    one = build().to("cuda:0")
    placed = {"two GPUs": split(build()), "weights on the host": cpu_offload(build(), torch.device("cuda:0"))}
    rows = []
    for recipe in RECIPES:
        for graph in (False, True):
            wanted, why = tokens(one, recipe, ids, graph)
            row: dict[str, Any] = {"recipe": recipe, "graph": graph, "one GPU": why}
            for name, model in placed.items():
                if graph and name == "weights on the host":
                    continue  # their addresses change
                found, why = tokens(model, recipe, ids, graph)
                alike = sum(a == b for x, y in zip(found, wanted) for a, b in zip(x, y))
                row[name] = f"{alike} of {2 * NEW} tokens" + (f" ({why})" if why else "")
            rows.append(row)
            print(" | ".join(str(value) for value in row.values()), flush=True)
    if args.json:
        args.json.write_text(json.dumps({**machine.stamp(), "gpus": torch.cuda.device_count(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
