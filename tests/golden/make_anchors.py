"""Regenerate anchors.safetensors from a checkout of Kascade's official repository.

    python tests/golden/make_anchors.py CHECKOUT [--out FILE]

None of Kascade's code is here: the functions are read from the checkout.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

SOURCE = "https://github.com/microsoft/kascade"
COMMIT = "76aea84d4216b538e001fab018cbc24894ce32c3"
STATS, DECODE, UTILS = (
    "src/runners/stats_runner.py", "src/strategies/DecodeOnlyKascadeStrategy.py", "src/strategies/attention_utils.py",
)  # fmt: skip
SHA256 = {
    STATS: "294d830d3683130899928e2a00617a29e8a4fca5a2d0609c0b9cc8e71902fe03",
    DECODE: "784a689070ccbca52b8ce79d85c3a20266aec0ca86ae858ca22b72927ac00c4f",
    UTILS: "376609a9d2b59ed93ce2b1ac283b8b18e759a06c4a45d3f3efe6da0e800fb575",
}
FUNCTIONS = {
    STATS: ("_similarity_layer", "_pick_k_layers", "_find_head_mappings"),
    DECODE: ("attention_forward",),
    UTILS: ("softmax_", "repeat_kv"),
}
SEED, LAYERS, KV_HEADS, GROUP, DIM = 1234, 6, 3, 2, 8
TEXTS, QUERIES, TOKENS, TOP = 2, 4, 96, 12
# The official decoding reads at least 128 tokens.
STEP_TOKENS, STEP_TOP, ANCHORS = 200, 128, (0, 2, 4)


def functions(checkout: Path) -> dict[str, Any]:
    """FUNCTIONS by name, after checking that their files are those of COMMIT."""
    names: dict[str, Any] = {"torch": torch, "nn": nn, "math": math}
    for path, wanted in FUNCTIONS.items():
        text = (checkout / path).read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        if digest != SHA256[path]:
            raise SystemExit(f"{path} is not that of commit {COMMIT}: sha256 is {digest}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name in wanted:
                for arg in [*node.args.args, *node.args.kwonlyargs]:
                    arg.annotation = None
                node.returns = None
                exec(compile(ast.Module([node], []), path, "exec"), names)
    return names


def likeness(official: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Attention of a few queries, similarities, anchors for each number of them, and their head maps."""
    generator = torch.Generator().manual_seed(SEED)
    out, total = {}, torch.zeros(LAYERS, LAYERS, KV_HEADS, KV_HEADS)
    base = 2.5 * torch.randn(TEXTS, 1, KV_HEADS, 1, TOKENS, generator=generator)
    drift = torch.randn(TEXTS, LAYERS, KV_HEADS, 1, TOKENS, generator=generator).cumsum(1)
    # Heads change places from layer to layer.
    scores = torch.stack([(base + drift)[:, i].roll(i, 1) for i in range(LAYERS)], 1)
    scores = scores[:, :, :, None] + 0.5 * torch.randn(
        TEXTS, LAYERS, KV_HEADS, GROUP, QUERIES, TOKENS, generator=generator
    )
    weights = scores.softmax(-1)  # [text, layer, kv_head, query_head, query, token]
    pooled = weights.sum(3)
    for text in pooled:
        stats = SimpleNamespace(
            _top_k_per_layer=[layer[None].topk(TOP, -1).indices for layer in text],
            _last_tile_attn=[torch.zeros(1, KV_HEADS, QUERIES)] * LAYERS,
            _causal_attn_weights=[layer[None] for layer in text],
            config=SimpleNamespace(run_type="select_layers"),
        )
        for i in range(LAYERS):
            for j in range(i, LAYERS):
                total[i, j] += official["_similarity_layer"](stats, i, j)
    similarity = total / TEXTS  # [layer i, layer j, kv head of j, kv head of i]
    between = similarity.amax(-1).mean(-1)
    for count in range(2, LAYERS):
        anchors = official["_pick_k_layers"](None, between.numpy(), count)
        heads = official["_find_head_mappings"](SimpleNamespace(_num_layers=LAYERS), similarity, [*anchors, LAYERS])
        out[f"anchors.{count}"], out[f"heads.{count}"] = torch.tensor(anchors), torch.tensor(heads)
    return {"attention": weights, "similarity": similarity, "between": between, **out}


def steps(official: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One decoding step over random tokens, each layer with queries, keys and values of its own."""
    generator = torch.Generator().manual_seed(SEED + 1)
    heads = torch.stack([torch.randperm(KV_HEADS, generator=generator) for _ in range(LAYERS)])
    q = torch.randn(LAYERS, 1, KV_HEADS * GROUP, 1, DIM, generator=generator)
    k, v = torch.randn(2, LAYERS, 1, KV_HEADS, STEP_TOKENS, DIM, generator=generator)
    # The newest token is picked by every head, so that both read the same.
    k[:, :, :, -1] = q[:, :, :, 0].unflatten(2, (KV_HEADS, GROUP)).mean(3)
    me = SimpleNamespace(
        k=100 * STEP_TOP / STEP_TOKENS, recompute_layers=list(ANCHORS), _head_mapping=heads.tolist(),
        _topk_to_reuse=None,
    )  # fmt: skip
    outputs = []
    for layer in range(LAYERS):
        module = SimpleNamespace(layer_idx=layer, num_key_value_groups=GROUP, training=False)
        mask = torch.zeros(1, 1, 1, STEP_TOKENS)
        made, _ = official["attention_forward"](me, module, q[layer], k[layer], v[layer], mask, DIM**-0.5)
        outputs.append(made)
    assert me._topk_to_reuse.shape[-1] == STEP_TOP
    return {"q": q, "k": k, "v": v, "map": heads, "out": torch.stack(outputs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("anchors.safetensors"))
    given = parser.parse_args()
    official = functions(given.checkout)
    tensors = {f"likeness.{name}": x for name, x in likeness(official).items()}
    tensors |= {f"step.{name}": x for name, x in steps(official).items()}
    made = {
        "source": SOURCE, "commit": COMMIT, "functions": ", ".join(f for some in FUNCTIONS.values() for f in some),
        "torch": torch.__version__, "top": str(TOP), "anchors": str(ANCHORS),
    }  # fmt: skip
    save_file({name: x.contiguous() for name, x in tensors.items()}, given.out, metadata=made)
    for count in range(2, LAYERS):
        print(tensors[f"likeness.anchors.{count}"].tolist(), tensors[f"likeness.heads.{count}"].tolist())


if __name__ == "__main__":
    main()
