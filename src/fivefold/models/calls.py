"""What a call of the model gives beside the cache: checked, and put right, before anything is begun."""

from __future__ import annotations

from typing import Any

import torch

from fivefold.errors import CacheStateError
from fivefold.kernels.device import sent
from fivefold.models.cache import FivefoldCache

_LIKE_TOKENS = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""What has a column for each token in its last dimension."""


def checked(
    cache: FivefoldCache, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, without what the cache has seen already. Raises `CacheStateError`."""
    begun, cache.begun = cache.begun, False
    ids = _ids(args, given)
    if ids is None or ids.ndim < 2:
        return args, given  # the model says what it misses
    (batch, chunk), length, mask = ids.shape[:2], cache.session.length, given.get("attention_mask")
    if not batch or not chunk:
        seen = "; generate() wants all that it holds before them, or an attention mask over it" if length else ""
        raise CacheStateError(
            f"the model was given no tokens ({list(ids.shape)}) for a cache that holds {length}: give at least one "
            f"that is new{seen}."
        )
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        if mask.shape[0] not in (1, batch):
            raise CacheStateError(
                f"an attention mask of {mask.shape[0]} sequences was given with tokens of {batch}: give one of "
                f"[{batch}, {length + chunk}], or none."
            )
        if mask.shape[1] < length + chunk and not (begun and mask.shape[1] == chunk):
            raise CacheStateError(
                f"an attention mask over {mask.shape[1]} tokens was given where the cache holds {length} and {chunk} "
                f"come: give one over all tokens so far, {length + chunk}, or none."
            )
    if begun and length:
        return _continued(cache, ids, args, given)
    return args, given


def _continued(
    cache: FivefoldCache, ids: torch.Tensor, args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first call of `generate` with a cache that holds something. transformers has cut off what the cache has seen,
    but not for assisted decoding, and where the text is no longer than that it has cut at the wrong place."""
    positions, mask, length = given.get("position_ids"), given.get("attention_mask"), cache.session.length
    if args or positions is None or positions.ndim != 2 or positions.shape[1] != ids.shape[1]:
        return args, given
    held = cache.lengths()
    kept = given.get("logits_to_keep")
    guessed = max(0, kept - 1) if cache.session.recording and isinstance(kept, int) else 0  # tokens behind the text
    ends = positions[:, [0, -1 - guessed]].cpu().numpy()
    if (ends[:, 1] < held.min()).all():
        raise CacheStateError(
            f"generate() was given a text of {ends[:, 1].max() + 1} tokens, and the cache holds {length} already: give "
            "the whole text so far and what is new behind it, or call cache.reset() first for another text."
        )
    whole = ends[0, 0] < held[0] if mask is None else mask.ndim == 2 and mask.shape[1] == ids.shape[1]
    if not (whole and cache.session.recording and len(ids) == 1 and ids.shape[1] > length):
        return args, given
    rest = {name: x[..., length:] for name, x in given.items() if name in _LIKE_TOKENS and x is not None}
    if given.get("inputs_embeds") is not None:
        rest["inputs_embeds"] = given["inputs_embeds"][:, length:]
    return args, {**given, **rest}


def _ids(args: tuple[Any, ...], given: dict[str, Any]) -> torch.Tensor | None:
    ids = args[0] if args else given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def chunk_of(args: tuple[Any, ...], given: dict[str, Any]) -> int:
    """How many tokens a call gives."""
    ids = _ids(args, given)
    return 0 if ids is None else ids.shape[1]


def places(cache: FivefoldCache, args: tuple[Any, ...], given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Mask and positions of a call whose sequences have come from several caches, where the caller gave none."""
    ids = _ids(args, given)
    if ids is None or ids.shape[0] != cache.batch:
        return {}
    session, chunk, out = cache.session, ids.shape[1], {}
    mask, total = given.get("attention_mask"), session.length + chunk
    lengths = sent(ids.device, session.lengths())[0][:, None]
    if mask is not None:
        if mask.ndim != 2:
            return {}  # it is refused by the attention
        mask = out["attention_mask"] = mask[:, -total:]  # padding that all have left when a sequence went
    elif session.companions is not None:
        out["attention_mask"] = (torch.arange(total, device=ids.device) >= session.length - lengths).long()
    if given.get("position_ids") is None:
        new = torch.arange(chunk, device=ids.device)
        if mask is not None:
            new = (mask[:, -chunk:].cumsum(1) - 1).clamp(min=0).to(ids.device)
        out["position_ids"] = lengths + new
    return out
