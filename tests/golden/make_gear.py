"""Regenerate gear.safetensors from a checkout of GEAR's official repository.

    python tests/golden/make_gear.py CHECKOUT [--out FILE]

None of GEAR's code is here: its file of simulated compression is imported from the checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

SOURCE = "https://github.com/HaoKang-Timmy/GEAR"
COMMIT = "efe0bfe2b5a35b22122f7cefab5cde9db13a66cd"
MODULE = "GenerationBench/GenerationTest/GEARLM/Simulated/compress_function.py"
MODULE_SHA256 = "a3139638bf8f96f6352ad040a494503e79d54840677fb19d296abf957f622f72"
FUNCTIONS = ("gears_channelQ", "gears_tokenQ", "fake_poweriteration_group")

SEED, LOOPS, RANK, GROUP, DIM = 1234, 3, 4, 64, 64
# Bits, heads, tokens, outliers at each end of a channel of keys and of a token of values. The official code counts both
# as int(heads * head_dim * sparsity / 2); the sparsities below give these counts.
CASES = ((2, 2, 256, 3, 1), (4, 1, 128, 1, 1))


def load_official(checkout: Path) -> types.ModuleType:
    """Import MODULE from the checkout, after checking that it is the file of COMMIT."""
    path = checkout / MODULE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != MODULE_SHA256:
        raise SystemExit(f"{path} is not {MODULE} of commit {COMMIT}: sha256 is {digest}")
    spec = importlib.util.spec_from_file_location("gear_compress_function", path)
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    return module


def make_inputs(heads: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with three channels x20 and an offset per channel, values with single numbers x20, in float16."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, heads, tokens, DIM), generator=generator)
    keys[..., [5, 23, 46]] *= 20
    keys += torch.randn((heads, 1, DIM), generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.01] *= 20
    return keys.half(), values.half()


def distinct(x: torch.Tensor, count: int) -> bool:
    """Whether the `count` smallest and largest of the last axis are certain: no equal numbers at the border."""
    ordered = x.sort(-1).values
    low, high = ordered[..., count - 1] < ordered[..., count], ordered[..., -count] > ordered[..., -count - 1]
    return bool((low & high).all())


def make_golden(gear: types.ModuleType) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for bits, heads, tokens, *counts in CASES:
        for seed in itertools.count(SEED):
            inputs = make_inputs(heads, tokens, seed)
            if distinct(inputs[0].transpose(1, 2), counts[0]) and distinct(inputs[1], counts[1]):
                break
        begin = torch.rand((DIM, RANK), generator=torch.Generator().manual_seed(0))
        out[f"b{bits}.start"] = begin
        for side, x, count, function in zip("kv", inputs, counts, (gear.gears_channelQ, gear.gears_tokenQ)):
            # Heads as a batch: the official code groups and counts over all heads of a token, a page has one.
            whole = x.float()[:, None]
            made = function(whole.clone(), bits, GROUP, (2 * count + 0.5) / DIM)
            error = whole - made
            right = [begin.expand(heads, 1, -1, -1).clone()]
            left = [torch.zeros(heads, 1, tokens, RANK)]
            product = gear.fake_poweriteration_group(error, LOOPS, RANK, "cpu", right, left)
            # The function leaves its factors in the lists that it was given.
            assert torch.allclose(left[0] @ right[0].transpose(2, 3), product, atol=1e-5)
            name = f"b{bits}.{side}"
            out[name], out[f"{name}.quantised"] = x, made[:, 0].contiguous()
            out[f"{name}.left"], out[f"{name}.right"] = left[0][:, 0].contiguous(), right[0][:, 0].contiguous()
            exact = (made == x[:, None]).float().mean()
            assert 2 * count / (tokens if side == "k" else DIM) <= exact + 1e-6
            assert (error - product).norm() < error.norm()
    assert all(torch.isfinite(x.float()).all() for x in out.values())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help=f"a checkout of {SOURCE} at commit {COMMIT}")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gear.safetensors"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    golden = make_golden(load_official(args.checkout))
    metadata = {
        "source": SOURCE,
        "commit": COMMIT,
        "functions": ", ".join(f"{MODULE}:{name}" for name in FUNCTIONS),
        "torch": torch.__version__,
        "seed": str(SEED),
        "group_size": str(GROUP),
        "loops": str(LOOPS),
    }
    save_file(golden, args.out, metadata=metadata)
    print(f"{args.out}: {len(golden)} tensors, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
