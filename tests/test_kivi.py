"""KIVI and the planar page: packing, quantisation, attention on codes, the numbers of the official code."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fivefold.errors import NonFiniteError, RecipeError
from fivefold.kernels.planar import PLANES, dequantise, pack, quantise, unpack
from fivefold.methods.bits.kivi import Kivi, KiviCodec
from fivefold.methods.method import Codec
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import Extent
from fivefold.store.spec import LayerSpec, Pools

pytestmark = pytest.mark.usefixtures("one_thread")
Bits = int | tuple[int, int]
GROUPS: list[tuple[Bits, int]] = [
    (2, 32), (2, 64), (2, 128), (3, 32), (4, 32), (4, 64), (4, 128), (8, 32), (8, 64),
    # Pages of more than one sheet of words: bits of keys and of values, or groups that one sheet is no multiple of.
    ((4, 2), 32), ((2, 4), 128), ((8, 4), 64), ((3, 2), 32), ((4, 3), 64), (3, 64), (8, 128),
]  # fmt: skip
FLOAT16_MAX = 65504.0


def spec(head_dim: int = 64) -> LayerSpec:
    return LayerSpec(0, 1, 2, 4, head_dim, torch.float32, torch.device("cpu"))


def pair(bits: Bits) -> tuple[int, int]:
    return (bits, bits) if isinstance(bits, int) else bits


def codec(bits: Bits, group: int, head_dim: int = 64) -> KiviCodec:
    both = {"bits": bits} if isinstance(bits, int) else {"key_bits": bits[0], "value_bits": bits[1]}
    return Kivi(group=group, **both).codec(spec(head_dim))


def pages(kivi: KiviCodec, count: int, head_dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole pages: channels of different scale and offset."""
    scale, offset = torch.rand(2, head_dim) * 10
    shape = (count, kivi.layout.tokens, head_dim)
    return torch.randn(shape) * scale + offset, torch.randn(shape) * offset - scale


# -- packing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", PLANES)
def test_codes_survive_packing(bits: int) -> None:
    torch.manual_seed(bits)
    planes = PLANES[bits]
    for plane in range(planes):
        codes = torch.randint(0, 2**bits, (3, (planes - plane) * 32, 5)).to(torch.int16)
        words = torch.randint(-(2**15), 2**15, (3, 32, 5)).to(torch.int16)
        before = words.clone()
        packed = pack(codes, bits, plane, words)
        assert packed.dtype == torch.int16 and torch.equal(words, before)
        for j in range(planes):
            wanted = codes[:, (j - plane) * 32 : (j - plane + 1) * 32] if j >= plane else unpack(words, bits, j)
            assert torch.equal(unpack(packed, bits, j), wanted)
            assert torch.equal(unpack(packed, bits, j, torch.empty_like(packed)), wanted)


@pytest.mark.parametrize("bits", PLANES)
def test_where_a_code_lies(bits: int) -> None:
    """Field j of word (r, d) is the code of token 32 * j + r, channel d; nothing else is set."""
    tokens = PLANES[bits] * 32
    for token in range(0, tokens, 7):
        codes = torch.zeros(1, tokens, 3, dtype=torch.int16)
        codes[0, token, 1] = 2**bits - 1
        words = pack(codes, bits).numpy().view(np.uint16)
        wanted = np.zeros((1, 32, 3), np.uint16)
        wanted[0, token % 32, 1] = (2**bits - 1) << (bits * (token // 32))
        assert (words == wanted).all()


@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_a_page_filled_group_by_group_is_the_page_filled_at_once(bits: Bits, group: int) -> None:
    torch.manual_seed(0)
    kivi = codec(bits, group)
    keys, values = pages(kivi, 2)
    at_once = kivi.encode(keys, values, 0, None)
    assert {name: tuple(x.shape[1:]) for name, x in at_once.items()} == {f.name: f.shape for f in kivi.layout.fields}
    assert all(at_once[f.name].dtype == f.dtype for f in kivi.layout.fields)
    opened: dict[str, torch.Tensor] | None = None
    for slot in range(0, kivi.layout.tokens, group):
        part = slice(slot, slot + group)
        before = opened and {name: x.clone() for name, x in opened.items()}
        fields = kivi.encode(keys[:, part], values[:, part], slot, opened)
        assert opened is None or all(torch.equal(opened[name], before[name]) for name in opened)
        assert all(x.isfinite().all() for x in kivi.decode(fields))
        opened = fields
    assert all(torch.equal(opened[name], at_once[name]) for name in at_once)


@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_stale_groups_of_an_open_page_are_overwritten(bits: Bits, group: int) -> None:
    torch.manual_seed(0)
    kivi = codec(bits, group)
    keys, values = pages(kivi, 2)
    full = kivi.encode(keys, values, 0, None)
    other = kivi.encode(values, keys, 0, None)
    for slot in range(group, kivi.layout.tokens, group):
        fields = kivi.encode(keys[:, slot:], values[:, slot:], slot, other)
        for found, before, after in zip(kivi.decode(fields), kivi.decode(other), kivi.decode(full)):
            assert torch.equal(found[:, :slot], before[:, :slot])
            assert torch.equal(found[:, slot:], after[:, slot:])


# -- quantisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", PLANES)
def test_a_number_lies_within_half_a_step_of_its_code(bits: int) -> None:
    """As far as float16 holds the ends of the group: scale and zero point are rounded to it."""
    torch.manual_seed(bits)
    steps = 2**bits - 1
    sizes = 10.0 ** torch.randint(-9, 4, (4000, 1))
    offsets = torch.randn(4000, 1) * 10.0 ** torch.randint(-6, 4, (4000, 1))
    x = (torch.randn(4000, 32) * sizes + offsets).clamp(-FLOAT16_MAX, FLOAT16_MAX)
    codes, scale, zero = quantise(x, bits)
    assert codes.dtype == torch.int16 and scale.dtype == zero.dtype == torch.float16
    assert codes.min() >= 0 and codes.max() <= steps and (scale >= 0).all() and scale.isfinite().all()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    short = torch.maximum((zero.float() - low).abs(), (high - zero.float() - steps * scale.float()).abs())
    bound = torch.maximum(scale.float() / 2, short) * (1 + 1e-5) + 1e-6 * x.abs().amax(1, keepdim=True)
    assert ((dequantise(codes, scale, zero) - x).abs() <= bound).all()
    # What the ends fall short by is no more than the rounding of the two float16 numbers.
    ulp = torch.maximum(scale.float() * 2**-11, torch.tensor(2.0**-25))
    half = torch.maximum(zero.float().abs() * 2**-11, torch.tensor(2.0**-25))
    assert (short <= torch.maximum(half, steps * ulp) * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", PLANES)
def test_constant_groups_are_exact(bits: int) -> None:
    numbers = torch.tensor([0.0, 1.0, -1.0, 0.1, 3.14, 1e-7, 6e-8, -2049.0, FLOAT16_MAX, -FLOAT16_MAX]).half().float()
    codes, scale, zero = quantise(numbers[:, None].expand(-1, 32), bits)
    assert (scale == 0).all() and (codes == 0).all()
    assert torch.equal(dequantise(codes, scale, zero), numbers[:, None].expand(-1, 32))
    # Others are as near as float16 is, or nearer.
    numbers = torch.randn(1000) * 100
    codes, scale, zero = quantise(numbers[:, None].expand(-1, 32), bits)
    assert (scale >= 0).all()
    error = (dequantise(codes, scale, zero) - numbers[:, None]).abs().amax(1)
    assert (error <= (numbers.half().float() - numbers).abs() * 1.001 + 1e-9).all()


def test_the_ends_of_float16_fit() -> None:
    x = torch.tensor([[-FLOAT16_MAX, FLOAT16_MAX] * 16])
    for bits in PLANES:
        codes, scale, zero = quantise(x, bits)
        assert scale.isfinite().all() and zero.isfinite().all()
        assert torch.allclose(dequantise(codes, scale, zero), x, rtol=1e-3)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 65520.0, -1e30])
@pytest.mark.parametrize("which", [0, 1])
def test_what_float16_cannot_hold_is_refused(number: float, which: int) -> None:
    kivi = codec(2, 32)
    tokens = [torch.randn(3, 64, 64), torch.randn(3, 64, 64)]
    tokens[which][2, 33, 7] = number
    with pytest.raises(NonFiniteError, match=f"^{('keys', 'values')[which]} to be packed reach"):
        kivi.encode(*tokens, 0, None)
    tokens[which][2, 33, 7] = FLOAT16_MAX
    kivi.encode(*tokens, 0, None)


# -- attention on codes -----------------------------------------------------------------------------------


# Kernels are compiled for these numbers: of all three each pair meets another once.
@pytest.mark.parametrize(
    ("bits", "group", "head_dim"), [(*pair, (32, 64, 128)[place % 3]) for place, pair in enumerate(GROUPS)]
)
def test_attention_on_codes_equals_attention_on_decoded_pages(bits: Bits, group: int, head_dim: int) -> None:
    torch.manual_seed(0)
    kivi = codec(bits, group, head_dim)
    for rows, count, queries in ((1, 1, 1), (3, 2, 1), (2, 3, 7)):
        fields = kivi.encode(*pages(kivi, rows * count, head_dim), 0, None)
        fields = {name: x.unflatten(0, (rows, count)) for name, x in fields.items()}
        # Pages of a pool do not lie close together.
        spread = {name: torch.stack([x, torch.zeros_like(x)], 2)[:, :, 0] for name, x in fields.items()}
        q = torch.randn(rows, queries, head_dim)
        weights = torch.rand(rows, queries, count * kivi.layout.tokens).softmax(-1)
        for some in (fields, spread):
            for found, wanted in (
                (kivi.scores(q, some), Codec.scores(kivi, q, some)),
                (kivi.output(weights, some), Codec.output(kivi, weights, some)),
            ):
                assert found.dtype == torch.float32 and found.shape == wanted.shape
                assert (found - wanted).abs().max() <= 1e-4 * max(1, wanted.abs().max().item())
        assert (kivi.scores(q.half(), fields) - kivi.scores(q.half().float(), fields)).abs().max() == 0


@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_decode_is_quantise_and_dequantise(bits: Bits, group: int) -> None:
    torch.manual_seed(0)
    kivi = codec(bits, group)
    keys, values = pages(kivi, 2)
    found = kivi.decode(kivi.encode(keys, values, 0, None))
    grouped = keys.unflatten(1, (-1, group)).transpose(2, 3)
    wanted_keys = dequantise(*quantise(grouped, pair(bits)[0])).transpose(2, 3).flatten(1, 2)
    wanted_values = dequantise(*quantise(values.unflatten(2, (-1, kivi.channels)), pair(bits)[1])).flatten(2)
    assert torch.equal(found[0], wanted_keys) and torch.equal(found[1], wanted_values)
    # Single tokens, of any page and slot, in any order.
    fields = kivi.encode(keys, values, 0, None)
    at = torch.randperm(2 * kivi.layout.tokens)[:77]
    which, slot = at // kivi.layout.tokens, at % kivi.layout.tokens
    for part, whole in zip(kivi.take(fields, which, slot), found):
        assert torch.equal(part, whole[which, slot])


# -- the official code ------------------------------------------------------------------------------------

# Ours differs from the official code in what is rounded, and so only by rounding:
#
#   official fp32   scale and zero point in float32; codes against those.
#   official fp16   every step in float16: `max - min`, its quotient, `x - min`, its quotient, and back.
#   ours            scale and zero point computed in float32 and *stored* in float16; codes against the stored
#                   ones, in float32.
#
# A stored scale is off by at most 2**-11 of itself (fp16: the official one is too, and once more for `max -
# min`). Over up to 2**bits - 1 steps that moves a number near the middle between two codes to the other one,
# the more often the more codes there are; the shares below are those that the golden tensors have, rounded up
# in the third digit.
OTHER_CODES = {
    ("fp32", 2): 2.5e-4, ("fp32", 4): 1.1e-3, ("fp32", 8): 2.03e-2,
    ("fp16", 2): 8.6e-4, ("fp16", 4): 3.67e-3, ("fp16", 8): 5.50e-2,
}  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["k", "v"])
def test_equals_the_official_code_up_to_rounding(kind: str, dtype: str, bits: int) -> None:
    golden = load_file(Path(__file__).parent / "golden" / "kivi.safetensors")
    x = golden[f"{dtype}.{kind}"].float()
    official = {name: golden[f"{dtype}.{kind}.b{bits}.{name}"] for name in ("codes", "scale", "min", "dequant")}
    axis = 2 if kind == "k" else 3
    groups = x.unflatten(axis, (2, 32)).movedim(axis + 1, -1)
    codes, scale, zero = quantise(groups, bits)
    restored = dequantise(codes, scale, zero).movedim(-1, axis + 1).flatten(axis, axis + 1)
    codes = codes.movedim(-1, axis + 1).flatten(axis, axis + 1)
    scale, zero = scale.squeeze(-1), zero.squeeze(-1)

    assert torch.equal(zero, official["min"].half())
    if dtype == "fp32":
        assert torch.equal(scale, official["scale"].half())
    else:
        assert (scale.float() / official["scale"].float() - 1).abs().max() <= 2 * 2**-11

    other = codes != official["codes"]
    assert (codes - official["codes"].short()).abs().max() <= 1
    assert other.float().mean() <= OTHER_CODES[dtype, bits]

    # In steps: where the codes are the same, the numbers differ by the rounding of the scale alone (in fp16
    # also by that of the sum); where they are not, the number lay in the middle. Either way ours is within
    # half a step.
    step = official["scale"].float().repeat_interleave(32, axis)
    apart = (restored - official["dequant"].float()).abs() / step
    drift = (2**bits - 1) * 2**-11
    assert apart[~other].max() <= (drift if dtype == "fp32" else 2 * drift + 0.1)
    assert apart.max() <= 1 + (0 if dtype == "fp32" else 2 * drift)
    assert ((restored - x).abs() / step).max() <= 0.5 + 0.001
    mine, theirs = ((y - x).square().mean().sqrt() for y in (restored, official["dequant"].float()))
    assert mine <= theirs * 1.01


@pytest.mark.parametrize("bits", [(4, 2), (2, 4), (8, 2), (2, 8), (4, 8)])
def test_separate_bits_equal_the_official_code_of_each(bits: tuple[int, int]) -> None:
    """The whole codec on the golden tensors: keys of one number of bits, values of another."""
    golden = load_file(Path(__file__).parent / "golden" / "kivi.safetensors")
    kivi = codec(bits, 32)
    k, v = (golden[f"fp32.{kind}"].flatten(0, 1) for kind in "kv")
    found = kivi.decode(kivi.encode(k, v, 0, None))
    for x, y, kind, b in zip(found, (k, v), "kv", bits):
        official = golden[f"fp32.{kind}.b{b}.dequant"].flatten(0, 1).float()
        step = golden[f"fp32.{kind}.b{b}.scale"].flatten(0, 1).repeat_interleave(32, 1 if kind == "k" else 2)
        apart = (x[:, :64] - official).abs() / step
        drift = (2**b - 1) * 2**-11
        assert (apart > drift).float().mean() <= OTHER_CODES["fp32", b] and apart.max() <= 1
        assert ((x[:, :64] - y).abs() / step).max() <= 0.5 + 0.001


# -- bytes and settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize(("bits", "group"), GROUPS)
def test_bytes_are_those_of_the_formula(bits: Bits, group: int, head_dim: int) -> None:
    kivi = codec(bits, group, head_dim)
    tokens = kivi.layout.tokens
    planes = tokens // 32
    code_bytes = sum(2 * head_dim * math.ceil(planes / PLANES[b]) / planes for b in pair(bits))
    scale_bytes = 4 * head_dim / group + 4 * head_dim / min(group, head_dim)
    assert kivi.layout.bytes_by_kind() == pytest.approx({"codes": tokens * code_bytes, "scales": tokens * scale_bytes})
    # Where sheets are full, codes take their bits and no more (3 bits leave one in 16 unused).
    if 3 not in pair(bits):
        assert code_bytes == head_dim * sum(pair(bits)) / 8
    else:
        assert code_bytes <= 1.05 * head_dim * sum(3.2 if b == 3 else b for b in pair(bits)) / 8

    layer = LayerCache(spec(head_dim), Pools(), [Extent()] * 2, kivi, residual=32)
    layer.start(1)
    (group,) = layer.groups
    layer.append(group, *torch.randn(2, 2, 2 * tokens + 32, head_dim))
    assert layer.packed_pools[0].allocated_bytes == pytest.approx(2 * 2 * tokens * (code_bytes + scale_bytes))
    assert layer.exact_pool.allocated_bytes == 2 * 32 * 2 * 4 * head_dim


def test_settings_that_do_not_fit_are_refused_with_the_remedy() -> None:
    for group, head_dim, channels in ((32, 80, 16), (64, 96, 32), (128, 192, 64), (64, 40, 40), (32, 64, 32)):
        assert Kivi(group=group).codec(spec(head_dim)).channels == channels
    with pytest.raises(RecipeError, match="multiple of 8"):
        Kivi().codec(spec(100))
    for settings in ({"bits": 5}, {"key_bits": 5}, {"value_bits": 1}, {"group": 16}, {"residual": -1}):
        with pytest.raises(RecipeError):
            Kivi(**settings)
    assert Kivi(residual=40).exact_tokens == 40
    assert str(Kivi(key_bits=4, value_bits=2)) == "kivi(key_bits=4, value_bits=2)"


@pytest.mark.parametrize(("bits", "group", "tokens"), [
    (2, 32, 256), (3, 32, 160), (4, 32, 128), (8, 32, 64), (3, 64, 320), (3, 128, 640), (8, 128, 128),
    ((4, 2), 32, 256), ((2, 8), 64, 256), ((8, 4), 32, 128), ((3, 2), 32, 480), ((3, 2), 64, 640), ((8, 3), 32, 320),
])  # fmt: skip
def test_tokens_of_a_page(bits: Bits, group: int, tokens: int) -> None:
    kivi = codec(bits, group)
    assert kivi.layout.tokens == tokens
    # The kernels read pages of one sheet, and leave the others to the reference.
    assert (kivi.form is not None) == (kivi.layout.fields[0].shape[0] == kivi.layout.fields[3].shape[0] == 32)
    assert kivi.form is None or kivi.form.nbytes == kivi.layout.nbytes
