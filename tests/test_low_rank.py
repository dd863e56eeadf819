"""The kernels over pages of low-rank features against their references: in Triton's interpreter on a CPU, on the real
thing with `-m gpu`."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

import fivefold
from conftest import VOCAB, quick
from fivefold.kernels.low_rank import Features, decode_reference
from fivefold.kernels.packed_decode.schedule import SPAN, Exact, Packed
from fivefold.kernels.planar import PLANES, pack, quantise
from learned import learn

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="needs Triton")
kernel = importlib.import_module("fivefold.kernels.packed_decode.triton")
own = importlib.import_module("fivefold.kernels.low_rank.triton")

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="the kernels are compiled for the GPU here")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]),
]


def form_of(
    device: str, heads: int = 2, ranks: tuple[int, int] = (13, 13), head_dim: int = 64, bits: int | None = None,
    dtype: torch.dtype = torch.float16, blocks: int = 1, pairs: int | None = None, neighbours: bool = False,
    queries: int = 3,
) -> Features:  # fmt: skip
    pairs = head_dim // 2 if pairs is None else pairs
    up = [torch.randn(blocks, heads * rank, heads * head_dim, device=device) * (heads * rank) ** -0.5 for rank in ranks]
    inv_freq = 10000.0 ** -(torch.arange(pairs).double() / max(1, pairs))
    return Features(
        ranks=ranks, bits=bits, head_dim=head_dim, dtype=dtype, team=heads, blocks=blocks, queries=queries,
        inv_freq=inv_freq, neighbours=neighbours, ups=lambda: (up[0], up[1]),
    )  # fmt: skip


def records(fields: tuple[torch.Tensor, ...], spare: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages as records somewhere in memory, poison between them, and a table of their addresses in units of 16 bytes;
    fields: `[rows, columns, *shape]`."""
    rows, columns = fields[0].shape[:2]
    flat = torch.cat([x.flatten(0, 1).flatten(1).contiguous().view(torch.uint8) for x in fields], 1)
    memory = torch.full((len(flat) + spare, flat.shape[1]), 255, dtype=torch.uint8, device=flat.device)
    at = torch.randperm(len(memory), device=flat.device)[: len(flat)]
    memory[at] = flat
    assert flat.shape[1] % 16 == 0 and memory.data_ptr() % 16 == 0
    return memory, ((memory.data_ptr() + at * flat.shape[1]) >> 4).view(rows, columns)


def pages(form: Features, rows: int, columns: int, device: str) -> tuple[torch.Tensor, ...]:
    """The fields of pages of random features, of which the first are larger."""
    out: list[torch.Tensor] = []
    for rank in form.ranks:
        size = torch.linspace(3, 0.3, rank, device=device)
        x = torch.randn(rows, columns, form.tokens, rank, device=device) * size
        if form.bits is None:
            out.append(x.to(form.dtype))
        else:
            grouped = x.flatten(0, 1).unflatten(1, (-1, 32)).transpose(2, 3)
            codes, scale, zero = quantise(grouped, form.bits)
            words = pack(codes.transpose(2, 3).flatten(1, 2), form.bits, 0, None)
            made = (words, scale.squeeze(-1), zero.squeeze(-1))
            out += [y.unflatten(0, (rows, columns)) for y in made]
            assert out[-1].shape[2] == PLANES[form.bits]
    return tuple(out)


def check(
    form: Features,
    spans: list[tuple[int, ...]],
    device: str,
    columns: int = 2,
    exact: int = 2,
    dtype: torch.dtype = torch.float16,
    bound: float = 3e-3,
    programs: tuple[int, int] | None = (9, 9),
) -> None:
    """spans: of each team of rows."""
    rows, heads = len(spans) * form.team, form.queries
    fields = pages(form, rows, columns, device)
    _memory, table = records(fields)
    span = torch.zeros(rows, SPAN, dtype=torch.int32, device=device)
    span[:] = torch.tensor(spans, dtype=torch.int32, device=device).repeat_interleave(form.team, 0)
    queries = (torch.randn(rows, heads, form.head_dim, device=device) * 2).to(dtype)
    slots = keys = values = None
    if exact:
        keys, values = torch.randn(2, rows, exact, 32, form.head_dim, device=device).to(dtype)
        _there, one = records((keys, values))
        step = 32 * form.head_dim * dtype.itemsize >> 4
        slots = Exact(torch.stack([one, one + step], 2), dtype)
        keys, values = keys.flatten(1, 2), values.flatten(1, 2)
    scaling = form.head_dim**-0.5
    found, lse = kernel.decode(queries, scaling, span, Packed(table, form), slots, with_lse=True, programs=programs)
    wanted, wanted_lse = decode_reference(queries, scaling, span, form, fields, keys, values)
    assert found.dtype == queries.dtype and found.shape == queries.shape
    some = wanted_lse.isfinite().all(1)
    assert (found[~some] == 0).all() and (lse[~some] == -torch.inf).all()
    error = (found.double() - wanted)[some].norm() / wanted[some].norm()
    assert error < bound, float(error)
    assert (lse.double() - wanted_lse)[some].abs().max() < 20 * bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "heads", "dtype"),
    [
        ({}, 3, torch.float16),
        ({"heads": 3, "bits": 4, "ranks": (10, 6)}, 1, torch.float32),
        ({"heads": 1, "bits": 8, "blocks": 2, "head_dim": 128, "ranks": (19, 19)}, 8, torch.bfloat16),
        ({"dtype": torch.bfloat16, "pairs": 16, "head_dim": 128, "ranks": (20, 30)}, 4, torch.bfloat16),
        ({"dtype": torch.float32, "neighbours": True}, 2, torch.float32),
    ],
    ids=["half", "bits4", "bits8-blocks", "partial-rope", "single-neighbours"],
)
def test_pages_of_features_and_exact_pages(device, shape, heads, dtype):
    torch.manual_seed(heads)
    form = form_of(device, queries=heads, **shape)
    page = form.tokens
    # Part of a page, far on in a text; a window that begins inside of one; nothing packed; nothing at all.
    spans = [
        (0, 2 * page - 32, 0, 0, 33, 0, 0, 70000), (page + 5, 2 * page, 3, 40, 64, 0, 0, 17),
        (0, 0, 0, 0, 1, 0, 0, 0), (0, 0, 0, 0, 0, 0, 0, 0),
    ]  # fmt: skip
    form_bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 3e-3 if shape.get("bits") else 2e-5}
    check(form, spans, device, dtype=dtype, bound=form_bound[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "bits"), [(32, None), (256, None), (128, 8)], ids=["part", "two", "two-bits8"])
def test_tiles_of_part_of_a_page_or_two(device, tokens, bits, monkeypatch):
    torch.manual_seed(tokens)
    small = {"T": tokens, "PB": 16, "STAGES": 1, "num_warps": 4}
    monkeypatch.setattr(own, "settings_of", lambda form, room: small)
    form = form_of(device, heads=3, ranks=(13, 21), bits=bits)
    spans = [(3, form.tokens * 3 - 25, 0, 0, 0, 0, 0, 1000), (form.tokens + 7, form.tokens * 3, 0, 0, 0, 0, 0, 3)]
    check(form, spans, device, exact=0, columns=3)


STEPPED = [
    ("cskv(keep=0.3)", " + streaming(sink=8, recent=70)"), ("kv_heads(keep=0.3, group=1, bits=8)", ""),
    ("cskv(keep=0.3, bits=4)", ""),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", quick(STEPPED, 1), ids=str)
def test_steps_of_a_model_are_those_without_kernels(device, recipe, tiny, tmp_path, monkeypatch):
    """From fixed tables, of sequences of different lengths, while groups are packed and windows slide."""
    recipe, rest = recipe
    model = copy.deepcopy(tiny("llama", num_hidden_layers=1))
    whole = f'{recipe[:-1]}, profile="{learn(model, recipe, tmp_path / "profile", chunks=1)}"){rest}'
    model.to(device)
    ids = torch.randint(1, VOCAB, (2, 180), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    outs, count = [], 36 if device == "cuda" else 2
    for path in ("reference", "triton"):
        monkeypatch.setenv("FIVEFOLD_KERNELS", path)
        cache = fivefold.compress(model, whole, cuda_graph=path == "triton")
        with torch.inference_mode():
            model(ids[:, : 180 - count], past_key_values=cache, attention_mask=mask[:, : 180 - count])
            steps = [
                model(ids[:, i : i + 1], past_key_values=cache, attention_mask=mask[:, : i + 1]).logits
                for i in range(180 - count, 180)
            ]
        outs.append(torch.cat(steps, 1))
        assert cache.report().codes > 0
    assert (cache.step.replays, cache.step.failed) == (count, None)
    assert (outs[0] - outs[1]).norm() < 0.01 * outs[0].norm()
