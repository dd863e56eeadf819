"""Tokens into planar KIVI pages, in plain PyTorch: what the kernel must equal bit for bit."""

from __future__ import annotations

import torch

from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.planar import pack, quantise, sheets_of


def pack_reference(
    form: Form, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """The fields, `[pages, *shape]` in the record's order, of pages whose slots from `slot` on hold these tokens.

    keys, values: `[pages, tokens, head_dim]`, tokens and slot multiples of the group; opened: the fields as they are
    now, if slot > 0. What lies behind the tokens is zero or as it was.
    """
    planes = form.tokens // 32
    old = (None, None) if opened is None else (opened[:3], opened[3:])
    return (
        *pack_keys(keys, form.bits, form.group, planes, slot // 32, old[0]),
        *pack_values(values, form.bits, form.channels, planes, slot // 32, old[1]),
    )


def pack_keys(
    keys: torch.Tensor, bits: int, group: int, planes: int, plane: int = 0, old: tuple[torch.Tensor, ...] | None = None
) -> tuple[torch.Tensor, ...]:
    """Words, scale and zero point of keys `[pages, tokens, head_dim]` that fill planes `plane ..` of `planes`."""
    grouped = keys.float().unflatten(1, (-1, group)).transpose(2, 3)  # [pages, groups, head_dim, group]
    codes, scale, zero = quantise(grouped, bits)
    words = None if old is None else old[0]
    return (
        pack(codes.transpose(2, 3).flatten(1, 2), bits, plane, words, sheets_of(bits, planes)),
        *(
            fill_rows(part.squeeze(-1), plane * 32 // group, planes * 32 // group, None if old is None else old[number])
            for number, part in ((1, scale), (2, zero))
        ),
    )


def pack_values(
    values: torch.Tensor,
    bits: int,
    channels: int,
    planes: int,
    plane: int = 0,
    old: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The same of values, quantised in groups of `channels` channels of a token."""
    codes, scale, zero = quantise(values.float().unflatten(2, (-1, channels)), bits)
    words = None if old is None else old[0]
    by_plane = [x.squeeze(-1).unflatten(1, (-1, 32)).transpose(2, 3) for x in (scale, zero)]
    return (
        pack(codes.flatten(2), bits, plane, words, sheets_of(bits, planes)),
        *(fill_rows(part, plane, planes, None if old is None else old[n + 1]) for n, part in enumerate(by_plane)),
    )


def fill_rows(part: torch.Tensor, at: int, count: int, old: torch.Tensor | None) -> torch.Tensor:
    """`count` rows of a field: those of `part` from `at` on, and the others as they were, or zero."""
    whole = part.new_zeros((len(part), count, *part.shape[2:])) if old is None else old.clone()
    whole[:, at : at + part.shape[1]] = part
    return whole


def fields_of(form: Form, records: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fields of records int16 `[pages, nbytes / 2]`, in order, as views."""
    dim, half = form.head_dim, torch.float16
    key, value = (form.tokens // form.group, dim), (form.tokens // 32, dim // form.channels, 32)
    out, start = [], 0
    for shape, dtype in (
        ((32, dim), torch.int16), (key, half), (key, half), ((32, dim), torch.int16), (value, half), (value, half),
    ):  # fmt: skip
        size = torch.Size(shape).numel()
        out.append(records[:, start : start + size].view(dtype).unflatten(1, shape))
        start += size
    return tuple(out)
