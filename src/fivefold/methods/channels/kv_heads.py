"""KV-head compression: the heads of a group become fewer, by the leading singular vectors of their caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fivefold.calibrate.learner import Capture, Learner
from fivefold.errors import RecipeError
from fivefold.methods import param, register
from fivefold.methods.low_rank import FactorLearner, LowRankCodec, LowRankMethod, profile_of
from fivefold.store import LayerSpec

HELD = 0.5
"""A profile holds what is needed for this part of the channels, or for `keep` if that is more."""


@register(slot="channels", name="kv_heads", paper="Yu et al., Effectively Compress KV Heads for LLM (arXiv:2406.07056)")
@dataclass(frozen=True)
class KvHeads(LowRankMethod):
    """Groups of kv heads become fewer: the top d' right singular vectors of their calibration caches (section 3.2).

    The caches of the t heads of a group on calibration text, side by side, are one matrix, keys before RoPE:

        K_g = [K_1, ..., K_t] = U S V^T   [tokens, t * head_dim];   the cache holds  C = K_g V',  V' = V[:, :d']

    and keys are made again as `C V'^T`, then turned by RoPE; values likewise, with a V' of their own. With d' =
    head_dim, t heads have become one: keep = 1 / t. That is t if no `group` is given, or the next number that divides
    the layer's heads; and d' is any number that is the same for each head, `t * round(keep * head_dim)`. More heads
    together lose less, and take more: keys are t d' head_dim products a token. V are the eigenvectors of the second
    moments `K_g^T K_g`, which is all that is summed up.

    Where we differ from the paper: its folding of `V'^T` into the weights (of V and O; of Q and K where there is no
    RoPE) spares a product and changes the model. Here nothing is folded, so the model stays as it is, other caches
    work beside this one, and the last `window` tokens (to window + 31, since 32 are packed at a time) are exact. Its
    published quality is after fine-tuning with LoRA, which is not done here. `cskv` is the same codec with another
    basis, weighted by what attention makes of keys and values, which costs less quality at the same bytes.

    Heads that hold other tokens than the rest of their group (`duo`, `streaming`) have features of their own, worked
    out from the same moments. Brings what a page holds, as `cskv` and the methods of the slot bits do: one of them.

    Bytes per packed token of one head, with r = round(keep * head_dim): `2 r` numbers in the model's dtype (`4 r` in 16
    bits); in b bits `2 r (2 / planes + 4 / 32)`, planes = 4 or 2 for 4 or 8 bits: codes, and a float16 scale and zero
    point for 32 tokens of a feature, as `cskv` has them. A group of t heads holds t r = d' keys and d' values a token.
    Beside them every cache has V' of keys and of values, float32: `8 n r kv_heads` bytes a layer, n its channels; at a
    half of 16-bit numbers that is what `2 n` tokens save.
    """

    captures: ClassVar[tuple[Capture, ...]] = ("keys", "values")

    keep: float = param(0.5, "fraction of the heads' channels that is stored", low=0.01, high=1)
    group: int | None = param(None, "consecutive kv heads that share their numbers, if not 1 / keep of them", low=1)
    window: int = param(32, "recent tokens that stay exact", low=0)
    bits: int | None = param(None, "bits a stored number, if not the model's own", choices=(None, 4, 8))
    profile: str | None = param(None, "folder of a profile, if not the one that ships for the model")

    def rank(self, head_dim: int) -> int:
        """Numbers per head, of keys and of values: d' / t."""
        return max(1, round(self.keep * head_dim))

    def share(self, kv_heads: int) -> int:
        """How many of a layer's heads share their numbers."""
        if self.group is not None:
            return self.group
        least = min(round(1 / self.keep), kv_heads)
        return next(n for n in range(least, kv_heads + 1) if kv_heads % n == 0)

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        # Groups smaller than a layer are cut out of its moments, which have to be whole for that.
        whole = any(self.share(spec.kv_heads) < spec.kv_heads for spec in specs)
        return FactorLearner(specs, 1.0 if whole else max(HELD, self.keep))

    def codec(self, spec: LayerSpec) -> LowRankCodec:
        if self.group is not None and spec.kv_heads % self.group:
            raise RecipeError(
                f"kv_heads(group={self.group}) does not divide the {spec.kv_heads} kv heads of layer {spec.layer}: use "
                f"one of {', '.join(str(n) for n in range(1, spec.kv_heads + 1) if spec.kv_heads % n == 0)}."
            )
        rank = self.rank(spec.head_dim)
        profile = profile_of(self, spec, self.profile, rank, weighted=False)
        share = self.share(spec.kv_heads)
        name = f"kv_heads{self.bits or ''}-{share}"
        return LowRankCodec(name, spec, profile, (rank, rank), self.bits, spec.dtype, share)
