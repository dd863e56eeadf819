"""The planar page in plain PyTorch: the reference that every fast kernel is held against.

One 16-bit word holds the codes of one channel of several tokens that stand 32 apart: field j of word (r, d)
is the code of token `32*j + r`, channel d. So a page is 32 rows of head_dim words whatever the bits, a
*plane* j is 32 consecutive tokens, and unpacking a plane is a shift and a mask of whole words.

    bits      2    3    4    8
    planes    8    5    4    2      (3 bits leave one bit of each word unused: 3.2 bits a number)
    tokens  256  160  128   64
"""

from __future__ import annotations

import torch

PLANES = {2: 8, 3: 5, 4: 4, 8: 2}
ROWS = 32


def quantise(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric min-max quantisation of groups along the last axis.

    x: float32 `[..., group]`. Returns codes int16 `[..., group]`, scale and zero float16 `[..., 1]` with
    x ~ code * scale + zero. Codes are computed against the *stored* (float16) scale and zero, rounding half
    to even. A constant group that float16 can hold has scale 0 and decodes to its zero point.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    zero = low.to(torch.float16)
    scale = ((high - zero.float()).clamp_(min=0) / (2**bits - 1)).to(torch.float16)
    step = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((x - zero.float()) / step).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.int16), scale, zero


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """float32 `codes * scale + zero`, broadcast."""
    return codes.float() * scale.float() + zero.float()


def pack(codes: torch.Tensor, bits: int, plane: int = 0, words: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of whole planes into words.

    codes: int16 `[pages, planes * 32, head_dim]` for planes `plane ..`; words: int16 `[pages, 32, head_dim]`
    of the same pages as they are now (its planes from `plane` on are overwritten).
    Returns int16 `[pages, 32, head_dim]`.
    """
    planes = codes.unflatten(1, (-1, ROWS)).to(torch.int32)
    out = torch.zeros_like(planes[:, 0])
    if words is not None:
        out = words.to(torch.int32) & ((1 << (bits * plane)) - 1)
    for j in range(planes.shape[1]):
        out |= planes[:, j] << (bits * (plane + j))
    return out.to(torch.int16)


def unpack(words: torch.Tensor, bits: int, plane: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of one plane: int16, the shape of `words`."""
    # An arithmetic shift brings sign bits in from the left; the mask takes them off again.
    codes = torch.bitwise_right_shift(words, bits * plane, out=out)
    return codes.bitwise_and_(2**bits - 1)


class _Planes:
    """The planes of words, one after the other, as float32: one pair of buffers serves all of them.

    A step's memory stays at a plane, and the plane in the processor's cache between unpacking and product.
    """

    def __init__(self, words: torch.Tensor, bits: int) -> None:
        self.words, self.bits = words, bits
        self.codes = torch.empty(words.shape, dtype=torch.int16, device=words.device)
        self.numbers = torch.empty(words.shape, dtype=torch.float32, device=words.device)

    def __getitem__(self, plane: int) -> torch.Tensor:
        return self.numbers.copy_(unpack(self.words, self.bits, plane, self.codes))


def planar_scores(
    queries: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Inner products with keys that are quantised per channel in groups of whole planes.

    queries: float32 `[rows, query, head_dim]`; words: int16 `[rows, pages, 32, head_dim]`; scale, zero:
    float16 `[rows, pages, groups, head_dim]`. Returns float32 `[rows, query, pages * planes * 32]`.
    """
    rows, pages, _, dim = words.shape
    query, planes, groups = queries.shape[1], PLANES[bits], scale.shape[2]
    # The channel's scale goes into the query, so that a plane's codes enter the product as they are.
    spread = queries[:, None].expand(rows, pages, query, dim)
    shape = (groups, rows * pages, query)
    scaled = torch.mul(spread, scale.permute(2, 0, 1, 3)[:, :, :, None]).reshape(*shape, dim)
    offset = torch.matmul(queries[:, None], zero.float().transpose(2, 3)).permute(3, 0, 1, 2).reshape(*shape, 1)
    out = queries.new_empty((planes, rows * pages, query, ROWS))
    tile = _Planes(words, bits)
    for j in range(planes):
        g = j * groups // planes
        torch.baddbmm(offset[g], scaled[g], tile[j].flatten(0, 1).transpose(1, 2), out=out[j])
    return out.view(planes, rows, pages, query, ROWS).permute(1, 3, 2, 0, 4).reshape(rows, query, -1)


def planar_token_scores(
    queries: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Inner products with keys that are quantised per token in groups of channels.

    queries: float32 `[rows, query, head_dim]`; words: int16 `[rows, pages, 32, head_dim]`; scale, zero:
    float16 `[rows, pages, planes, groups, 32]`. Returns float32 `[rows, query, pages * planes * 32]`.
    """
    rows, query, planes, groups = len(words), queries.shape[1], PLANES[bits], scale.shape[3]
    query, planes, groups = queries.shape[1], PLANES[bits], scale.shape[3]
    split = queries.unflatten(2, (groups, -1))
    # One product for all groups: each has its own copy of the query, with the other groups' channels 0.
    eye = torch.eye(groups, device=queries.device)
    apart = (split[:, None] * eye[:, None, :, None]).flatten(3).flatten(1, 2)  # [rows, groups * query, head_dim]
    out = torch.matmul(split.sum(-1)[:, None, None], zero.float())  # [rows, pages, planes, query, 32]
    tile = _Planes(words, bits)
    for j in range(planes):
        products = torch.matmul(apart[:, None], tile[j].transpose(2, 3)).unflatten(2, (groups, query))
        out[:, :, j] += (products * scale[:, :, j, :, None]).sum(2)
    return out.permute(0, 3, 1, 2, 4).reshape(rows, query, -1)


def planar_output(
    weights: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Values that are quantised per token in groups of channels, weighted.

    weights: float32 `[rows, query, pages * planes * 32]`; words: int16 `[rows, pages, 32, head_dim]`; scale,
    zero: float16 `[rows, pages, planes, groups, 32]`. Returns float32 `[rows, query, head_dim]`.
    """
    rows, pages, _, dim = words.shape
    query, planes, groups = weights.shape[1], PLANES[bits], scale.shape[3]
    # A token's scale goes into its weight.
    scaled = weights.new_empty((planes, groups, rows, query, pages, ROWS))
    split = weights.view(rows, query, pages, planes, ROWS).permute(3, 0, 1, 2, 4)
    torch.mul(split[:, None], scale.permute(2, 3, 0, 1, 4)[:, :, :, None], out=scaled)
    scaled = scaled.flatten(4)
    by_token = zero.float().transpose(3, 4).flatten(1, 3)
    out = torch.matmul(weights, by_token).transpose(1, 2).transpose(0, 1)[..., None]
    out = out.expand(groups, rows, query, dim // groups).contiguous()
    tile = _Planes(words, bits)
    for j in range(planes):
        codes = tile[j].flatten(1, 2).unflatten(2, (groups, -1))
        for g in range(groups):
            out[g].baddbmm_(scaled[j, g], codes[:, :, g])
    return out.permute(1, 2, 0, 3).reshape(rows, query, dim)
