"""Decoding steps of every kernel on a small random model: for compute-sanitizer, and against plain PyTorch.

    python scripts/memcheck.py                                # on a GPU: every recipe, each beside the reference
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python scripts/memcheck.py --no-graph
    python scripts/memcheck.py --layers 30 --rows 12 --context 2048 --only duo

Without torch's caching of memory every tensor is an allocation of its own, so that memcheck sees what lies beside it;
that does not go together with CUDA graphs. Texts are of different lengths. A step by the kernels, a chunk of several
tokens, and steps again must give what plain PyTorch gives from the same pages.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import fivefold
from recipes import _profile

VOCAB = 131
DUO = "duo(retrieval={retrieval}, sink=16, recent=200)"
RECIPES = {
    "full": "full()",
    "kivi2": "kivi(bits=2)",
    "kivi4": "kivi(bits=4)",
    "rotatekv2": "rotatekv({rotatekv})",
    "rotatekv4": "rotatekv(bits=4, {rotatekv})",
    "gear": "gear(bits=4)",
    "mikv": "mikv(floor=0)",
    "cskv": "cskv(keep=0.3, {cskv})",
    "cskv4": "cskv(keep=0.3, bits=4, {cskv})",
    "kv_heads": "kv_heads(keep=0.5, {kv_heads})",
    "minicache": "minicache(start=0) + kivi(bits=4)",
    "h2o": "h2o(keep=0.5)",
    "keyformer": "keyformer(keep=0.5)",
    "d2o": "d2o(keep=0.5)",
    "tidal": "tidal(top=64, full_layers=1, select_layers=[1]) + kivi(bits=4)",
    "anchors": "anchors(top=64, anchors=[0, 2], recent=8, {anchors})",
    "anchors-kivi": "anchors(top=64, anchors=[0, 2], recent=8, {anchors}) + kivi(bits=4)",
    "razor": "razor(least=64, share=0.2, {razor})",
    "streaming": "streaming(sink=4, recent=100) + kivi(bits=2)",
    "duo": DUO,
    "duo-kivi": DUO + " + kivi(bits=4)",
    "duo-rotatekv4": DUO + " + rotatekv(bits=4, {rotatekv})",
    "duo-rotatekv2": DUO + " + rotatekv(bits=2, {rotatekv})",
    "duo-cskv": DUO + " + cskv(keep=0.3, {cskv})",
    "duo-tidal": DUO + " + tidal(top=64, full_layers=1, select_layers=[1]) + rotatekv(bits=4, {rotatekv})",
}
STEPS = 2


def written(name: str, model: Any) -> str:
    """A recipe for this model; heads that hold everything: all of every third layer, one of every other third."""
    recipe, layers = RECIPES[name], model.config.num_hidden_layers
    heads = range(model.config.num_key_value_heads)
    full = [
        [layer, head] for layer in range(layers) for head in heads if layer % 3 == 0 or (layer % 3 == 1 and not head)
    ]
    recipe = recipe.replace("{retrieval}", str(full))
    for method in ("rotatekv", "cskv", "kv_heads", "anchors", "razor"):
        if f"{{{method}}}" in recipe:
            recipe = recipe.replace(f"{{{method}}}", f'profile="{_profile(method, model)}"')
    return recipe


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def apart(model: Any, recipe: str, rows: int, context: int, graph: bool, beside: bool) -> tuple[list[float], Any]:
    """How far the logits of each call are from the reference's, in parts of their norm (0 where nothing is compared),
    and why a step was no graph."""
    device = model.device

    def ids(tokens: int, seed: int) -> torch.Tensor:
        return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(device)

    os.environ["FIVEFOLD_KERNELS"] = "auto"
    cache = fivefold.compress(model, recipe, cuda_graph=graph)
    mask = torch.ones(rows, context, dtype=torch.long, device=device)
    for row in range(rows):
        mask[row, : row * 7 % (context // 2)] = 0
    model(ids(context, 0), attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    far = []
    for number, tokens in enumerate([1] * STEPS + [5] + [1] * (STEPS if beside else 1)):
        mask = torch.nn.functional.pad(mask, (0, tokens), value=1)
        given = ids(tokens, number + 1)
        other = cache.fork() if beside else None
        found = model(given, attention_mask=mask, past_key_values=cache).logits.float()
        _wait(device)
        if other is None:
            far.append(0.0)
            continue
        os.environ["FIVEFOLD_KERNELS"] = "reference"
        other.step = None
        wanted = model(given, attention_mask=mask, past_key_values=other).logits.float()
        os.environ["FIVEFOLD_KERNELS"] = "auto"
        far.append(float((found - wanted).norm() / wanted.norm()))
        other.free()
    failed = cache.step.failed if graph and cache.step is not None else "not asked for"
    cache.free()
    fivefold.restore(model)
    return far, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="names of recipes; all if not given")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--context", type=int, default=330)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--alone", action="store_true", help="do not compare with the reference")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=288, intermediate_size=384, num_hidden_layers=given.layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    names, bad = given.only or list(RECIPES), []
    recipes = {name: written(name, model) for name in names}  # learned on the CPU
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, given.dtype)).eval()
    for name in names:
        start = time.perf_counter()
        try:
            shape = given.rows, given.context, not given.no_graph, not given.alone
            far, failed = apart(model, recipes[name], *shape)
        except Exception as error:
            bad.append(name)
            print(f"{name}: FAILED {type(error).__name__}: {error}"[:400], flush=True)
            if "CUDA" in str(error):
                break
            continue
        graph = "a graph" if failed is None else f"no graph: {failed}"
        took = time.perf_counter() - start
        if not max(far) < 0.1:
            bad.append(name)
        print(f"{name}: {' '.join(f'{x:.4f}' for x in far)} ({graph}, {took:.1f} s)"[:300], flush=True)
    print(
        f"{len(bad)} of {len(names)} recipes are wrong: {', '.join(bad)}" if bad else f"{len(names)} recipes are right"
    )
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
