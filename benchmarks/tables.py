"""The tables of docs/benchmarks.md, as Markdown, from benchmarks/results/*.json.

    python benchmarks/tables.py [NAME]...

tests/test_docs.py holds that the page has every table as it is printed here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MIB, GIB = 2**20, 2**30


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; head: the names of the columns, as in "cache | ms | MiB"."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def code(recipe: str, graph: bool = False) -> str:
    """A recipe as it is written in a text; graph: its steps are a CUDA graph."""
    if not graph:
        return f"`{recipe}`"
    return "`StaticCache`, as a CUDA graph" if recipe == "StaticCache" else f"`{recipe}`, `cuda_graph=True`"


def demo() -> str:
    found = result("demo")
    rows = [
        (
            code(run["recipe"]), f"{run['cache_bytes'] / MIB:.1f}", f"{run['ratio']:.3f}", f"{run['prefill_s']:.1f}",
            f"{run['decode_ms_per_token']:.0f}", f"{abs(round(run['kl'], 4)):.4f}", f"{run['agreement']:.0%}",
            f"{run['answers_right']}/{len(run['answers'])}",
        )
        for run in (found["baseline"], *found["runs"])
    ]  # fmt: skip
    return markdown("recipe | cache MiB | x exact | prefill s | decode ms/token | KL | top-1 | facts", rows)


def kernels() -> str:
    rows = result("kernels_h100")["rows"]
    at = {(row["kernel"], row["context"], row["batch"]): row for row in rows}
    sizes = ((8192, 1), (32768, 1), (131072, 4), (524288, 1))
    names = {
        **{name: code(name) for name in ("full()", "kivi(bits=8)", "kivi(bits=4)", "kivi(bits=4, group=128)")},
        **{name: code(name) for name in ("kivi(bits=3)", "kivi(bits=2)", "kivi(bits=2, group=128)")},
        "duo, 1/2 of the heads": "half of the heads streaming (`duo`)",
        "tidal, 512 tokens picked": "512 tokens picked (`tidal`, sparse layers)",
        "tidal, 512 tokens picked of kivi(bits=4)": "512 tokens picked of `kivi(bits=4)`",
        "tidal, 512 tokens picked of kivi(bits=2)": "512 tokens picked of `kivi(bits=2)`",
    }
    made = [("SDPA flash, ms", *(f"{at['SDPA flash bf16', *size]['ms']:.4f}" for size in sizes))]
    made += [(shown, *(f"{at[name, *size]['gain']:.2f}x" for size in sizes)) for name, shown in names.items()]
    return markdown("recipe | " + " | ".join(f"{context:,} x {batch}" for context, batch in sizes), made)


def decode() -> str:
    rows = result("decode_h100")["rows"]
    short, long = ([row for row in rows if row["context"] == context] for context in (32768, 131072))
    made = [
        (
            code(one["recipe"], one["graph"]), f"{one['ms']:.1f} ({one['mean_ms']:.1f})",
            f"{two['ms']:.1f} ({two['mean_ms']:.1f})", f"{two['cache_bytes'] / MIB:,.0f}",
        )
        for one, two in zip(short, long, strict=True)
    ]  # fmt: skip
    return markdown("cache | 32,768 | 131,072 | MiB at 131,072", made)


def steps(card: str = "h100") -> str:
    rows = [row for row in result(f"steps_{card}")["rows"] if row["batch"] == 1]
    at = {(row["shape"], row["context"], row["recipe"]): row for row in rows}
    places = [("smollm2", 7000), ("llama-3-8b", 4096), ("llama-3-8b", 32768), ("llama-3-8b", 131072)]

    def cell(place: tuple[str, int], recipe: str) -> str:
        row = at.get((*place, recipe), {})
        if "ms" not in row:
            return "–"
        return f"{row['ms']:.2f} ({row['graph_ms']:.2f})" if "graph_ms" in row else f"{row['ms']:.2f}"

    made = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        last = at.get((*places[-1], recipe), {})
        against = f"{last['faster']:.2f}x" if "faster" in last else "–"
        floor = f"{last['of_floor']:.2f}x" if "of_floor" in last else "–"
        made.append((code(recipe), *(cell(place, recipe) for place in places), against, floor))
    return markdown("cache | SmolLM2, 7,000 | 8B, 4,096 | 8B, 32,768 | 8B, 131,072 | faster | of its floor", made)


def steps_h200() -> str:
    return steps("h200")


def packing() -> str:
    found = result("packing_h100")
    before = {row["recipe"]: row for row in found["before"]}
    made = [
        (code(row["recipe"]), f"{row['ms']:.2f}", f"{row['mean_ms']:.2f}", f"{before[row['recipe']]['mean_ms']:.2f}")
        for row in found["rows"]
    ]
    return markdown("cache | median ms | mean ms | mean ms, layer by layer", made)


def _prefill(name: str) -> str:
    rows = result(name)["rows"]
    made = [(code(row["recipe"]), f"{row['seconds']:.2f}", f"{row['peak_bytes'] / MIB:,.0f}") for row in rows]
    return markdown("cache | s | peak MiB", made)


def prefill() -> str:
    return _prefill("prefill_h100")


def prefill_chunked() -> str:
    return _prefill("prefill_chunked_h100")


def largest_batch() -> str:
    rows = [row for row in result("capacity_h100")["rows"] if row["what"] == "batch"]
    made = [
        (
            code(row["recipe"]), str(row["batch"]), f"{row['cache_bytes'] / GIB:.1f}", f"{row['ms']:.1f}",
            f"{row['tokens_s']:,.0f}", f"{row['gain']:.1f}x",
        )
        for row in rows
    ]  # fmt: skip
    return markdown("cache | sequences | GiB | ms a step | tokens/s | of `DynamicCache`", made)


def longest_context() -> str:
    rows = [row for row in result("capacity_h100")["rows"] if row["what"] == "context"]
    made = [
        (code(row["recipe"]), f"{row['context']:,}", f"{row['cache_bytes'] / GIB:.1f}", f"{row['ms']:.1f}")
        for row in rows
    ]
    return markdown("cache | tokens | GiB | ms a step", made)


def ragged() -> str:
    runs = result("ragged_h100")["runs"]
    names = {
        "full()": code("full()"),
        "kivi(bits=4)": code("kivi(bits=4)"),
        "duo half + kivi(bits=4)": "half of the heads streaming + `kivi(bits=4)`",
    }
    made = []
    for name, shown in names.items():
        found = [next(row for row in run if row["recipe"] == name) for run in runs]
        ratios = [", ".join(f"{one[kind]:.2f}" for one in found) for kind in ("ratio", "ratio_mean")]
        made.append([shown, f"{found[0]['ragged_ms']:.1f}", f"{found[0]['equal_ms']:.1f}", *ratios])
    return markdown("cache | ragged, ms a step | equal | ratio of medians, by visits | of means, by visits", made)


def generation() -> str:
    made = []
    for name in ("generation_h100", "generation_full_h100", "generation_batch32_h100"):
        found = result(name)
        row = found["rows"][0]

        def each(how: str, key: str, digits: int, row: Any = row) -> str:
            return ", ".join(f"{run[key]:.{digits}f}" for run in row[how])

        made.append(
            (
                code(row["recipe"]), str(found["max_batch"]), each("many", "tokens_per_second", 0),
                each("static", "tokens_per_second", 0), f"{row['many_over_static']:.2f}",
                each("static", "prefill_seconds", 1), each("static", "decode_seconds", 1), f"`{name}.json`",
            )
        )  # fmt: skip
    head = "cache | `max_batch` | `generate_many`, tokens/s | static, tokens/s | ratio of means"
    return markdown(f"{head} | static: reading, s | static: steps, s | file", made)


def prefix() -> str:
    made = []
    for name in ("generation_h100", "generation_full_h100"):
        row = result(name)["rows"][0]
        later = row["prefix"]["later_seconds"]
        seconds = f"{row['prefix']['first_seconds']:.2f}", f"{min(later):.2f} to {max(later):.2f}"
        made.append((code(row["recipe"]), *seconds))
    return markdown("cache | first request, s to the first token | the 15 others", made)


def sessions() -> str:
    return _sessions("sessions_h100")


def sessions_cpu() -> str:
    return _sessions("sessions_cpu")


def _sessions(name: str) -> str:
    made = [
        (
            code(row["recipe"]), f"{row['tokens']:,}", f"{row['bytes'] / MIB:,.0f}",
            *(f"{row[f'{key}_s']:.3f}" for key in ("read", "save", "load", "offload", "restore")),
            f"{row['read_over_load']:.2f}x", f"{row['read_over_restore']:.0f}x",
        )
        for row in result(name)["rows"]
    ]  # fmt: skip
    head = "cache | tokens | MiB | read, s | save, s | load, s | offload, s | restore, s"
    return markdown(f"{head} | load against read | restore against read", made)


def day() -> str:
    made = []
    for name in ("day_smollm2_cpu", "day_smollm2_cpu_batch1", "day_smollm2_cpu_full"):
        row = result(name)["rows"][0]
        differing, mean, resumed = row["answers_other_than_alone"], row["waiting_on_average"], row["resumed"]
        places = " / ".join(f"{mean[key]:.0f}" for key in ("resident", "offloaded", "saved"))
        times = (f"{resumed[key]['median_ms']:.0f} ({resumed[key]['times']})" for key in ("offloaded", "saved"))
        made.append((
            code(row["recipe"]), f"{row['conversations']}", f"{row['answered']:,} of {row['turns']:,}",
            f"{row.get('max_batch', 16)}",
            f"{differing if isinstance(differing, int) else len(differing)}", f"{row['cap_bytes'] / MIB:.0f}",
            f"{row['most_bytes'] / MIB:.0f}", f"{row['preemptions']}", places, *times,
        ))  # fmt: skip
    head = "cache | conversations | turns answered | batch | other than alone | cap, MiB | most, MiB | preempted"
    where = "waiting on average in pages / host / disk"
    return markdown(f"{head} | {where} | resumed from host, ms (times) | from disk, ms (times)", made)


def decode_cpu() -> str:
    made = [
        (code(row["recipe"]), f"{row['ratio']:.3f}", f"{row['prefill_x']:.2f}", f"{row['decode_x']:.2f}")
        for row in result("decode_cpu")["rows"]
    ]
    return markdown("recipe | bytes x | prefill x | decode x", made)


def prompts() -> str:
    """Seconds of 32,768 tokens, of `benchmarks/plan_gpu.py`."""
    rows = [row for row in result("plan_h100")["rows"] if row["what"] == "prompt" and row["context"] == 32768]
    at = {(row["model"], row["recipe"], row["chunk"], bool(row.get("own"))): f"{row['seconds']:.2f}" for row in rows}
    asked = ((8192, False), (8192, True), (2048, False), (2048, True), (None, False))
    made = [
        (name, code(recipe), *(at[model, recipe, *one] for one in asked))
        for model, name in (("llama-3-8b", "Llama-3-8B"), ("llama-3.2-1b", "Llama-3.2-1B"))
        for recipe in ("full()", "kivi(bits=4)")
    ]
    return markdown("shape | cache | chunks of 8,192 | own code | of 2,048 | own code | at once", made)


def largest() -> str:
    """The largest batches of Llama-3-8B's shape, of `benchmarks/plan_gpu.py`."""
    found = result("plan_h100")
    now, before = (
        {
            (row["recipe"], row["context"]): row
            for row in rows
            if row.get("size") == "largest" and row["model"] == "llama-3-8b" and row["layers"] is None
        }
        for rows in (found["rows"], found["before"])
    )
    made = [
        (
            code(recipe), f"{context:,}", str(row["batch"]), str(before[recipe, context]["batch"]), f"{row['ms']:.1f}",
            f"{row['tokens_s']:,.0f}",
        )
        for context in (32768, 4096)
        for (recipe, length), row in now.items()
        if length == context
    ]  # fmt: skip
    return markdown("cache | tokens each | sequences | before | ms a step | tokens/s", made)


def h200() -> str:
    """Steps of Llama-3-8B's shape alone, and of the largest batches, of `benchmarks/plan_gpu.py`."""
    rows = [row for row in result("plan_h200")["rows"] if row["what"] == "step" and row["model"] == "llama-3-8b"]
    at = {(row["recipe"], row["context"], row["size"]): row for row in rows if not row["layers"] and not row.get("own")}
    made = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        alone = (f"{at[recipe, context, 'alone']['ms']:.2f}" for context in (4096, 32768, 131072, 524288))
        many = at[recipe, 32768, "largest"]
        made.append((code(recipe), *alone, str(many["batch"]), f"{many['ms']:.1f}", f"{many['tokens_s']:,.0f}"))
    head = "cache | 4,096 | 32,768 | 131,072 | 524,288 | sequences of 32,768 | ms a step | tokens/s"
    return markdown(head, made)


TABLES = (
    demo, kernels, decode, steps, steps_h200, packing, prefill, prefill_chunked, prompts, largest_batch,
    longest_context, largest, h200, ragged, generation, prefix, sessions, sessions_cpu, day, decode_cpu,
)  # fmt: skip


def main(names: Sequence[str]) -> None:
    for table in TABLES:
        if not names or table.__name__ in names:
            print(f"{table.__name__}\n\n{table()}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
