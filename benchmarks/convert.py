"""`fivefold.convert` on the embedded model, 3 KV heads to 2 and to 1, untrained: the table of docs/methods.md.

    python benchmarks/convert.py --json benchmarks/results/convert_cpu.json

KL of the next-token distributions against the model as it was, nats, float32: 3 texts, the 128 tokens after 1,024. Keys
and values of the calibration text are looked at once for all rows. A run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

from fivefold.evaluate.demo import document
from fivefold.merging import By
from fivefold.models import conversion, embedded

CONTEXT, NEW, TEXTS, TOKENS = 1024, 128, 3, 4096
ROWS: tuple[tuple[int, By, bool], ...] = (
    (2, "uniform", False), (2, "norm", False), (2, "alike", False), (2, "uniform", True), (2, "norm", True),
    (2, "alike", True), (2, "proportional", False), (1, "uniform", False), (1, "uniform", True),
)  # fmt: skip


@torch.inference_mode()
def logs(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    starts = [number * ids.shape[1] // (2 * TEXTS) for number in range(TEXTS)]
    pieces = (ids[:, start : start + CONTEXT + NEW] for start in starts)
    return [model(piece, use_cache=False, logits_to_keep=NEW).logits[0].log_softmax(-1) for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    path: Path = parser.parse_args().json
    model, tokenizer = embedded.load()
    ids = tokenizer(document(), return_tensors="pt").input_ids
    out: dict[str, Any] = {"model": embedded.MODEL_NAME, "torch": torch.__version__, "tokens": TOKENS, "rows": {}}
    if path.is_file():
        out = json.loads(path.read_text())
    shape = conversion.shape_of(model, True)
    exact = logs(model, ids)
    moments = conversion.moments(model, tokenizer, None, TOKENS)
    for kv_heads, by, align in ROWS:
        name = f"convert(model, {kv_heads}, {by!r}, align={align})"
        if name not in out["rows"]:
            groups = conversion.groups_of(shape, moments, kv_heads, by, align)
            made = conversion.rewrite(copy.deepcopy(model), shape, groups)
            kl = [float((e.exp() * (e - x)).sum(-1).mean()) for e, x in zip(exact, logs(made, ids))]
            out["rows"][name] = {
                "kv_heads": kv_heads, "by": by, "align": align, "kl": kl, "query_heads": made.config.num_attention_heads
            }  # fmt: skip
            path.write_text(json.dumps(out, indent=1) + "\n")
    print("| KV heads | by | align | query heads | KL |\n|---|---|---|---|---|")
    for row in out["rows"].values():
        cells = row["kv_heads"], f"`{row['by']}`", "yes" if row["align"] else "no", row["query_heads"]
        print(f"| {' | '.join(map(str, cells))} | {sum(row['kl']) / TEXTS:.2f} |")


if __name__ == "__main__":
    main()
