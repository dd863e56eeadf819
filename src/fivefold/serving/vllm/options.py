"""What a recipe means inside vLLM, and what is refused before weights are loaded. It needs no vLLM."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from fivefold.errors import FivefoldError, RecipeError, UnsupportedModelError
from fivefold.kernels.packed_decode import Form
from fivefold.methods.bits.kivi import Kivi, KiviCodec
from fivefold.methods.bits.rotatekv import RotateKV
from fivefold.methods.heads.duo_attention import DuoAttention
from fivefold.recipe import Recipe
from fivefold.serving.vllm.rotated import RotatedForm
from fivefold.signature import config_hash, signature
from fivefold.store.spec import DTYPES, LayerSpec

__all__ = [
    "KEY",
    "NO_RECIPE",
    "RECIPE",
    "VERSIONS",
    "Facts",
    "Options",
    "Pages",
    "VersionError",
    "check_version",
    "knows_offloading",
    "recipe_text",
    "without_the_last",
]
RECIPE = "FIVEFOLD_RECIPE"
"""The environment variable that names a recipe."""
KEY = "fivefold"
"""Under it `--additional-config` has the recipe."""
NO_RECIPE = (
    f"the attention backend CUSTOM is Fivefold's and has no recipe: add --additional-config "
    f"""'{{"{KEY}": "kivi(bits=4)"}}', or set {RECIPE}."""
)
VERSIONS = (0, 29), (0, 34)
"""Versions of vLLM that the plug-in knows: from the first, below the second."""
OFFLOADING = (0, 32)
"""From this version on its KV offloading is known too."""
PAGE = 32
"""Tokens of an exact page."""
HEAD_DIMS = (64, 128, 256)
"""What kernels exist for on a GPU; the others are refused everywhere, so that a test on a CPU says something."""


class VersionError(FivefoldError, ImportError):
    """A version of vLLM that the plug-in does not know."""


def check_version(version: str) -> None:
    """Raise `VersionError` if the plug-in does not know this version of vLLM."""
    found = re.match(r"(\d+)\.(\d+)", version)
    (low, high) = ("{}.{}".format(*one) for one in VERSIONS)
    if found is None or not VERSIONS[0] <= tuple(map(int, found.groups())) < VERSIONS[1]:
        raise VersionError(
            f"vLLM {version} is none that Fivefold's plug-in knows: install vllm>={low},<{high}, or run it without a "
            "recipe."
        )


def knows_offloading(version: str) -> bool:
    """Whether the plug-in knows the KV offloading of a version that it knows."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and tuple(map(int, found.groups())) >= OFFLOADING


def without_the_last(found: int, tokens: int, block: int) -> int:
    """Tokens of `found`, whole blocks, that a request of so many tokens may take over: its last token is computed, so
    that there is a next one, and must not stand in a packed block."""
    return min(found, (tokens - 1) // block * block)


def recipe_text(additional: Any, environment: str | None) -> str | None:
    """The recipe that is asked for, by `additional_config` or else by the environment; None if there is none."""
    given = additional.get(KEY) if isinstance(additional, dict) else None
    if isinstance(given, dict):
        given = given.get("recipe", given)
    if given is not None and not isinstance(given, str):
        raise RecipeError(
            f"additional_config has {KEY}={given!r}, which is no recipe: write "
            f"""--additional-config '{{"{KEY}": "kivi(bits=4)"}}'."""
        )
    return given if given is not None else environment or None


@dataclass(frozen=True)
class Pages:
    """How the tokens of a KV head lie in vLLM's blocks.

    form: of packed pages. residual: so many recent tokens, and the group of `form.group` tokens that is not complete,
    are read exactly. dtype: of exact pages, `[32, head_dim]` keys, then values. together: packed pages in a block.
    least: bytes that a block has for each KV head, at least, where other heads' blocks need it.
    """

    form: Form
    residual: int
    dtype: torch.dtype
    least: int = 0

    @property
    def exact_bytes(self) -> int:
        """Of an exact page of 32 tokens."""
        return 2 * PAGE * self.form.head_dim * self.dtype.itemsize

    @property
    def together(self) -> int:
        """Packed pages in a block: as few as make it no smaller than an exact page, since all blocks are as large as
        the largest."""
        return -(-max(self.least, self.exact_bytes) // self.form.nbytes)

    @property
    def block(self) -> int:
        """Tokens of a block of packed pages."""
        return self.together * self.form.tokens

    @property
    def block_bytes(self) -> int:
        """Of a block of either kind, for a KV head."""
        return self.together * self.form.nbytes

    @property
    def exact_together(self) -> int:
        """Exact pages in a block."""
        return self.block_bytes // self.exact_bytes

    @property
    def window(self) -> int:
        """Tokens that may be read exactly, the newest included."""
        return self.residual + self.form.group

    @property
    def columns(self) -> int:
        """Exact pages that a decoding step looks at."""
        return -(-self.window // PAGE)

    def packed_columns(self, tokens: int) -> int:
        """Packed pages that a decoding step looks at, where a request has so many tokens."""
        return -(-tokens // self.block) * self.together

    def completes(self, tokens: int) -> bool:
        """Whether the newest of so many tokens makes a group due that a decoding step packs."""
        return tokens % self.form.group == 0

    def packed(self, known: int) -> int:
        """How many of the first `known` tokens are read packed: as `kivi` has it in a session."""
        return max(0, known - self.residual) // self.form.group * self.form.group

    def bytes_of(self, tokens: int) -> int:
        """The byte formula: of so many tokens of a KV head, codes, scales and exact tokens alone."""
        packed = self.packed(tokens)
        return packed * self.form.nbytes // self.form.tokens + (tokens - packed) * self.exact_bytes // PAGE

    def blocks_of(self, tokens: int) -> int:
        """Blocks that vLLM holds for so many tokens: of packed pages, and of exact ones."""
        return -(-tokens // self.block) + min(-(-tokens // PAGE), self.columns)


@dataclass(frozen=True)
class Facts:
    """What is asked of a model that is to be served. window: of layers that have a sliding one; dtype and what stands
    behind `hybrid`: what vLLM was told; connector: a KV connector that cannot carry packed blocks; transfers: whether
    there is any; config: the decoder's configuration, where a recipe asks for heads."""

    model: str
    head_dim: int
    query_heads: int
    kv_heads: int
    dtype: torch.dtype
    window: int | None = None
    cap: float | None = None
    mla: bool = False
    attention_free: bool = False
    encoder: bool = False
    hybrid: bool = False
    prefix: bool = False
    speculation: str | None = None
    pipeline: int = 1
    context_parallel: int = 1
    tensor: int = 1
    cache_dtype: str = "auto"
    block_size: int | None = None
    one_group: bool = False
    connector: str | None = None
    microbatches: bool = False
    cpu: bool = True
    layers: int = 1
    transfers: bool = False
    config: Any = None


@dataclass(frozen=True)
class Options:
    """A recipe that vLLM's blocks can hold: `kivi`, alone or on a CPU with `duo`, or on a CPU `rotatekv` alone."""

    recipe: Recipe
    method: Kivi | RotateKV
    duo: DuoAttention | None = None

    @classmethod
    def parse(cls, text: str) -> Options:
        """Raises `RecipeError` for what is no recipe, and for one that the plug-in does not serve."""
        recipe = Recipe.parse(text)
        remedy = "write kivi(bits=2), kivi(bits=3), kivi(bits=4) or kivi(bits=8), or use Fivefold in transformers"
        if not recipe.methods:
            raise RecipeError(f"{recipe} compresses nothing, and the plug-in has nothing to do: leave the recipe out.")
        for one in recipe.methods:
            if one.slot in ("tokens", "reads"):
                raise RecipeError(
                    f"{one.name} chooses tokens for each head, and in vLLM one table serves all heads of a layer: "
                    f"{remedy}."
                )
            if not isinstance(one, Kivi | RotateKV | DuoAttention):
                raise RecipeError(f"{one.name} is not served by vLLM's blocks: {remedy}.")
        method = next((one for one in recipe.methods if isinstance(one, Kivi | RotateKV)), None)
        duo = next((one for one in recipe.methods if isinstance(one, DuoAttention)), None)
        if method is None:
            raise RecipeError(f"{recipe} packs nothing, and vLLM's blocks hold packed pages: write {recipe} + kivi().")
        for one in recipe.methods:
            if lists := one.by_layer():
                name = next(iter(lists))
                raise RecipeError(
                    f"{recipe} has values by layer ({name}), and vLLM's blocks are alike in all layers: give {name} "
                    "one number."
                )
        if isinstance(method, RotateKV):
            if duo is not None:
                raise RecipeError(f"{recipe}: beside duo rotatekv is not served: write kivi().")
            if method.sinks:
                raise RecipeError(
                    f"{recipe} finds attention sinks in what goes into a layer, and vLLM hands that to no attention: "
                    "write sinks=0."
                )
            return cls(recipe, method)
        if duo is not None and method.group != PAGE:
            raise RecipeError(f"{recipe}: beside duo groups of {method.group} tokens are not served: write "
                              f"kivi(group={PAGE}).")  # fmt: skip
        if method.unbias:
            raise RecipeError(f"{recipe}: no kernel of the plug-in corrects scores: leave unbias out.")
        bits = method.key_bits or method.bits, method.value_bits or method.bits
        if bits[0] != bits[1]:
            raise RecipeError(
                f"{recipe} has keys of {bits[0]} and values of {bits[1]} bits, which the plug-in does not serve: give "
                "both the same."
            )
        if not isinstance(_codec(method, 64).form, Form):
            raise RecipeError(f"{recipe}: pages of {bits[0]} bits in groups of {method.group} tokens are not served: "
                              "write group=32.")  # fmt: skip
        return cls(recipe, method, duo)

    def pages(self, head_dim: int, dtype: torch.dtype) -> Pages:
        """What pages of a layer look like."""
        if isinstance(self.method, RotateKV):
            return Pages(RotatedForm.of(self.method, head_dim), self.method.residual, dtype)
        form = _codec(self.method, head_dim).form
        assert isinstance(form, Form)
        return Pages(form, self.method.residual, dtype)

    def check(self, facts: Facts) -> None:
        """Raise `UnsupportedModelError` if the plug-in cannot serve a model."""
        why = _lacking(facts)
        if why is None and isinstance(self.method, RotateKV):
            why = _lacking_rotated(facts)
        elif why is None and not facts.cpu and self.method.group != PAGE:
            why = f"on a GPU groups of {self.method.group} tokens are not served; write group={PAGE}"
        if why is None and self.duo is not None:
            why = self._why_no_duo(facts)
        if why:
            raise UnsupportedModelError(f"{facts.model} cannot be served with {self.recipe}: {why}.")

    def _why_no_duo(self, facts: Facts) -> str | None:
        if not facts.cpu:
            return "duo is served on a CPU only; leave duo out, or use Fivefold in transformers"
        if facts.tensor > 1:
            return f"with duo heads are not split; leave --tensor-parallel-size {facts.tensor} out, or duo"
        if facts.transfers:
            return "a KV connector would bring the tokens of retrieval heads alone; leave it out, or duo"
        assert self.duo is not None
        few, many = (choose(map(len, self.retrieval(facts))) for choose in (min, max))
        if few == many and 0 < many < facts.kv_heads:
            return None
        if facts.kv_heads == 1:
            return "its layers have one KV head, and duo would have to cut it in two; leave duo out"
        if isinstance(self.duo.retrieval, tuple):
            remedy = f"name as many in each layer, 1 to {facts.kv_heads - 1}"
        elif 0 < round(self.duo.keep * facts.kv_heads) < facts.kv_heads:
            remedy = f"write duo(keep={self.duo.keep:g}, even=True), which takes as many in each layer"
        else:
            remedy = f"write duo(keep=0.5, even=True), or another share that leaves 1 to {facts.kv_heads - 1} of them"
        some = many if few == many else f"{few} to {many}"
        why = "that is all or nothing" if few == many else "vLLM's blocks are alike in all layers"
        return f"its layers have {some} retrieval heads among {facts.kv_heads} KV heads, and {why}; {remedy}"

    def retrieval(self, facts: Facts) -> list[tuple[int, ...]]:
        """With `duo`: the retrieval heads of each layer. Raises `RecipeError` or `ProfileError`."""
        assert self.duo is not None
        names = ("", "") if facts.config is None else (signature(facts.config), config_hash(facts.config))
        shape = facts.layers, facts.kv_heads, facts.query_heads, facts.head_dim
        spec = LayerSpec(0, *shape, torch.float32, torch.device("cpu"), *names)
        found = sorted(self.duo.retrieval_heads(spec))
        return [tuple(head for at, head in found if at == layer) for layer in range(facts.layers)]


def _codec(method: Kivi, head_dim: int) -> KiviCodec:
    return method.codec(LayerSpec(0, 1, 1, 1, head_dim, torch.float32, torch.device("cpu")))


def _lacking_rotated(facts: Facts) -> str | None:
    """The same for what `rotatekv` lacks besides."""
    if not facts.cpu:
        return "no kernel of the plug-in packs its pages on a GPU; use kivi()"
    if facts.tensor > 1:
        return (
            f"it rotates and sorts the keys of several heads together, which --tensor-parallel-size {facts.tensor} "
            "takes apart; leave that out, or use kivi()"
        )
    return None


def _lacking(facts: Facts) -> str | None:
    """Why a model cannot be served, and what helps; None if it can."""
    without = "serve it without a recipe"
    if facts.attention_free:
        return f"it has no attention, hence no KV cache to compress; {without}"
    if facts.mla:
        return f"it has latent attention (MLA), whose cache is no keys and values; {without}"
    if facts.encoder:
        return f"it has an encoder, whose attention is not a decoder's; {without}"
    if facts.hybrid:
        return f"some of its layers have a state instead of keys and values; {without}"
    if facts.prefix:
        return f"its attention looks ahead within images, which no kernel of the plug-in does; {without}"
    if facts.window is not None:
        return (
            f"some of its layers have a sliding window of {facts.window} tokens, which the plug-in does not serve; "
            f"{without}, or use Fivefold in transformers"
        )
    if facts.cap is not None:
        return f"its scores are capped at {facts.cap:g}, which no kernel of the plug-in does; {without}"
    if facts.head_dim not in HEAD_DIMS:
        return f"its head_dim {facts.head_dim} is none of 64, 128, 256; {without}, or use Fivefold in transformers"
    if facts.query_heads // max(1, facts.kv_heads) > 16:
        return f"{facts.query_heads // facts.kv_heads} query heads share a KV head, more than 16; {without}"
    kinds = DTYPES if facts.cpu else (torch.bfloat16, torch.float16)
    if facts.dtype not in kinds:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        return f"its dtype {str(facts.dtype).removeprefix('torch.')} is none of {names}; add --dtype bfloat16"
    if facts.cache_dtype != "auto":
        return f"--kv-cache-dtype {facts.cache_dtype} packs the cache too; leave it out"
    if facts.block_size is not None:
        return f"blocks are as large as the recipe's pages; leave --block-size {facts.block_size} out"
    if facts.connector is not None:
        return (
            f"the KV connector {facts.connector} does not carry packed blocks; use "
            "--kv-offloading-size with vLLM {}.{} or later, or leave it out".format(*OFFLOADING)
        )
    if facts.one_group:
        return (
            "exact and packed tokens need vLLM's hybrid KV cache manager, which --disable-hybrid-kv-cache-manager "
            "turns off; leave that out"
        )
    if facts.microbatches:
        return "two micro-batches at a time are not served; leave --enable-dbo out"
    if facts.speculation is not None:
        return f"speculation ({facts.speculation}) takes tokens back, which packed pages cannot; leave it out"
    if facts.pipeline > 1:
        return f"pipeline parallel ({facts.pipeline}) is not served; use --tensor-parallel-size instead"
    if facts.context_parallel > 1:
        return f"context parallel ({facts.context_parallel}) is not served; use --tensor-parallel-size instead"
    return None
