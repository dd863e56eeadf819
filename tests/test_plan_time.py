"""The planner's times: the figures of the paper, what must hold of them, and the constants of machines."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fivefold.errors import InputError
from fivefold.plan import memory
from fivefold.plan import time as plan_time
from fivefold.plan.fit import FITTED, Prompt, Row, fit_prompts, fit_steps, least, llama
from fivefold.plan.machine import KINDS, Machine, find_machine, here, measured_file, read_machine, shipped
from fivefold.plan.shape import LayerShape, ModelShape
from fivefold.plan.time import Read, prefill, step, switch
from fivefold.recipe import Recipe

EIGHT = llama(
    {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }
)  # fmt: skip
H100 = find_machine("h100")


def exact(context: int, batch: int = 1) -> tuple[Read, ...]:
    return (Read("exact", 16, context * batch * sum(2 * layer.numbers for layer in EIGHT.layers), 32),)


# Fu, "Challenges in Deploying Long-Context Transformers", arXiv:2405.08944: its running example is a model of 34B
# parameters (Yi-34B: 60 layers, 8 KV heads of 128 channels, hidden 7168) at 50K tokens on an A100 of 80 GB, without
# overheads: 312 TFLOP/s, 2 TB/s, 20 GB/s to the host. The paper's GB of a cache are GiB of so many thousand tokens.
YI = ModelShape(
    "yi-34b", "llama", (LayerShape("full", 56, 8, 128),) * 60, 7168, 64000, 34_000_000_000, 0, 68_000_000_000
)  # fmt: skip
IDEAL = Machine(
    "ideal A100", 80 * 10**9, 80 * 10**9, 2e12, 312e12, {"1": 2e12}, {kind: [[2e9, 1e-3]] for kind in KINDS},
    {f"{what} {size} {dim}": 312e12 for what in ("causal", "past") for size in ("small", "large") for dim in (64, 128)},
    dict.fromkeys(KINDS[1:], 1.0), dict.fromkeys(KINDS[1:], 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
    dict.fromkeys(("exact", "packed", "split"), ((0.0, 0.0), (0.0, 0.0))), 20e9, 20e9, {"exact": 0.0, "packed": 0.0},
    {"exact": 0.0, "packed": 0.0}, 20e9, 20e9, 3e11, 0.0, "2024-05-14", "arXiv:2405.08944",
)  # fmt: skip


def cache_of(tokens: int) -> int:
    return tokens * sum(2 * layer.numbers for layer in YI.layers)


def test_paper_cache_and_users() -> None:
    """11 GB at 50K, 22.8 at 100K, 0.91 at 4K; (80 - 68) / 11 is one user."""
    for tokens, gigabytes in ((50_000, 11), (100_000, 22.8), (4_000, 0.91)):
        assert cache_of(tokens) / 2**30 == pytest.approx(gigabytes, rel=0.05)
    assert (IDEAL.memory - YI.weight_bytes) // (11 * 10**9) == 1


def test_paper_decoding() -> None:
    """9.8 seconds for 250 tokens, a screen: 250 x (68 + 11) GB / 2 TB/s, which is 9.875."""
    one = step(YI, IDEAL, 1, (Read("exact", 16, 11 * 10**9, 60),))
    assert one is not None and 250 * one.seconds == pytest.approx(9.875)
    assert one.bound == "bandwidth"
    own = step(YI, IDEAL, 1, (Read("exact", 16, cache_of(50_000), 60),))  # in bytes, not in GiB taken for GB
    assert own is not None and 250 * own.seconds == pytest.approx(9.8, rel=0.03)


def test_paper_switching() -> None:
    """1.1 seconds: 11 GB out and 11 GB in, at 20 GB/s."""
    assert switch(IDEAL, 11e9).seconds == pytest.approx(1.1)
    assert switch(IDEAL, cache_of(50_000)).seconds == pytest.approx(1.1, rel=0.12)


def test_paper_prefill() -> None:
    """14.1 seconds at 50K. The products alone, 2 x 34e9 x 50,000 / 312e12, take 10.9, and attention as it is counted
    here (4 operations a channel and pair of tokens, of which a causal mask leaves half) 6.9 more. The paper's figure
    comes out, within 2%, if one of attention's two products is counted."""
    read = prefill(YI, IDEAL, 50_000)
    assert read is not None and read.bound == "compute"
    products = read.terms[0].seconds
    assert products == pytest.approx(10.9, rel=0.02)  # logits are of one token here
    assert read.seconds - products == pytest.approx(4 * 7168 * 60 * 50_000**2 / 2 / 312e12)
    assert products + (read.seconds - products) / 2 == pytest.approx(14.1, rel=0.02)


def test_terms_sum_and_are_said() -> None:
    one = step(EIGHT, H100, 4, (*exact(4096, 4), Read("packed", 4, 10**9, 32)))
    assert one is not None
    assert one.seconds == pytest.approx(sum(term.seconds for term in one.terms))
    said = one.explain().splitlines()
    assert len(said) == len(one.terms) + 1 and all(" = " in line for line in said[:-1])


def test_more_takes_longer() -> None:
    last = 0.0
    for context, batch in ((4096, 1), (32768, 1), (32768, 8), (32768, 64), (131072, 64)):
        one = step(EIGHT, H100, batch, exact(context, batch))
        assert one is not None and one.seconds > last
        last = one.seconds
    times = [prefill(EIGHT, H100, n) for n in (1024, 4096, 32768, 131072)]
    assert sorted(x.seconds for x in times if x) == [x.seconds for x in times if x]
    assert switch(H100, 2e9).seconds > switch(H100, 1e9).seconds > switch(H100, 1e9, back=False).seconds


def test_bounds() -> None:
    long, wide, tiny = step(EIGHT, H100, 1, exact(131072)), step(EIGHT, H100, 4096, ()), replace(EIGHT, weight_bytes=9)
    assert long is not None and long.bound == "bandwidth"
    assert wide is not None and wide.terms[0].bound == "compute"
    small = step(tiny, H100, 1, ())
    assert small is not None and small.bound == "launches"
    assert switch(H100, 1e9).bound == "link"


def test_several_gpus() -> None:
    reads = exact(131072)
    one, two, many = (step(EIGHT, IDEAL, 1, reads, gpus=n) for n in (1, 2, 16))
    assert one is not None and two is not None and many is not None
    assert two.terms[0].seconds == pytest.approx(one.terms[0].seconds / 2)
    assert two.terms[1].seconds == pytest.approx(one.terms[1].seconds / 2)
    # Eight KV heads: each of sixteen GPUs holds a whole one.
    assert many.terms[1].seconds == pytest.approx(one.terms[1].seconds / 8)
    assert many.terms[-1].name == "all-reduce" and many.terms[-1].seconds > two.terms[-1].seconds
    assert plan_time.tokens_a_second(one, 4, 3) == pytest.approx(12 / one.seconds)


def test_prompts_in_chunks() -> None:
    whole, parts = prefill(EIGHT, H100, 32768), prefill(EIGHT, H100, 32768, chunk=2048)
    packed = prefill(EIGHT, H100, 32768, chunk=2048, packed=40000, bits=4)
    assert whole is not None and parts is not None and packed is not None
    assert whole.seconds < parts.seconds < packed.seconds
    # The same pairs of tokens, whether they are stored or new.
    ideal = replace(IDEAL, bandwidth=1e30)
    one, other = (prefill(EIGHT, ideal, 32768, chunk=chunk) for chunk in (None, 2048))
    assert one is not None and other is not None and one.seconds == pytest.approx(other.seconds)


def test_heads_that_see_a_window_compute_less() -> None:
    """reach is the share of pairs; where heads differ, the host launches twice."""
    small = replace(EIGHT, layers=EIGHT.layers[:2])
    assert memory.reach_of(Recipe.parse("full()"), small, 32768) == (1.0, False)
    assert memory.reach_of(Recipe.parse("kivi(bits=4)"), small, 32768) == (1.0, False)
    assert memory.reach_of(Recipe.parse("streaming(sink=4, recent=60)"), small, 64) == (1.0, False)
    reach, split = memory.reach_of(Recipe.parse("duo(keep=0.5)"), small, 32768)
    assert split and reach == pytest.approx(0.5 + 0.5 * 2 * (64 + 256) / 32768, rel=0.01)
    given = {"packed": 40000.0, "bits": 4}
    for chunk in (None, 8192):
        whole, half, both = (
            prefill(EIGHT, H100, 131072, chunk=chunk, **given, **more)  # type: ignore[arg-type]
            for more in ({}, {"reach": 0.5}, {"reach": 0.5, "split": True})
        )
        assert whole is not None and half is not None and both is not None
        assert half.seconds < whole.seconds and half.seconds <= both.seconds
    one, other = prefill(EIGHT, H100, 131072), prefill(EIGHT, H100, 131072, reach=0.5)
    assert one is not None and other is not None
    assert other.terms[1].name == "attention to the prompt itself"
    assert other.terms[1].seconds == pytest.approx(one.terms[1].seconds / 2)


def test_narrow_heads_reach_less() -> None:
    narrow = replace(EIGHT, layers=(LayerShape("full", 64, 16, 64),) * 32)
    one, other = prefill(narrow, H100, 131072), prefill(EIGHT, H100, 131072)
    assert one is not None and other is not None and one.seconds > other.seconds


def hosted(first: tuple[float, float], later: tuple[float, float]) -> Machine:
    """An H100 whose host takes so long to begin and end a chunk, and for each of its layers."""
    return replace(H100, host_chunk=dict.fromkeys(H100.host_chunk, (first, later)))


def test_a_host_that_is_slow_shows() -> None:
    """Launches are hidden behind the device's work where that takes longer, chunk by chunk; the beginning never is."""
    quick, slow = hosted((1e-3, 1e-4), (1e-3, 1e-4)), hosted((1e-3, 6e-3), (1e-3, 6e-3))
    for tokens, hidden in ((512, False), (131072, True)):
        one, other = prefill(EIGHT, quick, tokens), prefill(EIGHT, slow, tokens)
        assert one is not None and other is not None and (one.seconds == other.seconds) is hidden
    late = hosted((3e-2, 2.0), (7e-2, 1.0))
    for packed, split in ((0.0, False), (4e4, False), (4e4, True)):
        one = prefill(EIGHT, late, 65536, chunk=8192, packed=packed, bits=4, split=split)
        assert one is not None
        work = sum(term.seconds for term in one.terms[:-1])
        # Nobody waits for the last layer's work.
        assert one.seconds == pytest.approx(3e-2 + 7 * 7e-2 + 32 * (2.0 + 7 * 1.0) + work / 32)
    begun, at_once = (
        prefill(EIGHT, one, 65536, chunk=8192) for one in (hosted((0.2, 0.0), (0.1, 0.0)), hosted((0, 0), (0, 0)))
    )
    assert begun is not None and at_once is not None
    assert begun.seconds - at_once.seconds == pytest.approx(0.2 + 7 * 0.1)


def test_windows_read_less() -> None:
    slid = replace(EIGHT, layers=(LayerShape("sliding", 32, 8, 128, window=1024),) * 32)
    less, more = prefill(slid, H100, 32768), prefill(EIGHT, H100, 32768)
    assert less is not None and more is not None and less.seconds < more.seconds


def test_first_token() -> None:
    read, one = prefill(EIGHT, H100, 4096), step(EIGHT, H100, 1, exact(4096))
    assert read is not None and one is not None
    later = plan_time.first_token(read, one, waiting=2.0)
    assert later is not None and later.seconds == pytest.approx(read.seconds + one.seconds + 2.0)
    assert plan_time.first_token(None) is None


def test_no_kernel_is_not_predicted() -> None:
    assert step(EIGHT, H100, 1, exact(4096), fused=False) is None
    assert prefill(EIGHT, H100, 4096, fused=False) is None


def test_large_attention_is_what_attention_says() -> None:
    from fivefold.attention.merge import CUDNN_OPERATIONS
    from fivefold.attention.prefill import KEY_NUMBERS

    assert plan_time.LARGE == CUDNN_OPERATIONS and plan_time.BLOCK == KEY_NUMBERS


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("h100", "H100 80GB"), ("NVIDIA H100 80GB HBM3", "H100 80GB"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("H100 NVL", "H100 NVL"), ("a100-80gb", "A100 80GB"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("3090", "RTX 3090"), ("mi300", "MI300X"), ("l40s", "L40S"),
    ],
)  # fmt: skip
def test_find_machine(asked: str, name: str) -> None:
    assert find_machine(asked).name == name


@pytest.mark.parametrize(
    ("asked", "said"),
    [("rtx", "more than one"), ("H1000", "write H100"), ("abacus", "write one of H100 80GB"), ("", "not known")],
)
def test_no_such_machine(asked: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        find_machine(asked)
    assert "--measure" in str(caught.value) and "\n" not in str(caught.value)


def test_shipped_machines() -> None:
    names = [one.name for one in shipped()]
    assert len(names) == len(set(names)) >= 12
    for one in shipped():
        assert one.source and one.date and 0 < one.usable < one.memory
        assert one.attention.keys() == {*KINDS, *(f"{kind} 64" for kind in KINDS)}
        for points in one.attention.values():
            sizes, seconds = zip(*points)
            assert list(sizes) == sorted(sizes) and list(seconds) == sorted(seconds) and seconds[0] > 0
            assert 0.6 * one.bandwidth < sizes[-1] / seconds[-1] < 1.1 * one.bandwidth
        if one.name not in ("H100 80GB", "H200"):
            assert "as measured on an H100" in one.source and not one.measured


def test_machine_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({"machine": H100.as_dict()}))
    assert read_machine(path) == H100
    old = {**H100.as_dict(), "attention": {"exact": 0.9}}
    for damaged in (
        json.dumps({"machine": old}),
        "{",
        "{}",
        json.dumps({"machine": {"name": "x"}}),
        json.dumps({"machine": 3}),
    ):
        path.write_text(damaged)
        with pytest.raises(InputError, match="--measure"):
            read_machine(path)


def test_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no GPU here"):
        here()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert here() == H100
    measured_file().parent.mkdir(parents=True)
    own = replace(H100, name="NVIDIA H100 80GB HBM3", bandwidth=1e12)
    measured_file().write_text(json.dumps({"machine": own.as_dict()}))
    assert here() == own
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Unheard Of 9000")
    with pytest.raises(InputError, match="--measure"):
        here()


def test_fit_finds_what_made_the_rows() -> None:
    true = replace(H100, step=1.5e-3, word=2e-10, layer=8e-5, packed_layer=1e-5, packed_row=1e-7, pointwise=300.0)
    true = replace(true, fused={"1": 2.7e12, "8": 2.5e12}, fused_layer=2e-5, fused_several=3e-5)
    true = replace(true, own_layer=1e-4, own_pointwise=400.0, host_step={"step": 4e-3, "layer": 1e-5})
    half = replace(EIGHT, layers=EIGHT.layers[:8], parameters=2_800_000_000, weight_bytes=5_600_000_000)
    rows = []
    for model in (EIGHT, half):
        for batch, context in ((1, 4096), (1, 131072), (16, 4096), (64, 1024), (8, 32768)):
            for packed in (0, context * batch * 30000):
                layers = len(model.layers)
                reads = (Read("exact", 16, context * batch * 4096, layers),)
                reads += (Read("packed", 4, packed, layers),) if packed else ()
                for own in (False, True):
                    one = step(model, true, batch, reads, own=own)
                    assert one is not None
                    rows.append(Row(model, batch, reads, one.seconds, own))
    few = fit_steps([row for row in rows if not row.own], replace(true, own_layer=7.0))
    assert few.own_layer == 7.0  # nothing was said of it
    found = fit_steps(rows, true)
    for name in FITTED:
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-3)
    assert min(least(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([1.0, 0.5]))) == 0


def test_no_step_is_shorter_than_the_hosts_part() -> None:
    """Rows that the host bounds say nothing of the device."""
    slow = replace(H100, host_step={"step": 6e-3, "layer": 1e-4})
    short, long = (step(EIGHT, slow, 1, (Read("exact", 16, nbytes, 32),)) for nbytes in (1 << 20, 1 << 36))
    free = replace(H100, host_step={})
    assert short is not None and long is not None
    assert short.seconds == pytest.approx(6e-3 + 32e-4) and short.terms[-1].name == "waiting for the host"
    assert long == step(EIGHT, free, 1, (Read("exact", 16, 1 << 36, 32),))
    rows = [Row(EIGHT, 1, (Read("exact", 16, nbytes, 32),), 0.0) for nbytes in (1 << 20, 1 << 30, 1 << 36, 3 << 36)]
    rows = [replace(row, seconds=step(EIGHT, slow, 1, row.reads).seconds) for row in rows]  # type: ignore[union-attr]
    found = fit_steps(rows, replace(slow, step=0.0, fused_layer=0.0, word=0.0))
    for row in rows:
        assert step(EIGHT, found, 1, row.reads).seconds == pytest.approx(row.seconds, rel=1e-4)  # type: ignore[union-attr]


def test_narrow_heads_are_read_at_their_own_rate() -> None:
    narrow = replace(EIGHT, layers=tuple(replace(layer, kv_heads=16, head_dim=64) for layer in EIGHT.layers))
    wide_pages, narrow_pages = [[1e6, 1e-5], [1e9, 1e-3]], [[1e6, 2e-5], [1e9, 2e-3]]
    machine = replace(H100, attention={**H100.attention, "4": wide_pages, "4 64": narrow_pages}, host_step={})
    reads = (Read("packed", 4, 1 << 34, 32),)
    (wide, slow) = (step(model, machine, 64, reads) for model in (EIGHT, narrow))
    assert wide is not None and slow is not None
    each = machine.attends("4", 128, (1 << 34) / 32)
    assert slow.seconds - wide.seconds == pytest.approx(32 * each)  # rows too
    unknown = replace(machine, attention={"4": wide_pages})
    assert step(narrow, unknown, 64, reads) == step(EIGHT, unknown, 64, reads)


def test_attention_takes_what_was_measured_and_more_in_proportion() -> None:
    points = [[1e6, 1e-5], [1e8, 6e-5], [1e9, 4e-4]]
    machine = replace(H100, attention={"exact": points, "4": [[1e6, 2e-5], [1e9, 8e-4]]}, host_step={})
    for nbytes, seconds in ((1e6, 1e-5), (1e8, 6e-5), (5.5e8, 2.3e-4), (1e9, 4e-4), (4e9, 1.6e-3)):
        assert machine.attends("exact", 128, nbytes) == pytest.approx(seconds)
    assert 0 < machine.attends("exact", 128, 0) < 1e-5
    steep = replace(machine, attention={"exact": [[1e6, 1e-6], [2e6, 9e-6]]})
    assert steep.attends("exact", 128, 1e5) == pytest.approx(1e-7)  # the line would be below nothing
    # One kernel for both kinds of pages: what it begins with is counted once, by what there is of each.
    both = (Read("exact", 16, 8 * 10**8, 32), Read("packed", 4, 24 * 10**8, 32))
    one = step(EIGHT, machine, 1, both)
    assert one is not None
    exact, packed = (term.seconds for term in one.terms[1:3])
    assert exact == pytest.approx(32 * machine.attends("exact", 128, 1e8) / 4)
    assert packed == pytest.approx(32 * machine.attends("4", 128, 1e8) * 3 / 4)
    nothing = step(EIGHT, machine, 1, (Read("exact", 16, 0, 32),))
    assert nothing is not None and nothing.terms[1].seconds == 0


def test_what_the_host_takes_for_a_chunk() -> None:
    """Prompts of one chunk and of four, of two numbers of layers, tell a beginning from what each layer takes."""
    from fivefold.plan.reading import CHUNKS, host_chunk

    first, later = [2e-3, 5e-4], [1e-3, 4e-4]
    rows = []
    for layers in (12, 36):
        for chunks in (1, CHUNKS):
            one, more = first[0] + layers * first[1], (chunks - 1) * (later[0] + layers * later[1])
            rows.append({"layers": layers, "chunks": chunks, "seconds": [9.0, one + more]})
    assert host_chunk({"packed": rows}) == {"packed": [pytest.approx(first), pytest.approx(later)]}
    for row in rows:  # a host that takes no longer for more layers
        row["seconds"] = [1e-2 * row["chunks"]]
    assert host_chunk({"packed": rows}) == {"packed": [pytest.approx([1e-2, 0.0]), pytest.approx([1e-2, 0.0])]}
    assert H100.by_own_code.host_chunk == H100.own_host_chunk


def test_fit_of_prompts_finds_what_made_the_rows() -> None:
    true = replace(H100, prompt_pointwise=90.0)
    rows = []
    for tokens, chunk in ((8192, None), (131072, None), (65536, 8192), (4096, 64)):
        for packed, reach, split in ((0.0, 1.0, False), (4e4, 1.0, False), (2e4, 0.5, True)):
            row = Prompt(EIGHT, tokens, chunk, packed, 4 if packed else None, reach, split, 0.0)
            rows.append(replace(row, seconds=row.predicted(true)))
    found = fit_prompts(rows, H100)
    assert found.prompt_pointwise == pytest.approx(90.0, rel=1e-3)
    # What the host bounds says nothing about the device.
    assert fit_prompts([*rows, replace(rows[-1], seconds=9.0)], H100).prompt_pointwise == found.prompt_pointwise


def results_of(card: str) -> dict[str, Any]:
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / f"plan_{card}.json"
    found: dict[str, Any] = json.loads(file.read_text())
    return found


OWN = ", the model's own code"
BOUNDS = {
    "steps alone": (0.05, 0.1), "steps in batches": (0.05, 0.1), f"steps alone{OWN}": (0.1, 0.1),
    f"steps in batches{OWN}": (0.1, 0.1), "prompts at once": (0.15, 0.15), "prompts in chunks of 8,192": (0.15, 0.15),
    "prompts in chunks of 2,048": (0.15, 0.15), f"prompts in chunks of 8,192{OWN}": (0.15, 0.15),
    f"prompts in chunks of 2,048{OWN}": (0.15, 0.15), "to the host": (0.15, 0.15), "from the host": (0.15, 0.15),
}  # fmt: skip
"""By how much predictions may be off: of Llama-3-8B's shape and of a smaller one."""
BEYOND = {
    # Timed otherwise, on other machines: see docs/planner.md.
    "h100": {"prompts at once": (0.44, 0.38), f"prompts in chunks of 2,048{OWN}": (0.17, 0.17)},
    "h200": {"steps in batches": (0.1, 0.1)},
}


@pytest.mark.parametrize("card", ["h100", "h200"])
def test_shipped_constants_hold(card: str) -> None:
    """How far off they are (docs/planner.md), on the shape that they were fitted on and on a smaller one: steps are
    within 10%, prompts and changes of sessions within 15%."""
    root = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location("plan_gpu", root / "benchmarks" / "plan_gpu.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    results, machine = results_of(card), find_machine(card)
    assert machine.measured
    found = script.compared(results["rows"], machine)
    bounds = BOUNDS | BEYOND[card]
    for kind, models in found["errors"].items():
        for model, errors in models.items():
            bound = bounds[kind][model != "llama-3-8b"]
            assert abs(errors["worst"]) <= bound, (kind, model, errors)
            assert errors["median"] <= (0.05 if "steps" in kind else 0.15)
    assert found["errors"].keys() == bounds.keys()
    one = ("host", "code", "in batches")  # on one shape alone
    assert all(len(found["errors"][kind]) == 2 for kind in bounds if not kind.endswith(one))
    # What the file says of itself is of these constants.
    for kind, models in results["compared"]["errors"].items():
        for model, errors in models.items():
            assert errors == pytest.approx(found["errors"][kind][model])


def test_data_sheets_scale_the_constants() -> None:
    slow = find_machine("a100 40gb")
    ratio = H100.bandwidth / slow.bandwidth
    assert ratio == pytest.approx(3350 / 1555)
    assert (slow.word, slow.packed_row) == pytest.approx((H100.word * ratio, H100.packed_row * ratio))
    assert (slow.layer, slow.step, slow.host_chunk) == (H100.layer, H100.step, H100.host_chunk)
    for key, rate in slow.prompt.items():
        assert rate / H100.prompt[key] == pytest.approx(slow.products / H100.products) == pytest.approx(312 / 989.4)


@pytest.mark.slow
def test_measure_on_a_cpu(tmp_path: Path) -> None:
    import torch

    from fivefold.plan import measure

    told: list[str] = []
    found, raw = measure.measure(torch.device("cpu"), told.append)
    assert found.measured and found.bandwidth > 0 and "steps" in told
    path = measure.save(found, raw, tmp_path / "deep" / "machine.json")
    assert read_machine(path) == found


def test_the_errors_in_the_documents_are_those_of_the_files() -> None:
    """docs/planner.md: the worst error of each kind and shape, on two kinds of machines."""
    text = (Path(__file__).parents[1] / "docs/planner.md").read_text()
    said = [line.split("|")[2:6] for line in text.splitlines() if line.startswith("| ")]
    lines = [[cell.strip() for cell in line] for line in said if "%" in "".join(line)]
    assert len(lines) == len(BOUNDS)
    columns = [(card, model) for card in ("h200", "h100") for model in ("llama-3-8b", "llama-3.2-1b")]
    for kind, line in zip(BOUNDS, lines):
        for (card, model), cell in zip(columns, line, strict=True):
            found = results_of(card)["compared"]["errors"][kind]
            assert cell == (f"{found[model]['worst']:+.1%}" if model in found else "not measured"), (kind, card, model)
