"""The kernels over pages of shared directions against their references: in Triton's interpreter on a CPU, on the real
thing with `-m gpu`."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch

import fivefold
from conftest import VOCAB, quick
from fivefold.kernels.directions import Directions, decode_reference
from fivefold.kernels.packed_decode import Form
from fivefold.kernels.packed_decode.schedule import SPAN, Exact, Packed
from fivefold.methods.bits.kivi import Kivi
from fivefold.store.spec import LayerSpec
from test_low_rank import DEVICES, records

kernel = importlib.import_module("fivefold.kernels.packed_decode.triton")
pytestmark = pytest.mark.usefixtures("one_thread")


def pages(form: Directions, rows: int, columns: int, device: str) -> tuple[torch.Tensor, ...]:
    """The fields of pages of random directions; places of a page are all of them, or one, or none."""
    count, (tokens, dim) = rows * columns, (form.tokens, form.head_dim)
    unit = torch.nn.functional.normalize(torch.randn(2, count, tokens, dim, device=device), dim=-1) * form.scale
    if form.inner is None:
        out = [x.to(form.dtype) for x in unit]
    else:
        spec = LayerSpec(0, 1, 1, 1, dim, torch.float32, torch.device(device))
        codec = Kivi(bits=form.inner.bits, group=form.inner.group).codec(spec)
        out = list(codec.encode(unit[0], unit[1], 0, None).values())
    norms = torch.float32 if form.dtype is torch.float32 else torch.float16
    for _ in range(2):
        slots = torch.stack([torch.randperm(tokens, device=device)[: form.places] for _ in range(count)])
        slots[torch.rand(slots.shape, device=device) < 0.4] = -1
        kept = torch.randn(count, form.places, dim, device=device) * 2
        sizes = torch.rand(count, tokens, device=device) * 2 * dim**0.5
        out += [slots.to(torch.int16), sizes.to(norms), kept.to(form.dtype)]
    return tuple(x.unflatten(0, (rows, columns)) for x in out)


FORMS = [
    (None, 64, torch.float16), (None, 128, torch.bfloat16), (None, 64, torch.float32), ((2, 32), 64, torch.float16),
    ((4, 128), 128, torch.bfloat16), ((8, 64), 64, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("inner", "dim", "dtype", "columns"), [*((*form, 2) for form in FORMS), (None, 64, torch.bfloat16, 19)], ids=str
)
def test_pages_of_directions_and_exact_pages(device, inner, dim, dtype, columns):
    torch.manual_seed(dim)
    packed = None if inner is None else Form(*inner, min(inner[1], dim), dim)
    tokens = 128 if packed is None else packed.tokens
    form = Directions(packed, dim, dtype, -(-tokens // 64), 1.0 if packed is None else 8.0)
    # Part of a page; a window that begins inside of one; nothing packed; nothing at all.
    spans = [
        (0, columns * tokens - 32, 0, 0, 33), (tokens + 5, columns * tokens, 3, 40, 64), (0, 0, 0, 0, 1),
        (0, 0, 0, 0, 0),
    ]  # fmt: skip
    rows, heads = len(spans), 3
    span = torch.zeros(rows, SPAN, dtype=torch.int32, device=device)
    span[:, :5] = torch.tensor(spans, device=device)
    fields, memory, addresses = pages(form, rows, columns, device), [], []
    for field in fields:
        pages_of = [(field[:, :, None].flatten(0, 1)).contiguous()]
        at = torch.arange(rows * columns, device=device) * (pages_of[0][0].nbytes)
        memory += pages_of
        addresses.append((pages_of[0].data_ptr() + at).view(rows, columns) // form.unit)
    keys, values = torch.randn(2, rows, 2, 32, dim, device=device).to(dtype)
    _there, one = records((keys, values))
    slots = Exact(torch.stack([one, one + (32 * dim * dtype.itemsize >> 4)], 2), dtype)
    queries = torch.randn(rows, heads, dim, device=device).to(dtype)
    table = Packed(torch.stack(addresses, 2), form)
    programs = 6 if columns == 2 else 2, 6  # few, so that one has many pages
    found, lse = kernel.decode(queries, dim**-0.5, span, table, slots, with_lse=True, programs=programs)
    wanted, wanted_lse = decode_reference(
        queries, dim**-0.5, span, form, fields, keys.flatten(1, 2), values.flatten(1, 2)
    )
    some = wanted_lse.isfinite().all(1)
    assert (found[~some] == 0).all() and (lse[~some] == -torch.inf).all()
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 3e-3 if inner else 2e-5}[dtype]
    assert (found.double() - wanted)[some].norm() < bound * wanted[some].norm()
    assert (lse.double() - wanted_lse)[some].abs().max() < 20 * bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", quick(["minicache(start=0)", "minicache(start=0) + kivi(bits=4, residual=32)"], 0))
def test_steps_of_a_model_are_those_without_kernels(device, recipe, tiny, monkeypatch):
    model = copy.deepcopy(tiny("llama", num_hidden_layers=2)).to(device)
    ids = torch.randint(1, VOCAB, (1, 200), generator=torch.Generator().manual_seed(0)).to(device)
    outs, count = [], 36 if device == "cuda" else 2
    for path in ("reference", "triton"):
        monkeypatch.setenv("FIVEFOLD_KERNELS", path)
        cache = fivefold.compress(model, recipe, cuda_graph=path == "triton")
        with torch.inference_mode():
            model(ids[:, : 194 - count], past_key_values=cache)
            outs.append(torch.cat([model(x, past_key_values=cache).logits for x in ids[:, -count:].split(1, 1)], 1))
        assert cache.report().codes > 0
    assert (cache.step.replays, cache.step.failed) == (count, None)
    assert (outs[0] - outs[1]).norm() < 0.04 * outs[0].norm()
