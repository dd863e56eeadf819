"""Regenerate kivi.safetensors from a checkout of KIVI's official repository.

    python tests/golden/make_kivi.py CHECKOUT [--out FILE]

None of KIVI's code is here. ``quant/new_pack.py`` is imported from the checkout, with a stub in place of
``triton`` (its pure-torch functions, the ones called below, do not use it).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

SOURCE = "https://github.com/jy-yuan/KIVI"
COMMIT = "876b4d2d08e3b1d5f70d0969c299d8c7c42ddfb6"
MODULE = "quant/new_pack.py"
MODULE_SHA256 = "3678af0e34a0ba18e5d80a4128acf11d4070667c800a15540a16d07253a4f75e"
FUNCTIONS = (
    "quant_and_pack_kcache",
    "quant_and_pack_vcache",
    "unpack_tensor",
    "unpack_and_dequant_kcache",
    "unpack_and_dequant_vcache",
)

SEED = 1234
GROUP = 32
BITS = (2, 4, 8)
SHAPE = (1, 2, 64, 64)  # batch, kv heads, tokens, head dim
OUTLIERS = (5, 23, 46)  # channels scaled by 20
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def load_official(checkout: Path) -> types.ModuleType:
    """Import MODULE from the checkout, after checking that it is the file of COMMIT."""
    path = checkout / MODULE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != MODULE_SHA256:
        raise SystemExit(f"{path} is not {MODULE} of commit {COMMIT}: sha256 is {digest}")

    triton = types.ModuleType("triton")
    language = types.ModuleType("triton.language")
    triton.jit = lambda function: function
    triton.language = language
    language.constexpr = int
    stubs = {"triton": triton, "triton.language": language}

    spec = importlib.util.spec_from_file_location("kivi_new_pack", path)
    module = importlib.util.module_from_spec(spec)
    real = {name: sys.modules.get(name) for name in stubs}
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules.update(stubs)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = write_bytecode
        for name, old in real.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return module


def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in float16: standard normal, three channels x20, one offset per channel."""
    generator = torch.Generator().manual_seed(SEED)

    def draw() -> torch.Tensor:
        x = torch.randn(SHAPE, generator=generator)
        x[..., list(OUTLIERS)] *= 20
        offset = torch.randn((1, SHAPE[1], 1, SHAPE[3]), generator=generator)
        return (x + offset).to(torch.float16)

    return draw(), draw()


def as_uint8(codes: torch.Tensor, bits: int) -> torch.Tensor:
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    return codes.to(torch.uint8).contiguous()


def make_golden(kivi: types.ModuleType) -> dict[str, torch.Tensor]:
    keys, values = make_inputs()
    out: dict[str, torch.Tensor] = {}
    for tag, dtype in DTYPES.items():
        # The float32 inputs are the float16 ones, widened. Each call gets a fresh copy.
        k, v = keys.to(dtype), values.to(dtype)
        out[f"{tag}.k"], out[f"{tag}.v"] = k, v
        for bits in BITS:
            code, scale, mn = kivi.quant_and_pack_kcache(k.clone(), GROUP, bits)
            name = f"{tag}.k.b{bits}"
            out[f"{name}.codes"] = as_uint8(kivi.unpack_tensor(code, bits, pack_dim=2), bits)
            out[f"{name}.scale"] = scale.squeeze(-2).contiguous()
            out[f"{name}.min"] = mn.squeeze(-2).contiguous()
            out[f"{name}.dequant"] = kivi.unpack_and_dequant_kcache(code, scale, mn, GROUP, bits).contiguous()

            code, scale, mn = kivi.quant_and_pack_vcache(v.clone(), GROUP, bits)
            name = f"{tag}.v.b{bits}"
            out[f"{name}.codes"] = as_uint8(kivi.unpack_tensor(code, bits, pack_dim=3), bits)
            out[f"{name}.scale"] = scale.squeeze(-1).contiguous()
            out[f"{name}.min"] = mn.squeeze(-1).contiguous()
            out[f"{name}.dequant"] = kivi.unpack_and_dequant_vcache(code, scale, mn, GROUP, bits).contiguous()
    for name, tensor in out.items():
        assert torch.isfinite(tensor.float()).all(), name
        assert not name.endswith(".scale") or (tensor > 0).all(), name  # no constant group: 0/0 upstream
        if name.endswith(".dequant"):
            tag, kind, _ = name.split(".", 2)
            scale = out[name.replace(".dequant", ".scale")].repeat_interleave(GROUP, 2 if kind == "k" else 3)
            error = (tensor.float() - out[f"{tag}.{kind}"].float()).abs()
            assert (error < scale.float()).all(), name
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help=f"a checkout of {SOURCE} at commit {COMMIT}")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("kivi.safetensors"))
    args = parser.parse_args()

    torch.set_num_threads(1)
    # Upstream indexes with lists of slices, which torch deprecates; make_golden checks the round trip.
    warnings.filterwarnings("ignore", message="Using a non-tuple sequence")
    golden = make_golden(load_official(args.checkout))
    metadata = {
        "source": SOURCE,
        "commit": COMMIT,
        "functions": ", ".join(f"{MODULE}:{name}" for name in FUNCTIONS),
        "torch": torch.__version__,
        "seed": str(SEED),
        "group_size": str(GROUP),
    }
    save_file(golden, args.out, metadata=metadata)
    print(f"{args.out}: {len(golden)} tensors, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
