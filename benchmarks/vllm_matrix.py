"""What the vLLM plug-in must serve on a GPU: heads, dtypes, bits, tensor parallel, chunks, prefix hits, preemption.

    python benchmarks/vllm_matrix.py benchmarks/results/vllm_h100.json gqa-8
    CUDA_VISIBLE_DEVICES=2,3 python benchmarks/vllm_matrix.py FILE tensor-4

A case is one engine over a small model with random weights and so few blocks that requests that come
together put each other off. It is asked

    alone      prompts one by one, the longer ones in chunks
    hit        one of them again: its first chunk comes from the prefix cache
    batch      all of them together, where the prefix cache is not asked
    preempted  prompts that all need another block soon, together; the prefix cache is not asked
    again      prompts of `alone` again, where the prefix cache is not asked

and a `long` case prompts as long as `max_model_len` allows, which vLLM finds out. What vLLM did, which tokens of a
request it computed in which step, is written down, and Fivefold in transformers (in plain PyTorch) does the same: the
same chunks, a hit as packed tokens, and what was put off from its beginning. Of each greedy token, the divergence (KL,
nats) of vLLM's distribution from that one must be no more than `TIMES` that of transformers in this dtype from itself
in float32, and, where bits are few, far from that of a cache that is exact. `again` must be what `alone` was, bit for
bit, and so must `hit` be where nothing is exact beside the packed tokens and both read the same chunks. Exit code 1 if
something does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_gpu import TOP, config, engine, keep

COUNT = 32
"""Tokens behind each prompt."""
TIMES = 3.0
"""What transformers' own rounding may be exceeded by: both round, each in its own way."""
LEAST = 2e-3
"""Nats that are always let pass: where rounding changes no code, both are nearly none."""
TOLD = "FIVEFOLD_VLLM_TOLD"
WORDS, HIDDEN = 8192, 1024
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}


@dataclass(frozen=True)
class Case:
    """heads: query heads, KV heads, head_dim. compiled: with torch.compile too, as vLLM starts if nothing is said."""

    recipe: str
    heads: tuple[int, int, int]
    dtype: str
    settings: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    long: int = 0


SPLIT = {"tensor_parallel_size": 2, "disable_custom_all_reduce": True, "distributed_executor_backend": "mp"}
CASES = {
    "gqa-8": Case("kivi(bits=8)", (8, 2, 128), "bfloat16", compiled=True),
    "gqa-4": Case("kivi(bits=4, residual=0)", (8, 2, 128), "bfloat16"),
    "mha-2": Case("kivi(bits=2, residual=0)", (8, 8, 128), "float16"),
    "mqa-3": Case("kivi(bits=3)", (8, 1, 128), "float16"),
    "wide-4": Case("kivi(bits=4, residual=0)", (4, 2, 256), "bfloat16"),
    "wide-mqa-2": Case("kivi(bits=2)", (4, 1, 256), "float16"),
    "wide-3": Case("kivi(bits=3, residual=32)", (4, 4, 256), "float16"),
    "narrow-3": Case("kivi(bits=3, residual=0)", (16, 4, 64), "float16"),
    "narrow-mha-8": Case("kivi(bits=8)", (16, 16, 64), "bfloat16"),
    "narrow-mqa-2": Case("kivi(bits=2)", (16, 1, 64), "float16"),
    "tensor-4": Case("kivi(bits=4, residual=0)", (8, 2, 128), "bfloat16", SPLIT, compiled=True),
    "tensor-mqa-2": Case("kivi(bits=2)", (8, 1, 128), "float16", SPLIT),
    "long-4": Case("kivi(bits=4)", (8, 2, 128), "float16", long=12000),
}


def small_model(case: Case, name: str) -> Path:
    """A small Llama with random weights, whose texts do not repeat themselves and whose attention matters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from vllm_gpu import FOLDER

    heads, kv_heads, dim = case.heads
    given = config("small") | {
        "hidden_size": HIDDEN, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
        "vocab_size": WORDS,
    }  # fmt: skip
    given = {k: v for k, v in given.items() if k not in ("architectures", "model_type", "torch_dtype")}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**given, initializer_range=0.08))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 3
    path = FOLDER / name
    model.to(torch.bfloat16).save_pretrained(path)
    return path


# -- vLLM ---------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """steps: of every step with tokens of this request, the first that it computed, and how many; at: the numbers of
    these steps. cached: tokens of a prefix hit. logprobs: of each greedy token, pairs of vLLM's likeliest."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[list[tuple[int, float]]]
    cached: int
    steps: list[tuple[int, int]]
    at: list[int]

    @property
    def restarts(self) -> int:
        return sum(later[0] < sum(before) for before, later in zip(self.steps, self.steps[1:]))

    @property
    def chunks(self) -> list[int]:
        """Of the prompt, as it was read first."""
        end = next((i for i, step in enumerate(self.steps) if sum(step) >= len(self.prompt)), len(self.steps))
        return [count for _, count in self.steps[: end + 1]]


def tell() -> None:
    """Have vLLM's scheduler write to the file `TOLD` what it schedules."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule = Scheduler.schedule

    def told(*args: Any, **settings: Any) -> Any:
        out = schedule(*args, **settings)
        first = {one.req_id: one.num_computed_tokens for one in out.scheduled_new_reqs}
        first |= dict(zip(out.scheduled_cached_reqs.req_ids, out.scheduled_cached_reqs.num_computed_tokens))
        new = {one.req_id: list(one.prompt_token_ids) for one in out.scheduled_new_reqs}
        steps = {name: [first[name], count] for name, count in out.num_scheduled_tokens.items()}
        with Path(os.environ[TOLD]).open("a") as file:
            file.write(json.dumps([new, steps]) + "\n")
        return out

    Scheduler.schedule = told


class Asked:
    """An engine whose scheduler tells what it schedules."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.told = Path(os.environ[TOLD])

    def __call__(self, prompts: list[list[int]], fresh: bool = False) -> list[Answer]:
        """Together, different from each other. fresh: the prefix cache is not asked."""
        from vllm import SamplingParams

        before = len(self.told.read_text()) if self.told.exists() else 0
        sampling = SamplingParams(
            temperature=0, max_tokens=COUNT, min_tokens=COUNT, ignore_eos=True, detokenize=False, logprobs=TOP,
            skip_reading_prefix_cache=fresh,
        )  # fmt: skip
        outs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        names, steps = {}, {}
        for number, line in enumerate(self.told.read_text()[before:].splitlines()):
            new, step = json.loads(line)
            for name, ids in new.items():
                names.setdefault(name, tuple(ids))
            for name in step.keys() & names.keys():  # others are of a question before
                mine = steps.setdefault(names[name], ([], []))
                mine[0].append(tuple(step[name]))
                mine[1].append(number)
        return [
            Answer(
                ids, list(out.outputs[0].token_ids),
                [[(i, x.logprob) for i, x in at.items()] for at in out.outputs[0].logprobs],
                out.num_cached_tokens or 0, *steps[tuple(ids)],
            )
            for ids, out in zip(prompts, outs)
        ]  # fmt: skip


# -- Fivefold in transformers -------------------------------------------------------------------------------------


class Reference:
    """Fivefold in transformers, in plain PyTorch, in one dtype."""

    def __init__(self, path: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(self.device)

    def scores(self, recipe: str, answer: Answer) -> Any:
        """Log-probabilities `[tokens, words]`, float64, of an answer's tokens, computed in vLLM's steps."""
        import torch
        from vllm_release import keep as stay_exact

        import fivefold

        text, at, found, cache = answer.prompt + answer.tokens, 0, [], None

        def read(first: int, last: int) -> Any:
            given = torch.tensor([text[first:last]], device=self.device)
            return self.model(given, past_key_values=cache, logits_to_keep=1).logits[0, -1]

        with torch.inference_mode():
            for first, count in answer.steps:
                if len(found) == len(answer.tokens):
                    break  # a step that was under way when the last token was known
                if cache is None or first < at:
                    cache = fivefold.compress(self.model, packed(recipe) if first else recipe)
                    if first:
                        read(0, first)
                        stay_exact(cache, residual(recipe))
                    at = first
                assert first == at, (first, at)
                logits, at = read(first, first + count), first + count
                if at == len(answer.prompt) + len(found):
                    found.append(logits.double().log_softmax(-1).cpu())
        assert len(found) == len(answer.tokens)
        return torch.stack(found)


def residual(recipe: str) -> int:
    from fivefold.serving.vllm.options import Options

    return Options.parse(recipe).method.residual


def packed(recipe: str) -> str:
    from dataclasses import replace

    from fivefold.serving.vllm.options import Options

    return str(replace(Options.parse(recipe).method, residual=0))


def divergences(seen: list[list[tuple[int, float]]], ours: Any) -> Any:
    """KL `[tokens]` in nats of likeliest ones, and all others as if they were one, from log-probabilities `[tokens,
    words]`."""
    import torch

    at = torch.tensor([[i for i, _ in one[:TOP]] for one in seen])
    theirs = torch.tensor([[x for _, x in one[:TOP]] for one in seen], dtype=torch.float64)
    ours = ours.gather(1, at)
    rest = [(1 - x.exp().sum(1)).clamp_min(1e-12) for x in (theirs, ours)]
    return (theirs.exp() * (theirs - ours)).sum(1) + rest[0] * (rest[0].log() - rest[1].log())


def likeliest(scores: Any) -> list[list[tuple[int, float]]]:
    values, at = scores.topk(TOP, 1)
    return [list(zip(*both)) for both in zip(at.tolist(), values.tolist())]


# -- a case -------------------------------------------------------------------------------------------------------


def run(name: str, case: Case, out: Path, more: dict[str, Any]) -> bool:
    began = time.perf_counter()
    import torch

    from fivefold.serving.vllm.options import PAGE, Options

    path, rng = small_model(case, name), random.Random(1)
    heads, kv_heads, dim = case.heads
    pages = Options.parse(case.recipe).pages(dim, getattr(torch, case.dtype))
    block, chunk = pages.block, 512 // pages.block * pages.block  # so that a hit may end with a chunk
    window = PAGE * pages.exact_together
    exact = -(-pages.window // window) + (window > PAGE)
    # Prompts that all need another block after 8 tokens, and blocks for two of four.
    near = 3 * block - 8 if block < 200 else 2 * block - 8
    blocks = max(1 + 4 * (-(-near // block) + exact) + 2, 1 + -(-1536 // block) + exact)
    settings = {
        "dtype": case.dtype, "max_num_batched_tokens": chunk, "max_num_seqs": 4, "max_model_len": 1536,
        "num_gpu_blocks_override": blocks, "kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.3,
        "enable_prefix_caching": True,
    } | case.settings  # fmt: skip
    if not case.compiled and not more.get("enforce_eager"):
        settings["compilation_config"] = GRAPHS
    if case.long:
        del settings["num_gpu_blocks_override"]
        held = pages.blocks_of(case.long) * pages.block_bytes * kv_heads * 2  # of two layers
        settings |= {"max_model_len": -1, "kv_cache_memory_bytes": held, "max_num_batched_tokens": 2048}
    llm = engine(path, case.recipe, **settings | more)
    started = time.perf_counter() - began
    ask = Asked(llm)
    longest = llm.llm_engine.vllm_config.model_config.max_model_len

    def prompts(*lengths: int) -> list[list[int]]:
        return [[rng.randrange(3, WORDS) for _ in range(length)] for length in lengths]

    asked: dict[str, list[Answer]] = {}
    must: dict[str, bool] = {}
    if case.long:
        texts = prompts(longest - COUNT)
        asked["alone"] = ask(texts)
        from fivefold.serving.vllm.cuda import PIECE

        must["a chunk behind two pieces"] = any(first > PIECE for first, count in asked["alone"][0].steps if count > 1)
        try:
            ask(prompts(longest + 1))
            must["longer prompts are refused"] = False
        except Exception as error:  # vLLM's own kinds of them change
            must["longer prompts are refused"] = f"maximum context length is {longest} tokens" in str(error)
    else:
        texts = prompts(5, 100, chunk + block // 2, 2 * chunk + 70)
        asked["alone"] = [ask([ids])[0] for ids in texts]
        must["chunks"] = [len(one.chunks) for one in asked["alone"]] == [1, 1, 2, 3]
        asked["hit"] = ask(texts[2:3])
        must["a hit of a chunk"] = asked["hit"][0].cached == chunk
        if pages.residual == 0:
            must["behind a hit as behind a chunk"] = alike(asked["hit"][0], asked["alone"][2])
        asked["batch"] = ask(texts, fresh=True)
        must["chunks beside tokens"] = mixed(asked["batch"])
        asked["preempted"] = ask(prompts(*[near] * 4), fresh=True)
        must["preempted"] = any(one.restarts for one in asked["preempted"])
        again = [ask([ids], fresh=True)[0] for ids in texts]
        must["again, bit for bit"] = all(map(alike, again, asked["alone"]))
    facts = llm.llm_engine.vllm_config
    row: dict[str, Any] = {
        "case": name, "recipe": case.recipe, "heads": [heads, kv_heads], "head_dim": dim, "dtype": case.dtype,
        "settings": {**case.settings, **more}, "max_model_len": longest, "blocks": facts.cache_config.num_gpu_blocks,
        "capacity": getattr(facts.cache_config, "kv_cache_size_tokens", None), "chunk": chunk, "block": block,
        "graphs": str(facts.compilation_config.cudagraph_mode), "compile": str(facts.compilation_config.mode),
        "async": facts.scheduler_config.async_scheduling, "of": COUNT,
    }  # fmt: skip
    import vllm

    row |= {"vllm": vllm.__version__, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    del llm, ask
    served = time.perf_counter() - began
    os.environ["FIVEFOLD_KERNELS"] = "reference"
    half, single = Reference(path, case.dtype), Reference(path, "float32")
    own, control = [], []
    for one in asked["alone"]:
        scores = single.scores(case.recipe, one)
        own.append(divergences(likeliest(half.scores(case.recipe, one)), scores))
        if len(one.prompt) > pages.window + COUNT:
            control.append(divergences(likeliest(single.scores("full()", one)), scores))
    own, control = (float(torch.cat(x).mean()) for x in (own, control))
    row |= {"own_kl": short(own), "exact_kl": short(control), "parts": {}}
    for part, answers in asked.items():
        found, first = [], []
        for one in answers:
            scores = half.scores(case.recipe, one)
            found.append(divergences(one.logprobs, scores))
            first.append(int((scores.argmax(1) == torch.tensor(one.tokens)).sum()))
        kl = float(torch.cat(found).mean())
        row["parts"][part] = {
            "prompts": [len(one.prompt) for one in answers], "chunks": [len(one.chunks) for one in answers],
            "cached": [one.cached for one in answers], "restarts": [one.restarts for one in answers],
            "as_reference": first, "kl": short(kl), "kls": [short(float(x.mean())) for x in found],
        }  # fmt: skip
        must[f"{part}: kl"] = kl <= TIMES * own + LEAST
        if pages.form.bits < 8 and part != "batch":
            must[f"{part}: kl, beside an exact cache's"] = kl < control / 2
    row["holds"] = {key: bool(holds) for key, holds in must.items()}
    row["s"] = {"start": round(started, 1), "asked": round(served, 1), "all": round(time.perf_counter() - began, 1)}
    keep(out, "matrix", row)
    bad = [key for key, holds in must.items() if not holds]
    parts = {part: one["kl"] for part, one in row["parts"].items()}
    print(f"matrix {name}: {len(must)} checks, do not hold: {bad or 'none'}; own {row['own_kl']}, exact "
          f"{row['exact_kl']}, {parts}, {row['s']}", flush=True)  # fmt: skip
    return not bad


def mixed(answers: list[Answer]) -> bool:
    """Whether in a step one request read a chunk that goes on with a prompt, and another one had a new token."""
    chunks = {at for one in answers for at, (first, count) in zip(one.at, one.steps) if first and count > 1}
    return any(count == 1 and at in chunks for one in answers for at, (_, count) in zip(one.at, one.steps))


def alike(one: Answer, other: Answer) -> bool:
    """The same tokens with the same log-probabilities."""
    return (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


def short(x: float) -> float:
    return float(f"{x:.3g}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="a setting of vLLM's")
    given = parser.parse_args()
    if "tensor_parallel_size" not in CASES[given.case].settings:  # with it an engine in this process waits for ever
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ[TOLD] = str(Path(tempfile.mkdtemp()) / "told.jsonl")
    tell()
    sys.path.append(str(Path(__file__).parents[1] / "scripts"))
    settings = {name: json.loads(value) for name, _, value in (x.partition("=") for x in given.set)}
    return not run(given.case, CASES[given.case], given.out, settings)


if __name__ == "__mp_main__" and TOLD in os.environ:  # a process that vLLM spawned
    tell()
if __name__ == "__main__":
    sys.exit(main())
