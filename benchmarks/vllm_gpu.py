"""Fivefold inside vLLM beside vLLM's own caches, on a GPU.

    python benchmarks/vllm_gpu.py check benchmarks/results/vllm_h100.json --recipe "kivi(bits=2)"
    python benchmarks/vllm_gpu.py check benchmarks/results/vllm_h100.json --recipe "kivi(bits=2)" --offload 1
    python benchmarks/vllm_gpu.py check benchmarks/results/vllm_h100.json --set tensor_parallel_size=2
    python benchmarks/vllm_gpu.py time benchmarks/results/vllm_h100.json --cache "kivi(bits=2)" 1x4096 1x32768 72x32768
    python benchmarks/vllm_gpu.py time benchmarks/results/vllm_h100.json --cache fp8 1x4096 1x32768 24x32768

`time` serves Llama-3-8B's shape with random weights in bfloat16, torch.compile and CUDA graphs on, and writes for each
case (requests x tokens of context) the time of a step, (t(65 tokens) - t(1 token)) / 64 on the clock of the client,
median of 3; the prompts are not computed but filled in (`vllm_prefilled.py`), save those of a case that ends in r,
whose time until the first token is written too. `check` serves a small model with random weights and compares: each
greedy token with what Fivefold in transformers (in plain PyTorch) finds likeliest behind the same tokens. With
`--offload` (GiB of the host's memory) prompts also come back from there, after the GPU has forgotten them, and must
have the tokens that they have behind blocks which never left the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOKENS = 64
TOP = 20
"""Log-probabilities that are given of a token, as many as vLLM gives at most."""
FOLDER = Path(tempfile.gettempdir()) / "fivefold-vllm-gpu"
SHAPES = {"small": (1024, 2, 8, 2, 2048, 8192), "8b": (4096, 32, 32, 8, 14336, 128256)}


def config(name: str) -> dict[str, Any]:
    """A Llama: hidden size, layers, query heads, KV heads, width of the MLP, words."""
    hidden, layers, heads, kv_heads, width, words = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 140000, "use_cache": True,
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": width, "vocab_size": words, "head_dim": 128,
    }  # fmt: skip


def folder(name: str) -> Path:
    path = FOLDER / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config(name)))
    return path


def keep(out: Path, key: str, row: dict[str, Any]) -> None:
    """Add a row to the results at once: what follows may fail."""
    found = json.loads(out.read_text()) if out.exists() else {}
    found.setdefault(key, []).append(row)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(key, json.dumps(row), flush=True)


def engine(model: Path, cache: str, **settings: Any) -> Any:
    """vLLM with a cache: a recipe, or what --kv-cache-dtype takes."""
    from vllm import LLM

    recipe = "(" in cache
    given = {"additional_config": {"fivefold": cache}} if recipe else {"kv_cache_dtype": cache}
    common = {"model": str(model), "skip_tokenizer_init": True, "dtype": "bfloat16", "seed": 0}
    return LLM(**common | given | settings)


def answers(llm: Any, prompts: list[list[int]], count: int) -> tuple[float, list[tuple[list[int], int]]]:
    """Seconds, and for each prompt greedy tokens and how many of its own tokens were not computed."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
    before = time.perf_counter()
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    took = time.perf_counter() - before
    found = [(list(out.outputs[0].token_ids), out.num_cached_tokens or 0) for out in outs]
    assert all(len(ids) == count for ids, _ in found)
    return took, found


def generate(llm: Any, prompts: list[list[int]], count: int) -> tuple[float, list[list[int]]]:
    """Seconds, and greedy tokens."""
    took, found = answers(llm, prompts, count)
    return took, [ids for ids, _ in found]


def logprobs(llm: Any, ids: list[int], count: int) -> Iterator[float]:
    """Of greedy tokens behind a prompt: numbers, if the model's are."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=1)
    (found,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    for token, given in zip(found.outputs[0].token_ids, found.outputs[0].logprobs):
        yield round(given[token].logprob, 4)


def timed(out: Path, cache: str, cases: list[str], settings: dict[str, Any]) -> None:
    began = time.perf_counter()
    sys.path.insert(0, str(Path(__file__).parent))
    connector = {"kv_connector": "Prefilled", "kv_role": "kv_both", "kv_connector_module_path": "vllm_prefilled"}
    common = {"load_format": "dummy", "enable_prefix_caching": False, "max_num_batched_tokens": 8192}
    llm = engine(folder("8b"), cache, kv_transfer_config=connector, **common | settings)
    import torch
    import vllm

    facts = llm.llm_engine.vllm_config
    kept = facts.cache_config
    keep(out, "engines", {
        "cache": cache, "start_s": round(time.perf_counter() - began, 1), "vllm": vllm.__version__,
        "torch": torch.__version__, "tokens": getattr(kept, "kv_cache_size_tokens", None),
        "blocks": kept.num_gpu_blocks,
        "graphs": str(facts.compilation_config.cudagraph_mode), "max_num_seqs": facts.scheduler_config.max_num_seqs,
        "async": facts.scheduler_config.async_scheduling,
    })  # fmt: skip
    rng, words = random.Random(0), SHAPES["8b"][-1]
    for case in cases:
        real = case.endswith("r")
        batch, context = map(int, case.rstrip("r").split("x"))
        length = context - TOKENS // 2 + 1  # the context is what a step sees in the middle
        prompts = [[1 if real else 2] + [rng.randrange(3, words) for _ in range(length - 1)] for _ in range(batch)]
        try:
            generate(llm, prompts, 9)
            steps, first = [], []
            for _ in range(1 if real else 3):
                one, _ = generate(llm, prompts, 1)
                more, tokens = generate(llm, prompts, TOKENS + 1)
                steps.append((more - one) / TOKENS * 1e3)
                first.append(one)
            step = statistics.median(steps)
            keep(out, "times", {
                "cache": cache, "batch": batch, "context": context, "computed": real, "step_ms": round(step, 3),
                "all_ms": [round(x, 3) for x in steps], "tokens_per_s": round(batch / step * 1e3, 1),
                "first_s": round(statistics.median(first), 3), "distinct": len(set(tokens[0])),
            })  # fmt: skip
        except Exception as error:
            keep(out, "failed", {"cache": cache, "case": case, "error": repr(error)[:500]})
            raise
    keep(out, "logprobs", {"cache": cache, "of": list(logprobs(llm, [1, *range(3, 1003)], 8))})


def small_model() -> Path:
    """A small model with random weights, whose texts do not repeat themselves and whose attention matters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder("small")
    torch.manual_seed(0)
    given = {k: v for k, v in config("small").items() if k not in ("architectures", "model_type", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**given, initializer_range=0.08))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 3
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def came_back(llm: Any, prompts: list[list[int]], others: list[list[int]], count: int) -> dict[str, Any]:
    """Prompts that the engine knows, behind blocks on the GPU, and again when blocks must come from the host."""
    known = [answers(llm, [ids], count)[1][0] for ids in prompts]
    generate(llm, others, count)
    generate(llm, [[3]], count)  # fills no block: steps in which copies to the host end, which hold on to blocks
    assert llm.reset_prefix_cache()
    back = [answers(llm, [ids], count)[1][0] for ids in prompts]
    moved = {"loaded": "vllm:kv_offload_load_bytes", "stored": "vllm:kv_offload_store_bytes"}
    metrics = llm.get_metrics()
    return {
        "cached_on_gpu": [cached for _, cached in known],
        "cached_on_host": [cached for _, cached in back],
        "same_when_back": [same(one[0], other[0]) for one, other in zip(back, known)],
        **{f"bytes_{word}": sum(m.value for m in metrics if m.name == name) for word, name in moved.items()},
    }


def checked(out: Path, recipes: list[str], offload: float | None, more: dict[str, Any]) -> None:
    path = small_model()
    rng, words, chunk, count = random.Random(1), SHAPES["small"][-1], 512, 48
    prompts = [[rng.randrange(3, words) for _ in range(length)] for length in (5, 100, 300, 1100)]
    for recipe in recipes:
        began = time.perf_counter()
        settings = {"max_num_batched_tokens": chunk, "max_model_len": 4096, "max_num_seqs": 8} | more
        if offload is not None:
            settings |= {"kv_offloading_size": offload, "disable_log_stats": False}
        llm = engine(path, recipe, **{"gpu_memory_utilization": 0.3} | settings)
        found = generate(llm, prompts[:3], count)[1] + generate(llm, prompts[3:], count)[1]
        again = generate(llm, prompts[:2], count)[1]  # a batch of others, with graphs of another size
        hit = generate(llm, prompts[3:], count)[1][0]
        row: dict[str, Any] = {"recipe": recipe, "prompts": [len(ids) for ids in prompts], "of": count, **more}
        if offload is not None:
            others = [[rng.randrange(3, words) for _ in range(900)] for _ in range(4)]
            row |= {"offload_gib": offload, **came_back(llm, prompts[2:], others, count)}
        del llm
        row["again"] = [same(*both) for both in zip(again, found)]
        row["behind_a_hit"] = same(hit, found[3])
        given = list(zip(prompts, found))
        half = [scores(path, recipe, *one, chunk, "bfloat16") for one in given]
        whole = [scores(path, recipe, *one, chunk, "float32") for one in given]
        full = [scores(path, "full()", *one, chunk, "bfloat16") for one in given]
        texts = [torch_tensor(one) for one in found]
        row["as_reference"] = [likeliest(x, y) for x, y in zip(half, texts)]
        row["reference_in_float32_as_in_bfloat16"] = [likeliest(x, y.argmax(1)) for x, y in zip(half, whole)]
        row["as_full"] = [likeliest(x, y) for x, y in zip(full, texts)]
        row["s"] = round(time.perf_counter() - began, 1)
        keep(out, "checks", row)


def torch_tensor(numbers: list[int]) -> Any:
    import torch

    return torch.tensor(numbers)


def same(one: list[int], other: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def likeliest(logits: Any, tokens: Any) -> tuple[int, float]:
    """How many of the tokens `[n]` are the likeliest by logits `[n, words]`, and by how much the worst of the others is
    less likely than that, in nats."""
    gaps = logits.max(1).values - logits.gather(1, tokens[:, None])[:, 0]
    return int((logits.argmax(1) == tokens).sum()), round(float(gaps.max()), 3)


def scores(path: Path, recipe: str, ids: list[int], tokens: list[int], chunk: int, dtype: str) -> Any:
    """Logits `[n, words]` of Fivefold in transformers, by which each of the tokens behind a prompt is chosen, whatever
    it was."""
    import torch
    from transformers import AutoModelForCausalLM

    import fivefold

    os.environ["FIVEFOLD_KERNELS"] = "reference"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
    cache = fivefold.compress(model, recipe)
    found = []
    with torch.inference_mode():
        for first in range(0, len(ids), chunk):
            given = torch.tensor([ids[first : first + chunk]], device=device)
            logits = model(given, past_key_values=cache).logits[0, -1].float()
        for token in tokens:
            found.append(logits.cpu())
            logits = model(torch.tensor([[token]], device=device), past_key_values=cache).logits[0, -1].float()
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*", help="requests x tokens of context, as 1x4096")
    parser.add_argument("--recipe", action="append", help="to check")
    parser.add_argument("--cache", default="auto", help="to time: a recipe, or auto or fp8")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a setting of vLLM's")
    parser.add_argument("--offload", type=float, metavar="GIB", help="check what comes back from the host's memory too")
    given = parser.parse_intermixed_args()
    settings = {name: json.loads(value) for name, _, value in (x.partition("=") for x in given.set)}
    if given.what == "check":
        checked(given.out, given.recipe or ["kivi(bits=2)"], given.offload, settings)
    else:
        timed(given.out, given.cache, given.cases, settings)


if __name__ == "__main__":
    main()
