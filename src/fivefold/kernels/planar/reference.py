"""The planar page in plain PyTorch: the reference that every fast kernel is held against.

One 16-bit word holds the codes of one channel of several tokens that stand 32 apart: field j of word (r, d)
is the code of token `32*j + r`, channel d. So a page is 32 rows of head_dim words whatever the bits, a
*plane* j is 32 consecutive tokens, and unpacking a plane is a shift and a mask of whole words.

    bits      2    3    4    8
    planes    8    5    4    2      (3 bits leave one bit of each word unused: 3.2 bits a number)
    tokens  256  160  128   64

A page may have several such sheets of words, one below the other: planes go on in the next sheet when one is full.
That is how keys and values of different bits share a page (`planes_of`).
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch

PLANES = {2: 8, 3: 5, 4: 4, 8: 2}
ROWS = 32


_LARGEST = 20
"""Planes of the largest page: 640 tokens."""


def sheets_of(bits: int, planes: int) -> int:
    """Sheets of words that hold so many planes."""
    return -(-planes // PLANES[bits])


def planes_of(key_bits: int, value_bits: int, group: int) -> int:
    """Planes of a page of keys and values: whole groups, as few bytes a token as can be, and then as few tokens."""
    step = group // ROWS

    def cost(planes: int) -> tuple[Fraction, int]:
        return Fraction(sheets_of(key_bits, planes) + sheets_of(value_bits, planes), planes), planes

    return min(range(step, _LARGEST + 1, step), key=cost)


def quantise(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric min-max quantisation of groups along the last axis.

    x: float32 `[..., group]`. Returns codes int16 `[..., group]`, scale and zero float16 `[..., 1]` with
    x ~ code * scale + zero. Codes are computed against the *stored* (float16) scale and zero, rounding half
    to even. A constant group that float16 can hold has scale 0 and decodes to its zero point.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    zero = low.to(torch.float16)
    # By a tensor: on a GPU a division by a number is a product with its reciprocal, which may round otherwise.
    scale = ((high - zero.float()).clamp_(min=0) / high.new_full((1,), 2**bits - 1)).to(torch.float16)
    step = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((x - zero.float()) / step).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.int16), scale, zero


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """float32 `codes * scale + zero`, broadcast."""
    return torch.addcmul(zero.float(), codes.float(), scale.float())


def pack(
    codes: torch.Tensor, bits: int, plane: int = 0, words: torch.Tensor | None = None, sheets: int = 1
) -> torch.Tensor:
    """Codes of whole planes into words.

    codes: int16 `[pages, planes * 32, head_dim]` for planes `plane ..`; words: int16 `[pages, sheets * 32, head_dim]`
    of the same pages as they are now (its planes from `plane` on are overwritten).
    Returns int16 `[pages, sheets * 32, head_dim]`.
    """
    planes = codes.unflatten(1, (-1, ROWS)).to(torch.int32)
    out = planes.new_zeros((len(codes), sheets, ROWS, codes.shape[2]))
    first, field = divmod(plane, PLANES[bits])
    if words is not None:
        out[:, : first + 1] = words.unflatten(1, (sheets, ROWS))[:, : first + 1].to(torch.int32)
        out[:, first] &= (1 << (bits * field)) - 1
    for j in range(planes.shape[1]):
        sheet, field = divmod(plane + j, PLANES[bits])
        out[:, sheet] |= planes[:, j] << (bits * field)
    return out.to(torch.int16).flatten(1, 2)


def unpack(words: torch.Tensor, bits: int, plane: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of one plane: int16 `[..., 32, head_dim]` of words `[..., sheets * 32, head_dim]`."""
    sheet, field = divmod(plane, PLANES[bits])
    # An arithmetic shift brings sign bits in from the left; the mask takes them off again.
    codes = torch.bitwise_right_shift(words[..., sheet * ROWS : (sheet + 1) * ROWS, :], bits * field, out=out)
    return codes.bitwise_and_(2**bits - 1)


@lru_cache(maxsize=16)
def shifts(bits: int, device: torch.device) -> torch.Tensor:
    """Where the fields of a word begin: int16 `[PLANES[bits]]`."""
    with torch.inference_mode(False):
        return torch.arange(PLANES[bits], dtype=torch.int16, device=device) * bits


def unpack_planes(words: torch.Tensor, bits: int, planes: int | None = None) -> torch.Tensor:
    """Codes of planes 0, 1, ... (all that one sheet has if not given): int16 `[..., planes, 32, head_dim]`.

    In three passes over all of them, whatever their number: a step on a CPU is many small operations as it is.
    """
    apart = words.unflatten(-2, (-1, 1, ROWS))
    codes = (apart >> shifts(bits, words.device)[:, None, None]).bitwise_and_(2**bits - 1).flatten(-4, -3)
    return codes if planes in (None, codes.shape[-3]) else codes[..., :planes, :, :]


def planar_scores(
    queries: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    planes: int | None = None,
) -> torch.Tensor:
    """Inner products with keys that are quantised per channel in groups of whole planes.

    queries: float32 `[rows, query, head_dim]`; words: int16 `[rows, pages, sheets * 32, head_dim]`; scale, zero:
    float16 `[rows, pages, groups, head_dim]`; planes: of a page, all that one sheet has if not given.
    Returns float32 `[rows, query, pages * planes * 32]`.
    """
    rows, pages, _, dim = words.shape
    query, groups = queries.shape[1], scale.shape[2]
    # The channel's scale goes into the query, so that the codes enter the product as they are.
    scaled = (queries[:, None, None] * scale[:, :, :, None]).flatten(0, 2)
    offset = torch.matmul(queries[:, None], zero.float().transpose(2, 3)).transpose(2, 3).reshape(-1, query, 1)
    codes = unpack_planes(words, bits, planes).float().view(rows * pages * groups, -1, dim)
    out = torch.baddbmm(offset, scaled, codes.transpose(1, 2))
    return out.view(rows, pages * groups, query, -1).transpose(1, 2).reshape(rows, query, -1)


def planar_token_scores(
    queries: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Inner products with keys that are quantised per token in groups of channels.

    queries: float32 `[rows, query, head_dim]`; words: int16 `[rows, pages, 32, head_dim]`; scale, zero:
    float16 `[rows, pages, planes, groups, 32]`. Returns float32 `[rows, query, pages * planes * 32]`.
    """
    split = queries.unflatten(2, (scale.shape[3], -1)).transpose(1, 2)  # [rows, groups, query, channels]
    codes = unpack_planes(words, bits).float().flatten(1, 3).unflatten(2, (scale.shape[3], -1))
    scale, zero = by_token(scale), by_token(zero).float()
    out = torch.matmul(split.sum(3).transpose(1, 2), zero)
    for group in range(scale.shape[1]):
        products = torch.bmm(split[:, group], codes[:, :, group].transpose(1, 2))
        out.addcmul_(products, scale[:, group, None].float())
    return out


def planar_output(
    weights: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Values that are quantised per token in groups of channels, weighted.

    weights: float32 `[rows, query, pages * planes * 32]`; words: int16 `[rows, pages, sheets * 32, head_dim]`; scale,
    zero: float16 `[rows, pages, planes, groups, 32]`. Returns float32 `[rows, query, head_dim]`.
    """
    planes, groups = scale.shape[2:4]
    codes = unpack_planes(words, bits, planes).float().flatten(1, 3).unflatten(2, (groups, -1))
    # A token's scale goes into its weight.
    scaled = weights[:, None] * by_token(scale)[:, :, None]
    offset = torch.bmm(weights, by_token(zero).float().transpose(1, 2))[..., None]
    parts = [torch.baddbmm(offset[:, :, g], scaled[:, g], codes[:, :, g]) for g in range(groups)]
    return parts[0] if groups == 1 else torch.cat(parts, 2)


def unbias_(scores: torch.Tensor, squares: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Take off the scores what rounding adds to attention, in place.

    A score that noise is added to before the softmax counts for more: the mean of an exponential grows with half the
    variance of its exponent. A number that is rounded to steps of s has noise of variance s^2 / 12.

    scores: float32 `[rows, query, tokens]`; squares: of queries, summed over the channels that have a step in common,
    float32 `[rows, query, groups]`; steps: `[rows, groups, tokens]`, or as many as the tokens that share them in
    succession.
    """
    parts = scores.unflatten(2, (steps.shape[2], -1))
    parts.sub_(torch.bmm(squares, steps.float().square())[..., None], alpha=1 / 24)
    return scores


def by_token(x: torch.Tensor) -> torch.Tensor:
    """Scales or zero points `[rows, pages, planes, groups, 32]` by the order of tokens: `[rows, groups, tokens]`."""
    return x.permute(0, 3, 1, 2, 4).flatten(2)
