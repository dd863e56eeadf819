"""The planar page in plain PyTorch: the reference that every fast kernel is held against.

One 16-bit word holds the codes of one channel of several tokens that stand 32 apart: field j of word (r, d) is the
code of token `32*j + r`, channel d. So a page is 32 rows of head_dim words whatever the bits, a *plane* j is 32
consecutive tokens, and unpacking a plane is a shift and a mask of whole words.

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
    x ~ code * scale + zero. Codes are computed against the *stored* (float16) scale and zero, rounding half to even.
    A constant group has scale 0 and decodes to its zero point.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    zero = low.to(torch.float16)
    scale = ((high - zero.float()) / (2**bits - 1)).to(torch.float16)
    step = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((x - zero.float()) / step).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.int16), scale, zero


def dequantise(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """float32 `codes * scale + zero`, broadcast."""
    return codes.float() * scale.float() + zero.float()


def pack(codes: torch.Tensor, bits: int, plane: int = 0, words: torch.Tensor | None = None) -> torch.Tensor:
    """Codes of whole planes into words.

    codes: int16 `[pages, planes * 32, head_dim]` for planes `plane ..`; words: int16 `[pages, 32, head_dim]` of the
    same pages as they are now (its planes from `plane` on are overwritten). Returns int16 `[pages, 32, head_dim]`.
    """
    planes = codes.unflatten(1, (-1, ROWS)).to(torch.int32)
    out = torch.zeros_like(planes[:, 0])
    if words is not None:
        out = words.to(torch.int32) & ((1 << (bits * plane)) - 1)
    for j in range(planes.shape[1]):
        out |= planes[:, j] << (bits * (plane + j))
    return out.to(torch.int16)


def unpack(words: torch.Tensor, bits: int, plane: int) -> torch.Tensor:
    """Codes of one plane: int16, the shape of `words`."""
    # An arithmetic shift brings sign bits in from the left; the mask takes them off again.
    return (words >> (bits * plane)) & (2**bits - 1)


def planar_scores(
    queries: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Inner products with keys that are quantised per channel in groups of whole planes.

    queries: float32 `[rows, query, head_dim]`; words: int16 `[rows, pages, 32, head_dim]`; scale, zero: float16
    `[rows, pages, groups, head_dim]`. Returns float32 `[rows, query, pages * planes * 32]`.
    """
    rows, pages, _, dim = words.shape
    query, planes = queries.shape[1], PLANES[bits]
    share = planes // scale.shape[2]
    out = queries.new_empty((rows, pages, query, planes, ROWS))
    # The channel's scale goes into the query, so that a plane's codes enter the product as they are.
    scaled = queries[:, None, :, None] * scale[:, :, None].float()
    offset = torch.einsum("rqd,rpgd->rpqg", queries, zero.float())
    for j in range(planes):
        codes = unpack(words, bits, j).float()
        part = torch.bmm(
            scaled[:, :, :, j // share].reshape(rows * pages, query, dim), codes.flatten(0, 1).transpose(1, 2)
        )
        torch.add(part.unflatten(0, (rows, pages)), offset[..., j // share, None], out=out[:, :, :, j])
    return out.permute(0, 2, 1, 3, 4).reshape(rows, query, -1)


def planar_output(
    weights: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """Values that are quantised per token in groups of channels, weighted.

    weights: float32 `[rows, query, pages * planes * 32]`; words: int16 `[rows, pages, 32, head_dim]`; scale, zero:
    float16 `[rows, pages, planes, 32, groups]`. Returns float32 `[rows, query, head_dim]`.
    """
    rows, pages, _, dim = words.shape
    query, planes, groups = weights.shape[1], PLANES[bits], scale.shape[-1]
    split = weights.unflatten(2, (pages, planes, ROWS))
    out = weights.new_zeros((rows, query, groups, dim // groups))
    flat_zero = zero.float().flatten(1, 3)
    out += (weights @ flat_zero)[..., None]
    for j in range(planes):
        codes = unpack(words, bits, j).float().reshape(rows, pages * ROWS, groups, dim // groups)
        for g in range(groups):
            # A token's scale goes into its weight.
            weighted = split[:, :, :, j] * scale[:, None, :, j, :, g].float()
            out[:, :, g] += torch.bmm(weighted.reshape(rows, query, -1), codes[:, :, g])
    return out.flatten(2)
