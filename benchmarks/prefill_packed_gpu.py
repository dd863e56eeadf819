"""A chunk of a prompt over packed tokens on a GPU: attention of one layer against SDPA over the same tokens, by
FlashAttention with an aligned causal mask, and by what torch takes for a mask of booleans (transformers' call).

python benchmarks/prefill_packed_gpu.py [benchmarks/results/prefill_packed_h100.json]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from fivefold.attention import attend_chunk
from fivefold.benchmark import machine
from fivefold.benchmark.kernels import GROUP, HEAD_DIM, KV_HEADS, filled
from fivefold.recipe import Recipe

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16


def timed(call: Callable[[], object], repeats: int = 5) -> float:
    """Median milliseconds by events."""
    for _ in range(2):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in pairs:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


@torch.inference_mode()
def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    rows = []
    for past in (8192, 30720):
        for chunk in (2048, 4096):
            queries = random(KV_HEADS, GROUP, chunk, HEAD_DIM)
            keys, values = random(KV_HEADS, chunk, HEAD_DIM), random(KV_HEADS, chunk, HEAD_DIM)
            whole = [random(1, KV_HEADS, past + chunk, HEAD_DIM) for _ in range(2)]
            flat = queries.reshape(1, KV_HEADS * GROUP, chunk, HEAD_DIM)
            sdpa = partial(F.scaled_dot_product_attention, flat)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                bias = causal_lower_right(chunk, past + chunk)
                flash = timed(partial(sdpa, *whole, attn_mask=bias, enable_gqa=True))
            mask = torch.ones(chunk, past + chunk, device=DEVICE, dtype=torch.bool).tril(past)
            masked = timed(partial(sdpa, *(x.repeat_interleave(GROUP, 1) for x in whole), attn_mask=mask))
            best = min(flash, masked)
            size = {"past": past, "chunk": chunk}
            rows += [
                {**size, "kernel": "SDPA flash bf16", "ms": flash},
                {**size, "kernel": "SDPA masked bf16", "ms": masked},
            ]
            said = [f"{past} + {chunk}: SDPA flash {flash:.3f} ms, masked {masked:.3f} ms"]
            for recipe in ("full()", "kivi(bits=4)", "kivi(bits=2)"):
                layer = filled(Recipe.parse(recipe), DEVICE, past, 1, DTYPE)
                (group,) = layer.groups
                ms = timed(partial(attend_chunk, group, queries, keys, values, HEAD_DIM**-0.5))
                rows.append({**size, "kernel": recipe, "ms": ms, "times": ms / best})
                said.append(f"{recipe} {ms:.3f} ({ms / best:.2f}x)")
                layer.free()
            print(", ".join(said), flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({**machine.stamp(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
