"""The kernels for pages of rotated keys and values (`rotatekv`), against their reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import quick
from fivefold.calibrate.profile import Profile
from fivefold.kernels.packed_decode import schedule
from fivefold.kernels.rotated_decode import Rotated, attend_rotated
from fivefold.methods.bits.rotatekv import RotateCodec, RotateKV
from fivefold.store.context import Context, Rope
from fivefold.store.spec import LayerSpec

pytest.importorskip("triton", reason="needs Triton")
from test_packed_decode import DEVICES, Tier, device, kernel, numbers

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["device"]

# Bits, head_dim, kv heads, heads rotated together at most, sinks, whether RoPE turns neighbours.
CASES = [
    (2, 64, 2, 4, 4, False),
    (4, 64, 3, 4, 0, False),
    (3, 128, 4, 2, 4, True),
    (2, 64, 4, 4, 20, True),
    (4, 128, 1, 4, 2, False),
]


def codec_of(bits: int, head_dim: int, kv_heads: int, head_group: int, sinks: int, near: bool, device) -> RotateCodec:
    rope = Rope(1e4 ** -(torch.arange(0, head_dim, 2) / head_dim), head_dim, near)
    spec = LayerSpec(0, 1, kv_heads, kv_heads, head_dim, torch.float32, torch.device(device), rope=rope)
    mean = torch.randn(1, kv_heads * head_dim)
    profile = Profile("rotatekv", "", {"layers": [0]}, {"key_mean": mean})
    return RotateCodec(RotateKV(bits=bits, head_group=head_group, sinks=sinks), spec, profile)


@pytest.mark.parametrize("device", DEVICES[:2], indirect=True)
@pytest.mark.parametrize("case", quick(CASES, 2), ids=str)
def test_parts_are_those_of_the_reference(device, case, monkeypatch) -> None:
    """Two sequences far into a text, one with a window that begins inside a page; exact tokens among the others."""
    torch.manual_seed(2)
    np.random.seed(2)
    codec, (_, dim, kv_heads, _, sinks, _) = codec_of(*case, device), case
    form, rows, columns, heads, far = codec.reader, 2 * case[2], 2, 3, 100_000
    assert isinstance(form, Rotated) and form.lacks(heads) is None and form.tokens == codec.layout.tokens
    assert list(form.fields) == [part.name for part in codec.layout.fields]
    page = form.tokens
    keys, values = (numbers((rows, columns * page, dim), device) for _ in range(2))
    learned, where = {}, [0, 7, page + 3, page + 40][: sinks // 2]
    if sinks:
        learned = {name: torch.randn(rows, sinks, dim, device=device) * 8 for name in ("sink_keys", "sink_values")}
        keys[:, where] = learned["sink_keys"][:, : len(where)]
        learned["sink_keys"][:, len(where) :] = float("nan")
    positions = torch.arange(far, far + columns * page, device=device)[None]
    bound = codec.of(Context(tuple(range(kv_heads)) * 2, kv_heads, positions, learned))

    def encode(pages: int) -> dict[str, torch.Tensor]:
        shape = (rows * columns, page, dim)
        return bound.encode(keys.reshape(shape), values.reshape(shape), 0, None)

    tier = Tier(rows, columns, codec.layout, device, encode)
    fields = tuple(tier.rows(name) for name in form.fields)
    exact = tuple(learned.values())
    spans = torch.zeros(rows, schedule.SPAN, dtype=torch.int32, device=device)
    spans[:, 7] = far
    spans[:kv_heads, 1], spans[kv_heads:, 1] = 2 * page, page + 64
    spans[kv_heads:, 0] = page - 40
    queries = torch.randn(rows, heads, dim, device=device) * 1e5  # more than float16 holds
    scaling = 1e-5 * dim**-0.5
    wanted, wanted_lse = attend_rotated(form, queries, scaling, spans, fields, exact)
    # The reference is what the codec says.
    whole = torch.zeros_like(spans)
    whole[:, 1], whole[:, 7] = columns * page, far
    pages = {name: tier.rows(name) for name in form.fields}
    scores = bound.scores(queries * scaling, pages)
    theirs = bound.output(scores.softmax(-1), pages)
    mine = attend_rotated(form, queries, scaling, whole, fields, exact)[0]
    assert (mine - theirs).norm() < 1e-3 * theirs.norm()

    table = torch.stack([torch.from_numpy(tier.pool.addresses(name, tier.table)) for name in form.fields], 2)
    packed = schedule.Packed((table // form.unit).to(device), form, exact)
    for processors in (1, 6):  # a share for each program, and tiles of a share for several
        monkeypatch.setattr("fivefold.kernels.rotated_decode.triton.processors", lambda _, n=processors: n)
        found, lse = kernel.decode(queries, scaling, spans, packed, with_lse=True, programs=(5, 1))
        for row in range(rows):
            assert (found[row].double() - wanted[row]).norm() < 8e-3 * wanted[row].norm()  # float16, four times
            assert torch.allclose(lse[row].double(), wanted_lse[row], 3e-4, 3e-2)
