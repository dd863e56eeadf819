"""Tokens into planar KIVI pages, in plain PyTorch: what the kernel must equal bit for bit."""

from __future__ import annotations

import torch

from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.planar import pack, quantise


def pack_reference(
    form: Form, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """The fields, `[pages, *shape]` in the record's order, of pages whose slots from `slot` on hold these tokens.

    keys, values: `[pages, tokens, head_dim]`, tokens and slot multiples of the group; opened: the fields as they are
    now, if slot > 0. What lies behind the tokens is zero or as it was.
    """
    grouped = keys.float().unflatten(1, (-1, form.group)).transpose(2, 3)  # [pages, groups, head_dim, group]
    codes, key_scale, key_zero = quantise(grouped, form.bits)
    key_codes = codes.transpose(2, 3).flatten(1, 2)
    split = values.float().unflatten(2, (-1, form.channels))
    value_codes, value_scale, value_zero = quantise(split, form.bits)
    plane = slot // 32
    by_plane = [x.squeeze(-1).unflatten(1, (-1, 32)).transpose(2, 3) for x in (value_scale, value_zero)]
    parts = (key_codes, key_scale.squeeze(-1), key_zero.squeeze(-1), value_codes.flatten(2), *by_plane)
    fields = []
    for number, part in enumerate(parts):
        old = None if opened is None else opened[number]
        if number in (0, 3):
            fields.append(pack(part, form.bits, plane, old))
            continue
        at, count = (slot // form.group, form.tokens // form.group) if number < 3 else (plane, form.tokens // 32)
        whole = part.new_zeros((len(part), count, *part.shape[2:])) if old is None else old.clone()
        whole[:, at : at + part.shape[1]] = part
        fields.append(whole)
    return tuple(fields)
