"""A byte budget shared out over layers, heads, tokens and bits by what each of them costs in this model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fivefold.calibrate.learner import Subject
from fivefold.calibrate.profile import load_profile
from fivefold.errors import ProfileError, RecipeError
from fivefold.methods import Method, find, param, register
from fivefold.store import LayerSpec

if TYPE_CHECKING:
    from fivefold.calibrate.budget import Sharing


@register(slot="bits", name="budget", paper="none: ours")
@dataclass(frozen=True)
class Budget(Method):
    """What `fivefold calibrate` found to lose least in `bytes` of the exact cache's bytes at `context` tokens.

    Every layer l gets bits b_l, and every KV head (l, h) holds all tokens or a window of the first `sink` and the last
    `recent` ones. Calibration measures what one change alone costs, everything else exact: D(l, b), the KL divergence
    of the next-token distributions with layer l in b bits, and W(l, h), with a window in that head. It then minimises

        sum over l of  D(l, b_l) * (share of heads of l that hold all tokens)  +  w * sum over windows of W(l, h)

    under the budget, exactly, by dynamic programming over bytes that the store itself says it takes: pages, scales,
    tables and all. Losses of single changes do not simply add up, and a window changes what a prompt's later layers
    see; so a second pass measures whole recipes: for several w, and then about the best one found, with costs that are
    multiplied by random factors, which are kept where the recipe they lead to is better.

    A text is `length` tokens of the calibration text, what follows them there, and a quotation from them, so that heads
    that find what stands far back are missed. Bits are `rotatekv`'s where there is a profile of it, else `kivi`'s.

    The result is an ordinary recipe, `duo(...) + rotatekv(bits=[...])` or `kivi(bits=[...])`, which is printed and kept
    in the profile. `budget(bytes=..., profile=...)` is that recipe, too. At other lengths than `context` it takes
    another share: more of a shorter text, of which windows and pages that are not full are a greater part.
    """

    bytes: float | tuple = param(0.1, "share of the exact cache's bytes; a list to calibrate for several")
    context: int = param(2048, "tokens at which a cache's bytes are counted (calibration)", low=128)
    length: int = param(1024, "tokens of the texts that losses are measured on (calibration)", low=128)
    sink: int = param(4, "first tokens that a window holds (calibration)", low=0)
    recent: int = param(96, "most recent tokens that a window holds (calibration)", low=1)
    texts: int = param(2, "pieces of text that losses are measured on (calibration)", low=1)
    tries: int = param(8, "recipes that the second pass measures for each budget (calibration)", low=1)
    rotation: str | None = param(None, "folder of a rotatekv profile, if not the one that ships (calibration)")
    profile: str | None = param(None, "folder of a profile, if not the one that ships for the model")

    def check(self) -> None:
        for share in self.shares:
            if not (isinstance(share, int | float) and not isinstance(share, bool) and 0.01 <= share <= 1):
                raise RecipeError(f"budget(bytes={share!r}) is out of range: use 0.01 to 1, for example 0.1.")
        if not self.shares:
            raise RecipeError("budget(bytes=[]) is empty: give a share of the exact cache's bytes, for example 0.1.")

    @property
    def shares(self) -> tuple[float, ...]:
        """The budgets, as shares of the exact cache's bytes."""
        return self.bytes if isinstance(self.bytes, tuple) else (self.bytes,)

    def excludes(self, other: Method) -> str | None:
        if other.slot in ("heads", "channels", "layers"):
            return f"it shares heads and bits out itself; add {other.name} to the recipe that it comes to."
        return None

    def work(self, subject: Subject) -> Sharing:
        from fivefold.calibrate.budget import Sharing

        return Sharing(self, subject)

    def methods(self, spec: LayerSpec) -> Sequence[Method]:
        """The recipe that it comes to. Raises `ProfileError`, `RecipeError`."""
        if isinstance(self.bytes, tuple):
            raise RecipeError(f"budget(bytes={list(self.bytes)}) is for fivefold calibrate: use one of them here.")
        try:
            profile = load_profile(self.profile or f"{self.name}-{spec.model}", self.name, spec.model, spec.config)
        except ProfileError as error:
            if self.profile:
                raise
            raise ProfileError(
                f"budget() has measured nothing on this model ({spec.model}): run fivefold calibrate --recipe "
                f"'{self}', and use the recipe that it prints, or give the folder as budget(profile=...)."
            ) from error
        found: dict[str, Any] = profile.settings["recipes"]
        if repr(self.bytes) not in found:
            raise ProfileError(
                f"the profile {self.profile or profile.method!r} was made for bytes={' and '.join(found)}, not for "
                f"{self.bytes!r}: use one of them, or run fivefold calibrate --recipe 'budget(bytes={self.bytes!r})'."
            )
        return [find(name)(**values) for name, values in found[repr(self.bytes)]["methods"]]

    def of_layer(self, spec: LayerSpec) -> tuple[Method, ...]:
        return tuple(one for method in self.methods(spec) for one in method.of_layer(spec))
