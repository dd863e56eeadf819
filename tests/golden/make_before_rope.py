"""Regenerate rotatekv.safetensors and cskv.safetensors from checkouts of the official repositories.

    python tests/golden/make_before_rope.py ROTATEKV CSKV [--out FOLDER]

None of their code is here. Modules are imported from the checkouts with stubs for what their pure-torch functions do
not need: `fast_hadamard_transform` (given as the product with the Walsh-Hadamard matrix that it documents), `.cuda()`
(which stays on the CPU), `utils`, `sklearn` and `transformers`. How RotateKV finds massive activations stands in the
middle of a forward: those lines are taken from the checkout as they are and run on a tensor.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROTATEKV = ("https://github.com/ZunhaiSu/RotateKV", "3055e2b6a45d0cdd60e39cff1b8b3b72714a1cd0")
CSKV = ("https://github.com/wln20/CSKV", "cd7922666c0d761f03e1c625a914f896018decc1")
MODELING = "RotateKV_fake_quant/modeling_llama_RotateKV.py"
SHA256 = {
    "fuse_weights.py": "866cd156386a1a9895a4e93f105c790a843eaea5deef8ae36ef41dd119b60f5b",
    "RotateKV_fake_quant/fake_quant.py": "e0ee142294f847e578f7eae5b94867b59a838c03d84b3226baeecba110c22fa3",
    MODELING: "aa67f992e8b6257501dcc940b9b772c3d6f471ce1f652155f8a16bbd42ab64c8",
    "cskv_src/utils/quant_utils.py": "6ec9a78e55b4d1a2db472043cb2341c6ece33182614214fa7dd0b39c98e9f62b",
    "cskv_src/utils/training_utils.py": "0cb12243b42f4d1295093cdeb755d47f309b398cc2096df1b585542f04639ebf",
}
SEED = 4321
HEADS, DIM, HIDDEN, TOKENS = 4, 32, 96, 160
HEAD_GROUP = 2
RANK = 6  # features per head
OUTLIERS = (3, 40, 77, 101)


def read(checkout: Path, module: str) -> str:
    data = (checkout / module).read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[module]:
        raise SystemExit(f"{checkout / module} is not the file of the commit named here")
    return data.decode()


def load(checkout: Path, module: str, stubs: dict[str, Any]) -> types.ModuleType:
    read(checkout, module)
    spec = importlib.util.spec_from_file_location("official", checkout / module)
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    real = {name: sys.modules.get(name) for name in stubs}
    sys.dont_write_bytecode = True
    sys.modules.update(stubs)
    try:
        spec.loader.exec_module(official)
    finally:
        for name, old in real.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old
    return official


def stub(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


def walsh(n: int) -> torch.Tensor:
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])


def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """A key projection `[heads * dim, hidden]` some of whose channels stand out, and inputs `[tokens, hidden]`."""
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(HEADS * DIM, HIDDEN, generator=generator) / HIDDEN**0.5
    weight[list(OUTLIERS)] *= 12
    inputs = torch.randn(TOKENS, HIDDEN, generator=generator) * torch.rand(HIDDEN, generator=generator).exp()
    return weight, inputs + 0.5 * torch.randn(HIDDEN, generator=generator)


def rotatekv(checkout: Path) -> dict[str, torch.Tensor]:
    def transform(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x @ walsh(x.shape[-1]) * scale

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    names = {"fast_hadamard_transform": stub("fast_hadamard_transform", hadamard_transform=transform),
             "utils": stub("utils", parser_gen=lambda: types.SimpleNamespace(head_group_num=HEAD_GROUP))}  # fmt: skip
    fuse = load(checkout, "fuse_weights.py", names)
    fake = load(checkout, "RotateKV_fake_quant/fake_quant.py", {})
    weight, inputs = make_inputs()
    width = HEAD_GROUP * DIM
    matrix = walsh(width) / width**0.5
    rotated = (inputs @ weight.T).unflatten(1, (-1, width)) @ matrix
    indices = rotated.flatten(1).sum(0).sort().indices  # as k_reordering_calibration.py does
    linear = torch.nn.Linear(HIDDEN, HEADS * DIM, bias=False)
    linear.weight.data = weight.clone()
    layer = stub("layer", self_attn=stub("self_attn", k_proj=linear))
    fuse.rotate_reorder_k_proj(layer, width, R=matrix, indices=indices)
    keys = (inputs @ linear.weight.data.T)[None, None]
    out = {"weight": weight, "inputs": inputs, "indices": indices, "keys": keys[0, 0]}
    for bits, clip in ((2, 0.8), (2, 1.0), (3, 1.0), (4, 1.0)):
        out[f"b{bits}.c{clip}.dequant"] = fake.fake_quant(keys, clip, bits, 32)[0, 0]
    lines = read(checkout, MODELING).splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == "pivot_index_list = []")
    last = next(i for i, line in enumerate(lines) if "torch.stack(pivot_index_list)" in line)
    hidden = torch.randn(2, 90, 24, generator=torch.Generator().manual_seed(SEED + 1))
    for row, token, size in ((0, 0, 900), (0, 31, 400), (1, 2, 50), (1, 60, 800)):
        hidden[row, token, 5:9] *= size
    scope = {"torch": torch, "hidden_states": hidden}
    exec(textwrap.dedent("\n".join(lines[first : last + 1])), scope)
    return {**out, "hidden": hidden, "pivots": scope["pivot_index_list"]}


def cskv(checkout: Path) -> dict[str, torch.Tensor]:
    names = {"sklearn": stub("sklearn"), "sklearn.cluster": stub("sklearn.cluster", KMeans=object),
             "transformers": stub("transformers", Trainer=object), "tqdm": stub("tqdm", tqdm=iter)}  # fmt: skip
    training = load(checkout, "cskv_src/utils/training_utils.py", names)
    quant = load(checkout, "cskv_src/utils/quant_utils.py", {})
    weight, inputs = make_inputs()
    out = {"weight": weight, "inputs": inputs}
    out["svd.a"], out["svd.b"] = training.init_svd(weight, RANK, HEADS)
    mean = inputs.abs().mean(0)  # as asvd_init_calib.py does
    out["asvd.a"], out["asvd.b"] = training.init_asvd(weight, mean.clone(), RANK, HEADS)
    features = (inputs @ out["asvd.a"].T)[None, None]
    context = types.SimpleNamespace(save_for_backward=lambda *tensors: None)
    out["features"] = features[0, 0]
    out["channel.b4"] = quant.KVQuantizerChannel.forward(context, features.clone(), 4, 32)[0, 0]
    out["token.b4"] = quant.KVQuantizer.forward(context, features.clone(), 4, features.shape[-1])[0, 0]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rotatekv", type=Path, help="a checkout of {} at commit {}".format(*ROTATEKV))
    parser.add_argument("cskv", type=Path, help="a checkout of {} at commit {}".format(*CSKV))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, (source, commit), made in (
        ("rotatekv", ROTATEKV, rotatekv(args.rotatekv)),
        ("cskv", CSKV, cskv(args.cskv)),
    ):
        metadata = {"source": source, "commit": commit, "torch": torch.__version__, "seed": str(SEED)}
        tensors = {key: x.contiguous() for key, x in made.items()}
        save_file(tensors, args.out / f"{name}.safetensors", metadata=metadata)
        print(f"{name}.safetensors: {len(tensors)} tensors")


if __name__ == "__main__":
    main()
