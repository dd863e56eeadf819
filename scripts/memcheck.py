"""Decoding steps of every kernel on small random models: for compute-sanitizer, and against plain PyTorch.

    python scripts/memcheck.py                 # on a GPU: every recipe, in graphs, each beside the reference
    python scripts/memcheck.py --poison        # the same where memory that nobody has written to is not a number
    python scripts/memcheck.py --tool memcheck # under compute-sanitizer; or racecheck, initcheck, synccheck
    python scripts/memcheck.py --layers 30 --rows 12 --context 2048 --only duo

Texts are of different lengths. Steps by the kernels, a chunk of several tokens, and steps again, of which one fills a
group that is packed, must give what plain PyTorch gives from the same pages. Which kernels ran is said at the end.

With --tool the script runs itself under compute-sanitizer, and stops before the next recipe once --seconds are over:
those that the kernels in CUDA C++ read come first. Steps are then taken as graphs would, in fused kernels, but kernel
by kernel (--step eager), and without torch's caching of memory: so every tensor is an allocation of its own, and
memcheck sees what lies beside it. With --step graph it replays graphs there, too, and torch caches. initcheck tells
of places that kernels read and then leave out (slots that no span shows are copied, and masked); what uses them
--poison finds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fivefold
from fivefold.kernels.low_rank import cuda as features
from fivefold.kernels.packed_decode import cuda as packed
from fivefold.kernels.rotated_decode import cuda as rotated
from fivefold.models.graph import Step

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
VOCAB = 131
KERNELS = os.environ.get("FIVEFOLD_KERNELS", "auto")
DUO = "duo(retrieval={retrieval}, sink=16, recent=200)"
RECIPES = {
    "rotatekv2": "rotatekv({rotatekv})",
    "rotatekv4": "rotatekv(bits=4, {rotatekv})",
    "kv_heads": "kv_heads(keep=0.5, {kv_heads})",
    "cskv": "cskv(keep=0.3, {cskv})",
    "cskv4": "cskv(keep=0.3, bits=4, {cskv})",
    "kv_heads-wide": "kv_heads(keep=0.75, group={heads}, {kv_heads_wide})",
    "mikv": "mikv(floor=0)",
    "gear": "gear(bits=4)",
    "kivi2": "kivi(bits=2)",
    "kivi2-one": "kivi(bits=2)",
    "kivi4": "kivi(bits=4)",
    "kivi4-short": "kivi(bits=4, residual=512)",
    "full": "full()",
    "minicache": "minicache(start=0) + kivi(bits=4)",
    "h2o": "h2o(keep=0.5)",
    "h2o-kivi": "h2o(keep=0.5) + kivi(bits=4)",
    "keyformer": "keyformer(keep=0.5)",
    "d2o": "d2o(keep=0.5)",
    "tidal": "tidal(top=64, full_layers=1, select_layers=[1]) + kivi(bits=4)",
    "anchors": "anchors(top=64, anchors=[0, 2], recent=8, {anchors})",
    "anchors-kivi": "anchors(top=64, anchors=[0, 2], recent=8, {anchors}) + kivi(bits=4)",
    "razor": "razor(least=64, share=0.2, {razor})",
    "streaming": "streaming(sink=4, recent=100) + kivi(bits=2)",
    "duo": DUO,
    "duo-kivi": DUO + " + kivi(bits=4)",
    "duo-rotatekv4": DUO + " + rotatekv(bits=4, {rotatekv})",
    "duo-rotatekv2": DUO + " + rotatekv(bits=2, {rotatekv})",
    "duo-cskv": DUO + " + cskv(keep=0.3, {cskv})",
    "duo-tidal": DUO + " + tidal(top=64, full_layers=1, select_layers=[1]) + rotatekv(bits=4, {rotatekv})",
}
"""Those first that `rotated.cu`, `features.cu` and `packed.cu` read. kivi2-one: of one text, whose products are made in
registers; kivi4-short: of which nothing is packed yet, though there is room for it."""
SHAPES = {"4x128": (8, 4, 128), "3x64": (9, 3, 64)}
"""Query heads, KV heads and head_dim. Three heads are no power of two: Triton rotates them."""
DTYPES = {"4x128": "bfloat16", "3x64": "float32"}
TESTS = [f"tests/test_{name}.py" for name in ("paged_pack", "gather", "step_kernels", "received", "merge")]
"""Of kernels that no recipe here comes to: of blocks of a serving engine, and of chunks."""
STEPS = 2


def written(name: str, model: Any) -> str:
    """A recipe for this model; heads that hold everything: all of every third layer, one of every other third."""
    from recipes import _LEARNED, _profile

    _LEARNED["kv_heads_wide"] = "kv_heads(keep=0.75)"
    recipe, layers = RECIPES[name], model.config.num_hidden_layers
    heads = range(model.config.num_key_value_heads)
    full = [
        [layer, head] for layer in range(layers) for head in heads if layer % 3 == 0 or (layer % 3 == 1 and not head)
    ]
    recipe = recipe.replace("{retrieval}", str(full)).replace("{heads}", str(len(heads)))
    for method in ("rotatekv", "cskv", "kv_heads", "kv_heads_wide", "anchors", "razor"):
        if f"{{{method}}}" in recipe:
            recipe = recipe.replace(f"{{{method}}}", f'profile="{_profile(method, model)}"')
    return recipe


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def apart(model: Any, recipe: str, rows: int, context: int, graph: bool, beside: bool) -> tuple[list[list[float]], Any]:
    """How far the logits of each call are from the reference's, in parts of their norm, of each row (0 where nothing is
    compared), and why a step was no graph."""
    device = model.device

    def ids(tokens: int, seed: int) -> torch.Tensor:
        return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(device)

    os.environ["FIVEFOLD_KERNELS"] = KERNELS
    cache = fivefold.compress(model, recipe, cuda_graph=graph)
    mask = torch.ones(rows, context, dtype=torch.long, device=device)
    for row in range(rows):
        mask[row, : row * 7 % (context // 2)] = 0
    model(ids(context, 0), attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    far = []
    chunk = (-context - STEPS - 1) % 32 or 32  # the step behind it fills a group of the longest text
    for number, tokens in enumerate([1] * STEPS + [chunk] + [1] * STEPS):
        mask = torch.nn.functional.pad(mask, (0, tokens), value=1)
        given = ids(tokens, number + 1)
        other = cache.fork() if beside else None
        found = model(given, attention_mask=mask, past_key_values=cache).logits.float()
        _wait(device)
        if other is None:
            far.append([0.0])
            continue
        os.environ["FIVEFOLD_KERNELS"] = "reference"
        other.step = None
        wanted = model(given, attention_mask=mask, past_key_values=other).logits.float()
        os.environ["FIVEFOLD_KERNELS"] = KERNELS
        far.append(((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).tolist())
        other.free()
    failed = cache.step.failed if graph and cache.step is not None else "not asked for"
    cache.free()
    fivefold.restore(model)
    return far, failed


def noting(ran: set[str]) -> None:
    """Put down which kernels are launched from now on."""
    import triton

    for module in (packed, rotated, features):

        def launch(*given: Any, _module: Any = module, _launch: Any = module.launch, **more: Any) -> None:
            ran.add(_module.SOURCE.name)
            _launch(*given, **more)

        module.launch = launch
    kind: Any = triton.runtime.jit.JITFunction if torch.cuda.is_available() else triton.runtime.interpreter.GridExecutor
    name = "run" if torch.cuda.is_available() else "__call__"
    call = getattr(kind, name)

    def run(self: Any, *given: Any, **more: Any) -> Any:
        ran.add((self if torch.cuda.is_available() else self.fn).__name__)
        return call(self, *given, **more)

    setattr(kind, name, run)


def under(tool: str, step: str, seconds: int, names: list[str]) -> int:
    """This script under compute-sanitizer; see there. Returns its exit status."""
    mine = [sys.executable, __file__, "--alone", "--step", step, "--seconds", str(seconds), "--tests"]
    # Of calls of the driver that fail there are some that only ask what it can do.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    # racecheck reports kernels of cuBLAS, and memcheck one of torch (it leaves up to three sums behind the last), which
    # are not ours.
    excluded = {"racecheck": "nvjet", "memcheck": "splitkv_combine"}.get(tool)
    quiet += ["--kernel-name-exclude", f"kns={excluded}"] if excluded else []
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *quiet, *mine]
    command += [part for name in names for part in ("--only", name)]
    print(" ".join(command), flush=True)
    caches = {} if step == "graph" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env={**os.environ, **caches}, check=False).returncode


def of_shape(shape: str, dtype: str, layers: int, names: list[str]) -> tuple[Any, dict[str, str]]:
    """A random model, and the recipes for it."""
    torch.manual_seed(0)
    heads, kv_heads, dim = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=288, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim, max_position_embeddings=8192, initializer_range=0.1,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    recipes = {name: written(name, model) for name in names}  # learned on the CPU
    return model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)).eval(), recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(RECIPES), help="names of recipes; all if not given")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="of models; all if not given")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--context", type=int, default=330)
    parser.add_argument("--dtype", help="if not the shape's own")
    parser.add_argument("--step", choices=("graph", "eager", "own"), help="own: the model's own code")
    parser.add_argument("--alone", action="store_true", help="do not compare with the reference")
    parser.add_argument("--poison", action="store_true", help="memory that nobody has written to is not a number")
    parser.add_argument("--tests", action="store_true", help="the tests of other kernels, too")
    parser.add_argument("--seconds", type=int, default=0, help="begin no other recipe after that many; 0 is no limit")
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "initcheck", "synccheck"))
    given = parser.parse_args()
    names, bad, began = given.only or list(RECIPES), [], time.perf_counter()
    if given.tool:
        raise SystemExit(under(given.tool, given.step or "eager", given.seconds or 100, given.only or []))
    warnings.simplefilter("ignore")
    if given.poison:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    if given.step == "eager":
        Step._capture = lambda *_: None  # type: ignore[method-assign]
    ran: set[str] = set()
    noting(ran)
    left: list[str] = []
    for shape in given.shape or list(SHAPES):
        model, recipes = of_shape(shape, given.dtype or DTYPES[shape], given.layers, names)
        for name in names:
            start, title = time.perf_counter(), f"{name} {shape}"
            if given.seconds and start - began > given.seconds:
                left.append(title)
                continue
            try:
                rows = 1 if name.endswith("-one") else given.rows
                wants = given.step != "own"
                far, failed = apart(model, recipes[name], rows, given.context, wants, not given.alone)
            except Exception as error:
                bad.append(title)
                print(f"{title}: FAILED {type(error).__name__}: {error}"[:400], flush=True)
                if "CUDA" in str(error):
                    raise SystemExit(1) from error  # nothing runs any more
                continue
            graph = (
                f"no graph: {failed}" if failed is not None else "a graph" if given.step in (None, "graph") else "eager"
            )
            took = time.perf_counter() - start
            off = [x for step in far for x in step if not x < 0.1]
            # Of tokens that are picked by packed keys two may be as near as the kernel rounds: then a row is off, once.
            if len(off) > (recipes[name].startswith("tidal") or name == "anchors-kivi"):
                bad.append(title)
            print(f"{title}: {' '.join(f'{max(x):.4f}' for x in far)} ({graph}, {took:.1f} s)"[:300], flush=True)
    if given.tests and not (given.seconds and time.perf_counter() - began > given.seconds):
        import pytest

        kind = "gpu" if torch.cuda.is_available() else "not slow"
        if pytest.main(["-q", "-n0", "-p", "no:cacheprovider", "-m", kind, *(str(ROOT / test) for test in TESTS)]):
            bad.append("tests")
    print(f"kernels: {', '.join(sorted(ran))}")
    if left:
        print(f"no time for {len(left)}: {', '.join(left)}")
    print(f"{len(bad)} are wrong: {', '.join(bad)}" if bad else "all that ran are right")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
