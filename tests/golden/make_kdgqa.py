"""Regenerate kdgqa.json from a checkout of the official repository of key-driven grouped query attention.

    python tests/golden/make_kdgqa.py KDGQA [--out FOLDER]

None of its code is here. How KDGQA allots query heads stands in the middle of a forward, which is run as it is, with
weights that make it see the keys that we choose; `torch.split` is watched for what it decided. Where its loop does not
end within a thousand steps (equal norms are 0 / 0), the run is broken off.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

KDGQA = ("https://github.com/zohaib-khan5040/key-driven-gqa", "8fee9d607cdc5004d389700a79e903601cb1404b")
MODULE = "modules/attention/kdgqa.py"
SHA256 = "0fccfba3c3e45276eaebe349aad5c6b6ae86a831d40601e9c967b3743895b989"
DIM, PATCHES, LONGEST = 8, 20, 1000
# Query heads, and how large the keys of each KV head are.
CASES = (
    (9, (1.0, 0.9)), (9, (1.0, 0.5)), (12, (1.0, 0.95, 0.9)), (12, (3.0, 1.0, 2.0, 1.5)), (8, (1.0, 4.0, 1.1, 1.05)),
    (12, (1.0, 1.0, 1.0)),
)  # fmt: skip


class Decided(Exception):
    """What the forward decided, or that it does not."""


def load(checkout: Path) -> Any:
    data = (checkout / MODULE).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise SystemExit(f"{checkout / MODULE} is not the file of the commit named here")
    utils = types.ModuleType("utils")
    vars(utils)["assign_check"] = None
    spec = importlib.util.spec_from_file_location("official", checkout / MODULE)
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    with mock.patch.dict(sys.modules, {"utils": utils}):
        spec.loader.exec_module(official)
    return official.KDGQA


@torch.no_grad()
def run(kdgqa: Any, query_heads: int, sizes: tuple[float, ...]) -> dict[str, Any]:
    heads = len(sizes)
    module = kdgqa(query_heads * DIM, query_heads, num_kv_heads=heads)
    # All heads read the same inputs, so that their norms are in the proportion of `sizes` exactly.
    weight = torch.randn(DIM, query_heads * DIM, generator=torch.Generator().manual_seed(0)).double()
    module.double().k.weight.copy_(torch.cat([size * weight for size in sizes]))
    x = torch.randn(1, PATCHES, query_heads * DIM, generator=torch.Generator().manual_seed(1)).double()
    keys = module.k(x).view(1, PATCHES, heads, DIM).transpose(1, 2)
    out: dict[str, Any] = {"query_heads": query_heads, "norms": keys.norm(dim=(2, 3)).sum(0).tolist(), "official": None}
    steps, real = 0, {name: getattr(torch, name) for name in ("argmin", "argmax")}

    def split(tensor: Any, sizes: Any, dim: int) -> Any:
        raise Decided(list(sizes))

    def counted(name: str) -> Any:
        def call(*args: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > LONGEST:
                raise Decided("does not end: equal norms are 0 / 0, and allotments not a number")
            return real[name](*args)

        return call

    watched = {"split": split, **{name: counted(name) for name in real}}
    with mock.patch.multiple(torch, **watched):
        try:
            module(x)
        except Decided as decided:
            found = decided.args[0]
            out["official" if isinstance(found, list) else "error"] = found
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kdgqa", type=Path, help="a checkout of {} at commit {}".format(*KDGQA))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    kdgqa = load(options.kdgqa)
    cases = [run(kdgqa, *case) for case in CASES]
    (options.out / "kdgqa.json").write_text(
        json.dumps({"source": KDGQA[0], "commit": KDGQA[1], "cases": cases}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
