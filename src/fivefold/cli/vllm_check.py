"""`fivefold vllm-check`: the vLLM plug-in with a model and a recipe, beside Fivefold in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated, Any

import typer

from fivefold.cli.app import DtypeOption, PrintJsonOption
from fivefold.cli.models import fetch_if_missing, load_model, model_name
from fivefold.cli.terminal import err, out
from fivefold.errors import InputError
from fivefold.tables import Facts

PROMPTS = (
    "The capital of France is",
    "Write one sentence about rivers:",
    "The history of the lighthouse begins long before electricity. Keepers climbed the stairs every evening. " * 20
    + "In short, the keepers",
)


def vllm_check(
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help="What to serve it with.")],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A folder or a hub name; the embedded model if not given.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; repeat it for more.")] = None,
    tokens: Annotated[int, typer.Option(min=1, metavar="N", help="New tokens of each prompt.")] = 32,
    dtype: DtypeOption = "auto",
    max_model_len: Annotated[int, typer.Option(min=64, metavar="N", help="As vLLM has it.")] = 2048,
    memory: Annotated[float | None, typer.Option(metavar="GIB", help="Memory of the KV cache that vLLM gets.")] = None,
    eager: Annotated[bool, typer.Option(help="Without torch.compile and CUDA graphs: starts sooner.")] = True,
    as_json: PrintJsonOption = False,
) -> None:
    """Start vLLM twice, with its own cache and with a recipe, and hold the tokens against Fivefold in transformers."""
    from fivefold.models import embedded
    from fivefold.serving.vllm import state
    from fivefold.serving.vllm.options import Options

    Options.parse(recipe)
    there = state()
    if not there.loads:
        raise InputError(f"vLLM: {there.said}.")
    fetch_if_missing(model)
    served, tokenizer = load_model(model, dtype, "auto")
    ids = [tokenizer(text).input_ids for text in prompt or PROMPTS]
    if (longest := max(map(len, ids)) + tokens) > max_model_len:
        raise InputError(
            f"a prompt and its answer have {longest} tokens: give --max-model-len {longest}, or shorter ones."
        )
    settings: dict[str, Any] = {
        "dtype": str(served.dtype).removeprefix("torch."), "max_model_len": max_model_len, "enforce_eager": eager,
        "max_num_seqs": max(4, len(ids)), "max_num_batched_tokens": max(max_model_len, sum(map(len, ids))),
    }  # fmt: skip
    if memory is not None:
        settings["kv_cache_memory_bytes"] = int(memory * 2**30)
    wanted = {"model": model or str(embedded.model_dir()), "prompts": ids, "tokens": tokens, "settings": settings}
    found = {}
    for name, one in (("stock", None), ("fivefold", recipe)):
        err.print(f"Starting vLLM {there.version} {'with its own cache' if one is None else 'with ' + one} ...")
        found[name] = _ask({**wanted, "recipe": one})
    rows = [
        compare(served, recipe, *each) for each in zip(ids, found["fivefold"]["tokens"], found["fivefold"]["logprobs"])
    ]
    result = {
        "model": model_name(model), "recipe": recipe, "vllm": found["stock"]["version"], "dtype": settings["dtype"],
        "max_model_len": max_model_len, "capacity_stock": found["stock"]["capacity"],
        "capacity": found["fivefold"]["capacity"], "tokens": tokens, "prompts": rows,
    }  # fmt: skip
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = Facts()
    stock, ours = result["capacity_stock"], result["capacity"]
    table.add_row("KV capacity, stock", f"{stock:,} tokens")
    table.add_row(f"KV capacity, {recipe}", f"{ours:,} tokens ({ours / stock:.2f} times as many)")
    for row in rows:
        said = f"{row['same']} of {tokens} tokens as in transformers, KL {row['kl']:.2g}"
        table.add_row(f"prompt of {row['prompt']} tokens", said)
    out.print(table, crop=False)


def _ask(wanted: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "fivefold.serving.vllm.offline"]
    environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if "kv_cache_memory_bytes" in wanted["settings"]:
        del environment["VLLM_CPU_KVCACHE_SPACE"]  # on a CPU it would count instead
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("fivefold.errors.")] or lines or ["it said nothing"]
        raise InputError(f"vLLM stopped with exit code {done.returncode} ({own[-1].strip().rstrip('.')}).")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def compare(model: Any, recipe: str, ids: list[int], tokens: list[int], logprobs: list[Any]) -> dict[str, Any]:
    """vLLM's tokens beside those of Fivefold in transformers, which reads on with vLLM's.

    kl: of vLLM's distribution from Fivefold's, a mean over the tokens; over vLLM's likeliest ones, and all others as if
    they were one.
    """
    import torch

    import fivefold

    cache, logits, agree, kls = fivefold.compress(model, recipe), None, [], []
    with torch.inference_mode():
        for step, (token, seen) in enumerate(zip(tokens, logprobs)):
            new = [ids] if step == 0 else [[tokens[step - 1]]]
            logits = model(torch.tensor(new, device=model.device), past_key_values=cache).logits[0, -1].double()
            ours = logits.log_softmax(-1)
            agree.append(int(logits.argmax()) == token)
            at = torch.tensor([i for i, _ in seen], device=ours.device)
            theirs = torch.tensor([x for _, x in seen], dtype=torch.float64, device=ours.device)
            rest = [(1 - x.exp().sum()).clamp_min(1e-12) for x in (theirs, ours[at])]
            parts = (theirs.exp() * (theirs - ours[at])).sum() + rest[0] * (rest[0].log() - rest[1].log())
            kls.append(float(parts))
    same = next((i for i, x in enumerate(agree) if not x), len(agree))
    return {"prompt": len(ids), "same": same, "agree": sum(agree), "kl": sum(kls) / len(kls)}
