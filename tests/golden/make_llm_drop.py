"""Regenerate llm_drop.safetensors from a checkout of LLM-Drop's official repository.

    python tests/golden/make_llm_drop.py CHECKOUT [--out FILE]

None of LLM-Drop's code is here. `layer_drop.py`, `utils.py`, `wrapper.py` and `io.py` are imported from the checkout
after their SHA-256 was compared. What stands around them: a package without its `__init__` (which imports the whole
training framework), an accelerator of one process, and layers that give a current transformers layer its rotary
embedding, which the official function does not know of, and return what it gives as the tuple of older versions.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import families

SOURCE = "https://github.com/CASE-Lab-UMD/LLM-Drop"
COMMIT = "28b5dd14c2474c7110b2b42f5862a6dbdbe71a2d"
FOLDER = "src/llmtuner/compression/prune"
SHA256 = {
    "layer_drop.py": "97c0afa03034792e3400ea2cd7bebad78e27349b5fa9081bcb2716d8a020f393",
    "utils.py": "bd307fcf2bfb3095c9d3e4a367f338ee78c5d3b760bdf998788c6a8911355de1",
    "wrapper.py": "ef72ef5be70a4adcbc96f2e8f59505b7b0127812cf627a6134100b94543d137c",
    "io.py": "ac80a58b976c065a580c025643792c79bcdb49a0e80519859fd756aa8440ec9e",
}
SEED, SAMPLES, TOKENS = 3, 2, 12


def load_official(checkout: Path) -> Any:
    folder = checkout / FOLDER
    for name, wanted in SHA256.items():
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != wanted:
            raise SystemExit(f"{folder / name} is not that of commit {COMMIT}: sha256 is {found}")
    sys.dont_write_bytecode = True
    package = types.ModuleType("official")
    package.__path__ = [str(folder)]
    sys.modules["official"] = package
    return importlib.import_module("official.layer_drop")


class Accelerator:
    device = torch.device("cpu")
    is_main_process = is_local_main_process = True

    def print(self, *args: Any) -> None:
        pass

    def unwrap_model(self, model: Any) -> Any:
        return model

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return value


class Layer(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor]:
        # Without a mask SDPA is causal.
        return (self.layer(hidden, position_embeddings=self.rotary(hidden, position_ids)),)


class Model(torch.nn.Module):
    """What the official function reads of a model."""

    def __init__(self, llama: Any) -> None:
        super().__init__()
        self.config, self.embed = llama.config, llama.model.embed_tokens
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(Layer(layer, llama.model.rotary_emb) for layer in llama.model.layers)

    def forward(self, input_ids: torch.Tensor) -> None:
        hidden, places = self.embed(input_ids), torch.arange(input_ids.shape[1])[None]
        for layer in self.model.layers:
            (hidden,) = layer(hidden, attention_mask=None, position_ids=places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "llm_drop.safetensors")
    given = parser.parse_args()
    official = load_official(given.checkout)
    llama = families.build("llama", seed=SEED)
    model, accelerator = Model(llama), Accelerator()
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(1, families.VOCABULARY, (SAMPLES, TOKENS), generator=generator)
    batches = [{"input_ids": one[None]} for one in ids]

    found: dict[str, torch.Tensor] = {"ids": ids}
    for drop_norm, name in ((True, "similarity"), (False, "without_norm")):
        found[name] = official.get_layer_similarities(model, batches, accelerator, SAMPLES, drop_norm, "attn")
    settings = types.SimpleNamespace(drop_n=3, target_layer="attn", layer_drop_norm=True, similarity_cache_file=None)
    dropped = official.discrete_layer_dropping(settings, model, batches, accelerator, SAMPLES)
    found["dropped"] = torch.tensor(dropped)
    # The tensors that it compared, so that the sum alone can be held against it.
    streams: dict[str, list[torch.Tensor]] = {"residual": [], "added": []}
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.input_layernorm.register_forward_hook(lambda m, a, o: streams["residual"].append(a[0])))
        hooks.append(layer.self_attn.register_forward_hook(lambda m, a, o: streams["added"].append(o[0])))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for name, parts in streams.items():
        found[name] = torch.cat(parts).unflatten(0, (SAMPLES, -1)).transpose(0, 1).contiguous()
    about = {
        "source": SOURCE, "commit": COMMIT, "functions": "get_layer_similarities, discrete_layer_dropping",
        "torch": torch.__version__, "seed": str(SEED),
    }  # fmt: skip
    save_file(found, given.out, about)
    print({name: tuple(x.shape) for name, x in found.items()}, found["similarity"], dropped)


if __name__ == "__main__":
    main()
