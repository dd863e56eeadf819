"""Regenerate the golden files of the token methods from checkouts of their official repositories.

    python tests/golden/make_tokens.py METHOD CHECKOUT [--out FILE]

METHOD is one of h2o, snapkv, kvpress, keyformer, d2o, elastic, tidal; README.md names the commit of each CHECKOUT.

None of the official code is here. The functions and classes named in METHODS are taken out of the checkout's source
files (whose SHA-256 is checked) and executed as they are, in a namespace that holds torch and stand-ins for what a
method does not need (CUDA calls, old transformers classes). Where a file has constants that fit one model only, or
where a second, repaired variant is recorded, the syntax tree is changed on the way and the README says how.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import hashlib
import io
import math
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

Tensors = dict[str, torch.Tensor]
DIM = 16
MARGIN = 1e-4  # least relative gap at the edge of a top-k, so that rounding cannot change a kept set


# ---------------------------------------------------------------- reading the official source


def read(checkout: Path, path: str, sha256: str) -> ast.Module:
    """Parse one source file of the checkout, after checking that it is the one the golden file was made from."""
    raw = (checkout / path).read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{checkout / path} is not the expected {path}: sha256 is {digest}, not {sha256}")
    return ast.parse(raw.decode())


def run(nodes: list[ast.stmt], space: dict) -> None:
    # "from __future__ import annotations" keeps type hints of absent classes from being evaluated.
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.fix_missing_locations(ast.Module([*future, *nodes], [])), "<official>", "exec"), space)


def take(tree: ast.Module, names: list[str], space: dict) -> None:
    """Execute the definitions called `names` of `tree` in `space`."""
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    run([found[name] for name in names], space)


class Namespace:
    """A module with some of its attributes replaced."""

    def __init__(self, module: object, **replaced: object) -> None:
        self.__dict__.update(replaced, _module=module)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_module"], name)


def space(**more: object) -> dict:
    base = {"torch": torch, "nn": nn, "F": nn.functional, "math": math, "copy": copy, "warnings": warnings}
    hints = {name: getattr(typing, name) for name in ("List", "Optional", "Tuple", "Union")}
    return {"__name__": __name__, **base, **hints, "dataclass": dataclasses.dataclass, **more}


# ---------------------------------------------------------------- inputs and checks


def draw(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Causal attention weights of the last queries, [..., head, query, key]; kv heads are repeated as needed."""
    k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    old = k.shape[-2] - q.shape[-2]
    return logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(old), -math.inf).softmax(-1)


def clear(scores: torch.Tensor, keep: int, what: str) -> None:
    """Refuse inputs for which the choice of the `keep` largest scores is nearly a tie."""
    top = scores.sort(-1, descending=True).values
    gap = (top[..., keep - 1] - top[..., keep]) / top[..., keep - 1].abs()
    assert gap.min() > MARGIN, f"{what}: the scores at the edge differ by {gap.min():.1e} only; take another seed"


def coded(shape: torch.Size, positions: torch.Tensor) -> torch.Tensor:
    """Stand-in keys or values whose every channel is position + 1, to see which tokens are kept."""
    return (positions[..., None] + 1.0).expand(shape).clone()


def decoded(x: torch.Tensor) -> torch.Tensor:
    return (x[..., 0] - 1).round().to(torch.int32)


def sequences() -> Iterator[tuple[str, int, int, int]]:
    """Name, seed, prompt tokens and decode steps of the two sequences (the official caches take one at a time)."""
    yield "s0", 100, 48, 8
    yield "s1", 200, 41, 8


# ---------------------------------------------------------------- H2O


def make_h2o(checkout: Path) -> Tensors:
    names = space()
    path = "h2o_hf/utils_real_drop/modify_llama.py"
    take(read(checkout, path, METHODS["h2o"].files[path]), ["H2OKVCache_LayerWise"], names)
    heavy, recent, heads = 10, 8, 4
    out: Tensors = {"heavy": torch.tensor(heavy), "recent": torch.tensor(recent)}
    for tag, seed, prompt, steps in sequences():
        q, k, v = (draw(seed + i, heads, prompt + steps, DIM, scale=1.5 if i == 0 else 1) for i in range(3))
        out |= {f"{tag}.q": q, f"{tag}.k": k, f"{tag}.v": v}
        cache = names["H2OKVCache_LayerWise"](hh_size=heavy, recent_size=recent)
        for step in range(steps + 1):
            new = slice(0, prompt) if step == 0 else slice(prompt + step - 1, prompt + step)
            here = torch.arange(prompt + steps)[new]
            kept = here.expand(heads, -1) if step == 0 else torch.cat([kept, here.expand(heads, -1)], 1)  # noqa: F821
            keys = k.gather(1, kept[..., None].expand(-1, -1, DIM))
            attention = attend(q[:, new], keys)
            total = attention.sum(1) if step == 0 else attention.sum(1) + nn.functional.pad(score, (0, 1))  # noqa: F821
            clear(total[:, : total.shape[1] - recent], heavy, f"h2o {tag} step {step}")
            k_out, where = cache((keys[None], coded(keys[None].shape, kept)), attention[None])
            kept, score = decoded(where[0]).long(), cache.hh_score
            assert torch.equal(k_out[0], k.gather(1, kept[..., None].expand(-1, -1, DIM)))
            name = f"{tag}.{step}"
            out |= {f"{name}.score_all": total, f"{name}.score": score.clone(), f"{name}.kept": kept.to(torch.int32)}
            if step:
                out[f"{name}.attention"] = attention[:, 0]
    return out


# ---------------------------------------------------------------- SnapKV and kvpress


def prompt_inputs(seed: int, batch: int, heads: int, kv_heads: int, tokens: int) -> tuple[torch.Tensor, ...]:
    q = draw(seed, batch, heads, tokens, DIM, scale=1.5)
    return q, draw(seed + 1, batch, kv_heads, tokens, DIM), draw(seed + 2, batch, kv_heads, tokens, DIM)


SNAPKV = (300, 2, 4, 2, 64)  # seed, batch, query heads, kv heads, tokens


def make_snapkv(checkout: Path) -> Tensors:
    q, k, v = prompt_inputs(*SNAPKV)
    out: Tensors = {"q": q, "k": k, "v": v}
    path = "snapkv/monkeypatch/snapkv_utils.py"
    tree = read(checkout, path, METHODS["snapkv"].files[path])
    for name, window, capacity, kernel, pooling in (
        ("avg5", 8, 24, 5, "avgpool"),
        ("avg7", 16, 40, 7, "avgpool"),
        ("max7", 8, 24, 7, "maxpool"),
    ):
        seen: Tensors = {}

        def pool(kind: str, seen: Tensors = seen) -> Callable[..., torch.Tensor]:
            def call(x: torch.Tensor, **options: int) -> torch.Tensor:
                seen["votes"], seen["score"] = x, getattr(nn.functional, kind)(x, **options)
                return seen["score"]

            return call

        pools = {kind: pool(kind) for kind in ("avg_pool1d", "max_pool1d")}
        names = space(F=Namespace(nn.functional, **pools))
        take(tree, ["repeat_kv", "SnapKVCluster"], names)
        cluster = names["SnapKVCluster"](window, capacity, kernel, pooling)
        keys, values = names["repeat_kv"](k, 2), names["repeat_kv"](v, 2)
        new_keys, _ = cluster.update_kv(keys, q, values, None, 2)
        _, where = cluster.update_kv(keys, q, coded(keys.shape, torch.arange(keys.shape[2])), None, 2)
        kept = decoded(where)
        assert torch.equal(new_keys, keys.gather(2, kept.long()[..., None].expand(-1, -1, -1, DIM)))
        if pooling == "avgpool":  # a maximum over a window is tied with its neighbours by nature
            clear(seen["score"], capacity - window, f"snapkv {name}")
        settings = torch.tensor([window, capacity, kernel])
        out |= {f"{name}.settings": settings, f"{name}.votes": seen["votes"], f"{name}.score": seen["score"]}
        out[f"{name}.kept"] = kept
    return out


def make_kvpress(checkout: Path) -> Tensors:
    q, k, v = prompt_inputs(*SNAPKV)
    out: Tensors = {"q": q, "k": k, "v": v}
    names = space(BasePress=object)
    for path, digest in METHODS["kvpress"].files.items():
        tree = read(checkout, path, digest)
        take(tree, [node.name for node in tree.body if isinstance(node, ast.ClassDef)], names)
    config = types.SimpleNamespace(num_attention_heads=q.shape[1], num_key_value_heads=k.shape[1])
    layer = types.SimpleNamespace(config=config, head_dim=DIM)
    hidden, attention = torch.zeros(q.shape[0], q.shape[2], 1), attend(q, k)
    for name, kind, options in (
        ("observed", "ObservedAttentionPress", {"compression_ratio": 0.6}),
        ("snapkv", "SnapKVPress", {"compression_ratio": 0.6, "window_size": 8, "kernel_size": 5}),
        ("snapkv_wide", "SnapKVPress", {"compression_ratio": 0.75, "window_size": 4, "kernel_size": 7}),
    ):
        press = names[kind](**options)
        score = press.score(layer, hidden, k, v, attention, {})
        where = coded(k.shape, torch.arange(k.shape[2]))
        _, where = press.compress(layer, hidden, k, where, attention, {})
        kept = decoded(where).sort(-1).values
        window = options.get("window_size", 0)  # its own tokens are always kept
        clear(score[..., : score.shape[-1] - window], kept.shape[-1] - window, f"kvpress {name}")
        out |= {f"{name}.score": score, f"{name}.kept": kept}
        out[f"{name}.settings"] = torch.tensor([float(x) for x in options.values()])
    return out


# ---------------------------------------------------------------- Keyformer


def rearrange(x: torch.Tensor, pattern: str, h: int | None = None) -> torch.Tensor:
    """The three einops patterns that Keyformer's attention uses."""
    if pattern == "b h s d -> b s (h d)":
        return x.transpose(1, 2).flatten(2)
    x = x.unflatten(2, (h, -1)).transpose(1, 2)
    return {"b s (h d) -> b h s d": x, "b s (h d) -> b h d s": x.transpose(2, 3)}[pattern]


def make_keyformer(checkout: Path) -> Tensors:
    seen: Tensors = {}

    def gumbel_softmax(logits: torch.Tensor, tau: float, hard: bool, dim: int) -> torch.Tensor:
        state = torch.get_rng_state()
        seen["noise"] = -torch.empty_like(logits).exponential_().log()  # what torch is about to draw
        torch.set_rng_state(state)
        seen["tau"], seen["logits"] = torch.tensor(tau), logits
        seen["y"] = nn.functional.gumbel_softmax(logits, tau=tau, hard=hard, dim=dim)
        assert torch.equal(seen["y"], ((logits + seen["noise"]) / tau).softmax(dim))
        return seen["y"]

    functional = Namespace(nn.functional, gumbel_softmax=gumbel_softmax)
    names = space(nn=Namespace(nn, functional=functional), rearrange=rearrange)
    path = "models/mpt-keyformer-lib/attention.py"
    tree = read(checkout, path, METHODS["keyformer"].files[path])
    take(tree, ["scaled_multihead_dot_product_attention"], names)
    heads, keep, recent_share, tau_init, tau_end = 4, 60.0, 30.0, 1.0, 2.0
    out: Tensors = {"settings": torch.tensor([keep, recent_share, tau_init, tau_end])}
    for tag, seed, prompt, steps in sequences():
        seed += 400
        torch.manual_seed(seed)
        q, k, v = (draw(seed + i, heads, prompt + steps, DIM, scale=1.5 if i == 0 else 1) for i in range(3))
        out |= {f"{tag}.q": q, f"{tag}.k": k, f"{tag}.v": v}
        flat = [x.transpose(0, 1).flatten(1)[None] for x in (q, k, v)]
        past, score, mask, budget, count = (), None, None, None, 0
        for step in range(steps + 1):
            new = slice(0, prompt) if step == 0 else slice(prompt + step - 1, prompt + step)
            before = score
            _, _, _, past, score, mask, _, budget, count = names["scaled_multihead_dot_product_attention"](
                *(x[:, new] for x in flat),
                n_heads=heads,
                past_key_value=past,
                attn_bias=torch.zeros(1, 1, 1, 1),
                is_causal=True,
                keyformer=True,
                score_fn=score,
                token_discard_mask=mask,
                req_tokens=budget,
                kv_cache=keep,
                recent=recent_share,
                tau_init=tau_init,
                tau_delta=(tau_end - tau_init) / steps,
                itr_count=count,
            )
            recent, top = budget
            total = seen["y"][0].sum(1)
            if step:
                total[:, :-1] += before
            if step == 0:
                clear(total[:, : total.shape[1] - recent], top, f"keyformer {tag}")
            alive = mask[0, :, 0].bool()  # slots of the next step, the coming token included
            kept = alive.nonzero()[:, 1].view(heads, -1).to(torch.int32)
            name = f"{tag}.{step}"
            out |= {f"{name}.score_all": total, f"{name}.score": score.clone(), f"{name}.next": kept}
            out[f"{name}.tau"] = seen["tau"]
            out[f"{name}.noise"] = seen["noise"][0].tril() if step == 0 else seen["noise"][0, :, 0]
            if step:
                out[f"{name}.logits"] = seen["logits"][0, :, 0]
        out[f"{tag}.budget"] = torch.tensor([recent, top])
    return out


# ---------------------------------------------------------------- D2O


class Feed(nn.Module):
    """Stands in for a projection and returns what it is given, token by token."""

    def __init__(self, x: torch.Tensor | None = None) -> None:
        super().__init__()
        self.x, self.now = x, slice(0, 0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.x is None else self.x.transpose(0, 1).flatten(1)[None, self.now]


class Unrotated(nn.Module):
    """Rotary embedding by nothing: the inputs count as rotated already."""

    def forward(self, x: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(1, 1, seq_len, x.shape[-1]), torch.zeros(1, 1, seq_len, x.shape[-1])


class Sizes(ast.NodeTransformer):
    """Replace the number of heads and the head dimension that are written into the code."""

    def __init__(self, changes: dict[int, int]) -> None:
        self.changes, self.count = changes, 0

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if type(node.value) is int and node.value in self.changes:
            self.count += 1
            return ast.copy_location(ast.Constant(self.changes[node.value]), node)
        return node


def d2o_classes(checkout: Path, heads: int, dim: int, merge: bool) -> tuple[dict, ast.If]:
    attention, model = METHODS["d2o"].files
    tree = read(checkout, attention, METHODS["d2o"].files[attention])
    cache = next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "D2O_LayerKVCache")
    sizes = Sizes({32: heads, 128: dim})
    sizes.visit(cache)
    assert sizes.count == 5, sizes.count
    tensor = torch if merge else Namespace(torch, scatter_reduce=lambda input, **_: input)
    names = space(torch=tensor, rotate_half=lambda x: x, LlamaRotaryEmbedding=lambda *a, **b: Unrotated())
    run([cache], names)
    take(tree, ["repeat_kv", "_make_causal_mask", "apply_rotary_pos_emb_single", "LlamaAttention3_D2O"], names)
    tree = read(checkout, model, METHODS["d2o"].files[model])
    # The budgets are given in the middle of the model's forward, in one "if".
    (allocate,) = (x for x in ast.walk(tree) if isinstance(x, ast.If) and "multimodal_entropy" in ast.dump(x.test))
    return names, allocate


class D2O:
    """The official layers, with the official cache inside and the official allocation before each step.

    With ``merge=False`` nothing is merged, so that keys which carry positions show what is kept.
    """

    def __init__(self, checkout: Path, qkv: list[torch.Tensor], merge: bool, **config: float) -> None:
        layers, heads, _, dim = qkv[0].shape
        self.names, self.allocate = d2o_classes(checkout, heads, dim, merge)
        settings = types.SimpleNamespace(
            hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=heads, num_hidden_layers=layers,
            max_position_embeddings=512, rope_theta=10000.0, rope_scaling=None, pretraining_tp=1,
            hh_size=1, recent_size=1, **config,
        )  # fmt: skip
        self.layers = [self.names["LlamaAttention3_D2O"](settings, layer_idx=i) for i in range(layers)]
        for i, layer in enumerate(self.layers):
            layer.q_proj, layer.k_proj, layer.v_proj = (Feed(x[i]) for x in qkv)
            layer.o_proj = Feed()
        blocks = [types.SimpleNamespace(self_attn=layer) for layer in self.layers]
        self.model = types.SimpleNamespace(layers=blocks, config=settings)
        self.past: list = [None] * layers

    def step(self, now: slice, attention: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """One forward over the tokens `now`; `attention` replaces the layers' own. Returns the attention used."""
        run([self.allocate], {"self": self.model, "torch": torch})
        used, position = [], torch.arange(now.start, now.stop)[None]
        for i, layer in enumerate(self.layers):
            for feed in (layer.q_proj, layer.k_proj, layer.v_proj):
                feed.now = now
            replaced = {"softmax": lambda *a, i=i, **b: attention[i]} if attention else {}
            self.names["nn"] = Namespace(nn, functional=Namespace(nn.functional, **replaced))
            hidden = torch.zeros(1, position.shape[1], layer.hidden_size)
            _, weights, self.past[i] = layer(hidden, None, position, self.past[i], True, True)
            used.append(weights.clone())
        return used


def make_d2o(checkout: Path) -> Tensors:
    dim, steps, heads, layers = 8, 5, 4, 5
    config = {"hh_ratio": 0.25, "recent_ratio": 0.25, "alpha": 0.3, "belta": 0.7}
    out: Tensors = {"settings": torch.tensor(list(config.values()))}
    for tag, seed, prompt in (("s0", 600, 33), ("s1", 700, 27)):
        q, k, v = (draw(seed + i, layers, heads, prompt + steps, dim) for i in range(3))
        q = q * torch.linspace(0.5, 3, layers)[:, None, None, None]  # layers that differ in the variance of attention
        out |= {f"{tag}.q": q, f"{tag}.k": k, f"{tag}.v": v}
        positions = coded(k.shape, torch.arange(prompt + steps))
        real = D2O(checkout, [q, k, v], merge=True, **config)
        probe = D2O(checkout, [q, positions, positions], merge=False, **config)
        before: dict[int, torch.Tensor] = {}
        for step in range(steps + 1):
            now = slice(0, prompt) if step == 0 else slice(prompt + step - 1, prompt + step)
            attention = real.step(now)
            probe.step(now, attention)
            for i, layer in enumerate(real.layers):
                name, cache, row = f"{tag}.{step}.layer{i}", layer.kv_cache, attention[i][0].sum(1)
                if step == 1:
                    out[f"{tag}.layer{i}.variance"] = layer.multimodal_entropy
                    out[f"{tag}.layer{i}.ratios"] = torch.stack([layer.layer_hh_ratio, layer.layer_recent_ratio])
                if step == 0:
                    before[i] = row
                elif 2 <= i < layers - 1:  # the official code leaves the first two layers and the last alone
                    total = row + nn.functional.pad(before[i], (0, 1))
                    clear(total[:, 4 : row.shape[1] - cache.recent_size], cache.hh_size - 4, f"d2o {name}")
                    before[i] = cache.hh_score.clone()
                    out[f"{tag}.layer{i}.sizes"] = torch.tensor([cache.hh_size, cache.recent_size])
                    out |= {f"{name}.kept": decoded(probe.past[i][0][0]), f"{name}.score": before[i]}
                    out |= {f"{name}.keys": real.past[i][0][0], f"{name}.values": real.past[i][1][0]}
                    out |= {f"{name}.threshold": cache.threshold, f"{name}.attention": attention[i][0, :, 0]}
    return out | d2o_twins(checkout, 800, 40, 8, config)


def d2o_twins(checkout: Path, seed: int, prompt: int, steps: int, config: dict[str, float]) -> Tensors:
    """The official cache alone on two equal heads, for which its decision over heads is one per token."""
    q, k, v = (draw(seed + i, prompt + steps, DIM, scale=1.5 if i == 0 else 1) for i in range(3))
    out: Tensors = {"twin.q": q, "twin.k": k, "twin.v": v}
    caches = []
    for merge in (True, False):
        names, _ = d2o_classes(checkout, 2, DIM, merge)
        caches.append(names["D2O_LayerKVCache"](**config))
    score = attend(q[None, :prompt], k[None, :prompt])[0].sum(0)
    pair, where = (k[:prompt], v[:prompt]), torch.arange(prompt)
    for step in range(1, steps + 1):
        at = prompt + step - 1
        pair = tuple(torch.cat([old, new[at, None]]) for old, new in zip(pair, (k, v)))
        where = torch.cat([where, torch.tensor([at])])
        attention = attend(q[None, at, None], pair[0][None])[0, 0]
        given = attention + nn.functional.pad(score, (0, 1)) if step == 1 else attention  # as the official layer does
        two = [x.expand(1, 2, -1, -1).clone() for x in (*pair, coded(pair[0].shape, where))]
        ratios = config["hh_ratio"], config["recent_ratio"]
        total = given if step == 1 else given + nn.functional.pad(caches[0].hh_score[0], (0, 1))
        heavy, recent = (int((prompt + 1) * ratio) for ratio in ratios)
        clear(total[4 : total.shape[0] - recent], heavy - 4, f"d2o twin step {step}")
        keys, values = caches[0]((two[0], two[1]), given.expand(2, -1).clone(), *ratios, prompt)
        kept, _ = caches[1]((two[2], two[2]), given.expand(2, -1).clone(), *ratios, prompt)
        pair, where, name = (keys[0, 0], values[0, 0]), decoded(kept[0, 0]).long(), f"twin.{step}"
        assert torch.equal(keys[0, 0], keys[0, 1])
        out |= {f"{name}.kept": where.to(torch.int32), f"{name}.keys": pair[0], f"{name}.values": pair[1]}
        out |= {f"{name}.attention": attention, f"{name}.score": caches[0].hh_score[0].clone()}
        out[f"{name}.threshold"] = caches[0].threshold
    out["twin.sizes"] = torch.tensor([caches[0].hh_size, caches[0].recent_size])
    return out


# ---------------------------------------------------------------- Elastic Cache


class Repair(ast.NodeTransformer):
    """The paper's reading of the same lines: see "fixed" in README.md."""

    def __init__(self) -> None:
        self.count = 0

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id in ("selected_idx", "throw_idx"):
            for part in ast.walk(node.value):
                if isinstance(part, ast.Compare) and isinstance(part.comparators[0], ast.Name):
                    self.count += 1
                    part.ops = [ast.GtE() if isinstance(part.ops[0], ast.Gt) else ast.Lt()]
                    if target.id == "throw_idx":
                        start = ast.parse("self.start_size", mode="eval").body
                        node.value = ast.BinOp(node.value, ast.Add(), start)
        return node


def make_elastic(checkout: Path) -> Tensors:
    (path, digest), heads, kv_heads, layers, ratio = *METHODS["elastic"].files.items(), 4, 2, 2, 0.5
    out: Tensors = {"settings": torch.tensor([ratio, 4, -25])}
    torch.Tensor.cuda = lambda self: self  # the official class moves its tensors to the GPU
    tree = read(checkout, path, digest)
    fixed_tree = copy.deepcopy(tree)
    repair = Repair()
    cls = next(x for x in fixed_tree.body if isinstance(x, ast.ClassDef) and x.name == "ElasticCache")
    repair.visit(cls)
    assert repair.count == 2, repair.count
    ranks = Namespace(torch, argsort=lambda x: torch.argsort(torch.argsort(x)))
    for tag, seed, prompt, steps in (("s0", 900, 64, 8), ("s1", 950, 57, 8)):
        q = draw(seed, layers, heads, prompt, DIM, scale=1.5)
        k, v = (draw(seed + i, layers, kv_heads, prompt + steps, DIM) for i in (1, 2))
        attention = attend(q, k[:, :, :prompt])
        out |= {f"{tag}.q": q, f"{tag}.k": k, f"{tag}.v": v}
        for variant, source, tensor in (("official", tree, torch), ("fixed", fixed_tree, ranks)):
            names = space(torch=tensor)
            run([x for x in source.body if not isinstance(x, ast.Import | ast.ImportFrom)], names)
            caches = []
            for coding in (False, True):
                cache = names["ElasticCache"](ratio=ratio, layer_num=layers)
                past, seen = [], 0
                for step in range(steps + 1):
                    new = slice(0, prompt) if step == 0 else slice(prompt + step - 1, prompt + step)
                    for i in range(layers):
                        if coding:  # unmerged positions: the merge is switched off below
                            pair = [coded(k[i].shape, torch.arange(prompt + steps))[None, :, new]] * 2
                        else:
                            pair = [k[i][None, :, new], v[i][None, :, new]]
                        if step:
                            past[i] = [torch.cat([old, x], 2) for old, x in zip(past[i], pair)]
                        else:
                            past.append(pair)
                    seen += new.stop - new.start
                    rows = attention if step == 0 else torch.zeros(layers, heads, 1, past[0][0].shape[2])
                    with unmerged() if coding else contextlib.nullcontext():
                        past = cache(past, num_of_token=seen, attentions=list(rows[:, None]))
                    if coding:
                        kept = torch.stack([decoded(past[i][0])[0, 0] for i in range(layers)])
                        out[f"{tag}.{variant}.{step}.kept"] = kept
                    elif step in (0, steps):
                        out[f"{tag}.{variant}.{step}.keys"] = torch.cat([x[0] for x in past])
                        out[f"{tag}.{variant}.{step}.values"] = torch.cat([x[1] for x in past])
                caches.append(cache)
            out[f"{tag}.score"] = caches[0].score_sum[:, :prompt].clone()
            out[f"{tag}.{variant}.cut"] = torch.tensor(caches[0].selected_idx)
        target = out[f"{tag}.fixed.0.kept"].shape[1]
        clear(out[f"{tag}.score"][:, 4 : prompt - 1], target - 5, f"elastic {tag}")
    return out


@contextlib.contextmanager
def unmerged() -> Iterator[None]:
    merge, torch.Tensor.scatter_reduce = torch.Tensor.scatter_reduce, lambda self, *_: self
    try:
        yield
    finally:
        torch.Tensor.scatter_reduce = merge


# ---------------------------------------------------------------- TidalDecode


class Past:
    """The two methods of a transformers cache that the official forward uses."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v

    def update(self, k: torch.Tensor, v: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        return self.k, self.v

    def get_seq_length(self, _: int) -> int:
        return self.k.shape[2]


def make_tidal(checkout: Path) -> Tensors:
    path = "src/tidal_build/modify_llama.py"

    def repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
        return x.repeat_interleave(n, 1)

    names = space(repeat_kv=repeat_kv, apply_rotary_pos_emb=lambda q, k, cos, sin: (q, k))
    tree = read(checkout, path, METHODS["tidal"].files[path])
    take(tree, ["llama_tidal_attention_forward"], names)
    layers, batch, heads, kv_heads, prompt, steps, top, start, again = 6, 2, 4, 2, 40, 3, 12, 2, 4
    q = draw(1010, layers, batch, heads, steps, DIM, scale=1.5)
    k, v = (draw(1010 + i, layers, batch, kv_heads, prompt + steps, DIM) for i in (1, 2))
    out: Tensors = {"q": q, "k": k, "v": v, "settings": torch.tensor([top, start, again])}
    group = heads // kv_heads
    caches = [Past(k[i, :, :, :prompt], v[i, :, :, :prompt]) for i in range(layers)]
    for step in range(steps):
        picked = None
        for i in range(layers):
            flat = [x[i, :, :, at].flatten(1)[:, None] for x, at in ((q, step), (k, prompt + step), (v, prompt + step))]
            layer = types.SimpleNamespace(
                q_proj=lambda _, x=flat[0]: x, k_proj=lambda _, x=flat[1]: x, v_proj=lambda _, x=flat[2]: x,
                o_proj=lambda x: x, num_heads=heads, num_key_value_heads=kv_heads, num_key_value_groups=group,
                head_dim=DIM, layer_idx=i, attention_dropout=0.0, training=False, pos_dict=picked,
            )  # fmt: skip
            hidden = torch.zeros(batch, 1, heads * DIM)
            output, _, _ = names["llama_tidal_attention_forward"](
                layer, hidden, None, None, caches[i], position_embeddings=(None, None),
                top_k=top, sparse_layer_start=start, correction_layer=again,
            )  # fmt: skip
            picked = layer.pos_dict  # the official model hands it from layer to layer
            out[f"{step}.{i}.output"] = output.view(batch, heads, DIM)
            if i in (start, again):
                logits = q[i, :, :, step, None] @ repeat_kv(caches[i].k, group).transpose(2, 3) / math.sqrt(DIM)
                clear(logits[:, :, 0], top, f"tidal step {step} layer {i}")
                out[f"{step}.{i}.picked"] = picked.nonzero()[:, 3].view(batch, heads, top).to(torch.int32)
    return out


# ---------------------------------------------------------------- command line


@dataclasses.dataclass
class Method:
    source: str
    commit: str
    files: dict[str, str]  # path in the checkout -> SHA-256
    functions: str
    make: Callable[[Path], Tensors]


METHODS = {
    "h2o": Method(
        "https://github.com/FMInference/H2O",
        "ac75c2a8a9e76832b2a4139b9363373b56336bfb",
        {
            "h2o_hf/utils_real_drop/modify_llama.py": (
                "c20cfc046c89db86e21430c1efeb4a9c4a99328037d3cd66887399dba83c246d"
            ),
        },
        "H2OKVCache_LayerWise",
        make_h2o,
    ),
    "snapkv": Method(
        "https://github.com/FasterDecoding/SnapKV",
        "e216ddc84c5bd210378cbdbbba12ba02102aa640",
        {
            "snapkv/monkeypatch/snapkv_utils.py": "d7eddeaf361d9d38be991be734752c831b09f9c95a6e777ac17e7262ca2b4cf5",
        },
        "SnapKVCluster.update_kv, repeat_kv",
        make_snapkv,
    ),
    "kvpress": Method(
        "https://github.com/NVIDIA/kvpress",
        "8bb29b9c3078452a86d692f29123fa6c793e2b05",
        {
            "kvpress/presses/scorer_press.py": "a5eb57a8d9defdaf1f46414fad1584e0c070643a85116d9a85f2e9321cb29728",
            "kvpress/presses/snapkv_press.py": "e26efd590bededa19430429567a97bf5f3c99fa8439f91e75af300c4d3300e04",
            "kvpress/presses/observed_attention_press.py": (
                "689a3b6639ea443bb8ce742d9e4eab0fa5c63d506493bf40127a5219d71afc9f"
            ),
        },
        "ObservedAttentionPress, SnapKVPress, ScorerPress.compress",
        make_kvpress,
    ),
    "keyformer": Method(
        "https://github.com/d-matrix-ai/keyformer-llm",
        "f327831056a9909b133aaa14a48f2bd0722acede",
        {
            "models/mpt-keyformer-lib/attention.py": "8d32d270e43f4e19cf5abb4b9e7e1fc12c2678ac8f890520facf3fd7f0c30548",
        },
        "scaled_multihead_dot_product_attention",
        make_keyformer,
    ),
    "d2o": Method(
        "https://github.com/AIoT-MLSys-Lab/D2O",
        "12c99d8a99617574301be8a853bc7cb59e5c44e3",
        {
            "LLM_merge_new/LMEval_kv_token_merge/modeling_llama3_7b_13b_d2o.py": (
                "7d0cfaa9a09601a83fe10a3e7a03dd6fc4e9211fd4f49c14d2bc3c034222553d"
            ),
            "LLM_merge_new/LMEval_kv_token_merge/modeling_llama3_new.py": (
                "00871d5f79c5bb4a1e7e905fe66d33a7d0f2654bfd4c0208a4206756a39875c7"
            ),
        },
        "D2O_LayerKVCache, LlamaAttention3_D2O, the allocation in LlamaModel.forward",
        make_d2o,
    ),
    "elastic": Method(
        "https://github.com/liuzuyan/ElasticCache",
        "3138e03fc8894231d98a2e5353f27a59af854cc3",
        {"kv_cache.py": "77ae90537568f23cfa8aca1ebc32b185d9b93b50b53351614f41a65b7b5cecc3"},
        "ElasticCache",
        make_elastic,
    ),
    "tidal": Method(
        "https://github.com/DerrickYLJ/TidalDecode",
        "d67a1bdfc2ed7611ed92be4f60883d98197cb641",
        {"src/tidal_build/modify_llama.py": "286acf02837c7cee648d8d69d45c5e86e9a99f46fb9bacc204694aabe280cc18"},
        "llama_tidal_attention_forward",
        make_tidal,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("checkout", type=Path, help="a checkout of the method's repository at the commit in README.md")
    parser.add_argument("--out", type=Path, help="default: METHOD.safetensors beside this script")
    args = parser.parse_args()

    torch.set_num_threads(1)
    method = METHODS[args.method]
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):  # several classes print when they are made
        golden = {name: tensor.detach().clone().contiguous() for name, tensor in method.make(args.checkout).items()}
    for name, tensor in golden.items():
        assert not tensor.is_floating_point() or not tensor.isnan().any(), name
    path = args.out or Path(__file__).with_name(f"{args.method}.safetensors")
    metadata = {
        "source": method.source,
        "commit": method.commit,
        "functions": f"{', '.join(method.files)}: {method.functions}",
        "torch": torch.__version__,
    }
    save_file(golden, path, metadata=metadata)
    print(f"{path}: {len(golden)} tensors, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
