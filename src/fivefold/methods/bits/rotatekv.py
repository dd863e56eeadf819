"""RotateKV: keys before RoPE and values, rotated by Hadamard matrices so that no channel stands out, then quantised."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from fivefold.calibrate.learner import Capture, Learner, Progress
from fivefold.calibrate.profile import Profile
from fivefold.errors import RecipeError
from fivefold.kernels.choice import takes_cpp
from fivefold.kernels.hadamard import exists, transform
from fivefold.kernels.pack import fill_rows
from fivefold.kernels.packed_decode import decode_values
from fivefold.kernels.planar import PLANES, pack, planar_output, quantise
from fivefold.kernels.rotated import rotated_columns, rotated_scores
from fivefold.kernels.rotated_decode import Rotated
from fivefold.kernels.shared import shared
from fivefold.methods import FLOAT16_MAX, Method, channels_of, check_finite, param, register
from fivefold.methods.before_rope import BeforeRope, LearnedCodec, stack
from fivefold.store import Context, Field, LayerSpec, PageLayout
from fivefold.store.codec import planar_fields, planar_parts


@register(
    slot="bits",
    name="rotatekv",
    paper="Su et al., RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive "
    "Rotations, IJCAI 2025 (arXiv:2501.16383)",
)
@dataclass(frozen=True)
class RotateKV(Method):
    """Keys before RoPE times an orthonormal Hadamard matrix over `head_group` heads together, values over each head;
    then min-max quantisation per token in groups of channels, with clipping (section 3).

    The channels of a pair that RoPE turns stand side by side when they are rotated, and not in their usual order; a
    Hadamard matrix with its rows in another order is one still. Which rotated channels share a scale is calibrated:
    they are sorted by their sum over a text, so that channels of like size stand together ("outlier-aware"; as the
    official code does it, which reorders what it has rotated). Sorting needs only the mean of each channel, whose
    rotation is known for any subset of heads. On read the rotation is undone, then RoPE applied; that of values is
    undone on the weighted sum, so that the model's weights stay as they are. Powers of two are not needed: 3 heads of
    64 channels have a Hadamard matrix of order 192.

    Attention sinks are found by massive activations: the (up to `sinks`) tokens of a sequence's first chunk that hold
    the largest of the 20 largest entries of a layer's input, as the official code does (which keeps all of up to 20).
    They are kept exact.

    `clip` shrinks each group's range about its middle; the official code multiplies both ends, which for groups that
    lie on one side of zero, as sorted channels do, cuts one end and widens the other. Zero points are float16 minima,
    there rounded to whole steps.

    Bytes per packed token of one head, of head_dim d, keys and values: `2 * d * 16 / (8 * planes)` codes, planes = 8,
    5, 4 for 2, 3, 4 bits, and `8 * d / group` scales and zero points: as many as KIVI with the same group. Further
    2 * `sinks` bytes a page, and `(2 d * itemsize + 8) * sinks` a head.
    """

    captures: ClassVar[tuple[Capture, ...]] = ("keys",)

    bits: int = param(2, "bits a number", choices=(2, 3, 4), by_layer=True, exact=16)
    group: int = param(32, "channels that share a scale", choices=(32, 64, 128), by_layer=True)
    head_group: int = param(4, "heads whose keys are rotated together, at most", low=1)
    clip: float | None = param(
        None, "part of a group's range that is covered; 0.8 for 2 bits, else 1", low=0.1, high=1, by_layer=True
    )
    sinks: int = param(4, "attention sinks that stay exact, at most", low=0, high=20, by_layer=True)
    residual: int = param(64, "recent tokens that stay exact", low=0, by_layer=True)
    profile: str | None = param(None, "folder of a profile, if not the one that ships for the model")

    @property
    def exact_tokens(self) -> int:
        return self.residual

    @property
    def covered(self) -> float:
        return self.clip if self.clip is not None else 0.8 if self.bits == 2 else 1.0

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        return RotateLearner(specs)

    def codec(self, spec: LayerSpec) -> RotateCodec:
        if spec.rope is None:
            raise RecipeError(f"rotatekv() stores keys as they are before RoPE, and {spec.no_rope}: use kivi().")
        if not exists(spec.head_dim):
            raise RecipeError(
                f"rotatekv(group={self.group}) cannot rotate heads of {spec.head_dim} channels: use kivi() for this "
                "model."
            )
        missing = (
            f"rotatekv() has learned nothing of this model ({spec.model}): run fivefold calibrate --recipe "
            "'rotatekv()', and give the folder as rotatekv(profile=...)."
        )

        def blank() -> dict[str, Any]:
            return {"layers": list(range(spec.layers)), "key_mean": spec.blank(spec.layers, spec.channels)}

        return RotateCodec(self, spec, self.profile_for(spec, self.profile, missing, blank))


class RotateLearner(Learner):
    """The profile holds `key_mean` float32 [layer, kv_heads * head_dim]: the mean key before RoPE."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        super().__init__()
        self.layers = [spec.layer for spec in specs]

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        keys = captured["keys"].double()
        self.add(f"keys.{layer}", keys.sum((0, 2)).flatten())
        self.add(f"tokens.{layer}", torch.tensor(float(keys.shape[0] * keys.shape[2]), dtype=torch.float64))

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        means = [(self.sums[f"keys.{layer}"] / self.sums[f"tokens.{layer}"]).float() for layer in self.layers]
        return {"layers": self.layers}, {"key_mean": torch.stack(means)}


def rotate(keys: torch.Tensor, together: int, block: int, back: bool = False) -> torch.Tensor:
    """Keys `[..., together * head_dim]`, `block` heads at a time times a Hadamard matrix."""
    return transform(keys.unflatten(-1, (together // block, -1)), back).flatten(-2)


def heads_together(heads: int, head_group: int, head_dim: int) -> int:
    """How many of `heads` heads are rotated together: at most `head_group`, a divisor, an order that has a matrix."""
    possible = [n for n in range(1, min(head_group, heads) + 1) if heads % n == 0 and exists(n * head_dim)]
    return max(possible)


@shared(128)
def order_of(mean: torch.Tensor, layer: int, channels: tuple[int, ...], heads: int, block: int) -> torch.Tensor:
    """The order of rotated channels by their mean: int64 `[channels]`."""
    return rotate(mean[layer, list(channels)].double(), heads, block).argsort(stable=True)


def massive(inputs: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens of a layer's input `[sequences, token, hidden]` that hold the largest of its 20 largest entries: int64
    `[sequences, count]`, the largest first, -1 where there are fewer."""
    out = inputs.new_full((len(inputs), count), -1, dtype=torch.int64)
    peaks = inputs.abs().flatten(1).topk(min(20, inputs[0].numel()), 1).indices // inputs.shape[2]
    for row, tokens in enumerate([] if peaks.is_meta else peaks.tolist()):
        found = list(dict.fromkeys(tokens))[:count]
        out[row, : len(found)] = torch.tensor(found)
    return out


class RotateCodec(LearnedCodec):
    """Planar pages (see `kernels/planar`) of rotated keys and values.

    Fields, d = head_dim, P = planes: key_words, value_words int16 [32, d]; key_scale, key_zero, value_scale, value_zero
    float16 [P, d / group, 32]; sinks int16 [sinks], the slots of exact tokens, -1 for none. A head's key words hold an
    equal share of the rotated channels of all heads that are together; its scales an equal share of the groups, which
    are made of channels of all of them.
    """

    group = 32

    def __init__(self, method: RotateKV, spec: LayerSpec, profile: Profile) -> None:
        assert spec.rope is not None
        self.method, self.spec, self.profile, self.rope = method, spec, profile, spec.rope
        self.planes, self.channels = PLANES[method.bits], channels_of(method, method.group, spec.head_dim)
        dim = spec.head_dim
        grouped = (self.planes, dim // self.channels, 32)
        fields = [*planar_fields("key", (dim, 32), grouped), *planar_fields("value", (32, dim), grouped)]
        if method.sinks:
            fields.append(Field("sinks", (method.sinks,), torch.int16, "other"))
        self.layout = PageLayout(f"rotatekv{method.bits}", self.planes * 32, tuple(fields))
        self.made = {}
        self._readers: dict[tuple[int, ...], Rotated] = {}

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        # A rotation of n channels makes numbers at most sqrt(n) times as large.
        limit = FLOAT16_MAX / (self.spec.kv_heads * self.spec.head_dim) ** 0.5
        check_finite(keys, values, limit)

    @property
    def reader(self) -> Rotated:
        return self.reader_of(tuple(range(self.spec.kv_heads)))

    def reader_of(self, heads: tuple[int, ...]) -> Rotated:
        if heads not in self._readers:
            count, dim, device = len(heads), self.spec.head_dim, self.spec.device
            places = self.order_of(heads, count).to(device).argsort().to(torch.int32)
            shape = self.method.bits, self.channels, dim, count, self.block(count), self.method.sinks
            self._readers[heads] = Rotated(*shape, places, self.rope.inv_freq, self.rope.neighbours)
        return self._readers[heads]

    def learn(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if not self.method.sinks:
            return {}
        where = massive(inputs.float(), self.method.sinks).repeat_interleave(len(keys) // len(inputs), 0)
        index = where.clamp(min=0)[:, :, None].expand(-1, -1, keys.shape[2])
        absent = (where < 0)[:, :, None]  # equal to no key
        return {
            "sink_keys": keys.gather(1, index).masked_fill(absent, float("nan")),
            "sink_values": values.gather(1, index),
        }

    def orders(self, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of rotated channels, and where in it each of them is: int64 `[groups or 1, n]`."""
        groups = tuple(context.groups)
        if groups not in self.made:
            order = torch.stack([self.order_of(heads, context.together) for heads in groups]).to(self.spec.device)
            self.made[groups] = [order, order.argsort(1)]
        order, places = self.made[groups]
        return order, places

    def order_of(self, heads: tuple[int, ...], together: int) -> torch.Tensor:
        """The order of the rotated channels of these heads: int64 `[channels]`."""
        layer, mean = self.profile.settings["layers"].index(self.spec.layer), self.profile.tensors["key_mean"]
        channels = (torch.tensor(heads)[:, None] * self.spec.head_dim + self.rope.order).flatten().tolist()
        return order_of(mean, layer, tuple(channels), together, self.block(together))

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(x.nbytes for reader in self._readers.values() for x in reader.constants)

    def forget(self) -> None:
        super().forget()
        self._readers.clear()

    def block(self, heads: int) -> int:
        return heads_together(heads, self.method.head_group, self.spec.head_dim)

    @property
    def likeness(self) -> Hashable:
        method = self.method
        return self.rope, method.bits, self.channels, method.head_group, method.covered, method.sinks

    def bound(self, context: Context, layers: Sequence[RotateCodec]) -> _Bound:
        return _Bound(self, context, layers)


class _Bound(BeforeRope):
    """The codec on the pages of some rows."""

    codec: RotateCodec

    def __init__(self, codec: RotateCodec, context: Context, layers: Sequence[RotateCodec]) -> None:
        super().__init__(codec, context)
        self.layers, orders = layers, [layer.orders(context) for layer in layers]
        self.order, self._places = orders[0]
        self.found: tuple[Any, tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] | None = None
        self.block, self.planes = codec.block(context.together), codec.planes
        self.n = self.block * codec.spec.head_dim

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each of the rotated channels is, among the rows of all groups."""
        if self.context.rows == self.context.together:
            return self._places
        first = torch.arange(self.context.rows // self.context.together, device=self._places.device)[:, None]
        return self._places + first * self._places.shape[1]

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        codec, context, tokens = self.codec, self.context, keys.shape[1]
        codec.check(keys, values)
        together = context.together
        rotated = rotate(self.unturned(keys).flatten(2), together, self.block)
        order = stack(self.layers, tuple(context.groups), 0)  # [layers, groups or 1, n]
        order = order.expand(-1, len(rotated) // len(order), -1).flatten(0, 1)
        sorted_ = rotated.gather(2, order[:, None].expand(-1, rotated.shape[1], -1))
        key = [context.part(x.unflatten(2, (together, -1)), tokens) for x in self._quantise(sorted_)]
        # A view of pages would be multiplied otherwise, and rounded so: pages must not depend on where tokens lay.
        value = self._quantise(transform(values.float().contiguous()))
        out: dict[str, torch.Tensor] = {}
        for name, (words, scale, zero) in (("key", key), ("value", value)):
            stored, old = f"{name}_words", None
            if opened is not None:
                old = opened[stored].transpose(1, 2) if name == "key" else opened[stored]
            made = pack(words, codec.method.bits, slot // 32, old)
            out[stored] = made.transpose(1, 2) if name == "key" else made
            for part, x in (("scale", scale), ("zero", zero)):
                new = x.unflatten(1, (-1, 32)).transpose(2, 3)
                before = None if opened is None else opened[f"{name}_{part}"]
                out[f"{name}_{part}"] = fill_rows(new, slot // 32, codec.planes, before)
        if codec.method.sinks:
            out["sinks"] = self._marks(keys, slot, None if opened is None else opened["sinks"])
        return out

    def _quantise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, the shape of x `[..., n]`, and scales and zero points `[..., n / group]`."""
        grouped = x.unflatten(-1, (-1, self.codec.channels))
        if self.codec.method.covered < 1:
            low, high = grouped.aminmax(dim=-1, keepdim=True)
            cut = (high - low) * ((1 - self.codec.method.covered) / 2)
            grouped = torch.minimum(torch.maximum(grouped, low + cut), high - cut)
        codes, scale, zero = quantise(grouped, self.codec.method.bits)
        return codes.flatten(-2), scale.squeeze(-1), zero.squeeze(-1)

    def _marks(self, keys: torch.Tensor, slot: int, opened: torch.Tensor | None) -> torch.Tensor:
        """The slots of sinks in pages whose slots from `slot` on hold `keys`: int16 `[pages, sinks]`.

        A sink is known by its key: another token, come in its place after a crop, or one that others were merged into,
        has another.
        """
        sinks = self.context.learned["sink_keys"].repeat_interleave(len(keys) // self.context.rows, 0).to(keys.dtype)
        marks = torch.full(sinks.shape[:2], -1, dtype=torch.int16, device=keys.device)
        if opened is not None:
            marks = torch.where(opened < slot, opened, marks)
        page, token, sink = (keys[:, :, None, 0] == sinks[:, None, :, 0]).nonzero().unbind(1)
        if not len(page):
            return marks
        same = (keys[page, token] == sinks[page, sink]).all(1)
        marks[page[same], sink[same]] = (token[same] + slot).to(torch.int16)
        return marks

    def _sinks(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """(row, slot, sink) of all exact tokens, slots counted over a row's pages; None if there are none."""
        if not self.codec.method.sinks:
            return None
        if self.found is None or self.found[0] is not fields:  # a step asks for the same pages twice
            marks = fields["sinks"].reshape(self.context.rows, -1, self.codec.method.sinks)
            row, page, sink = (marks >= 0).nonzero().unbind(1)
            self.found = fields, (row, page * self.layout.tokens + marks[row, page, sink], sink) if len(row) else None
        return self.found[1]

    def arranged(self, fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        codec, words, together = self.codec, fields["key_words"], self.context.together
        dim, row = words.shape[-2:]
        pages = words.numel() // (self.context.rows * dim * row)
        words = words.reshape(-1, together, pages, dim, row).transpose(2, 3).contiguous().flatten(1, 2)
        parts = {"words": words}
        for name in ("scale", "zero"):
            x = fields[f"key_{name}"].reshape(-1, together, pages, codec.planes, dim // codec.channels, row)
            parts[name] = x.permute(0, 1, 4, 3, 2, 5).flatten(0, 2).float()
        return parts

    def before(self, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return rotated_columns(**parts, places=self.places.flatten(), n=self.n, bits=self.codec.method.bits)

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        context, codec = self.context, self.codec
        keys = self.keys(fields)
        keys = keys.reshape(context.rows, -1, keys.shape[2])
        values = decode_values(*planar_parts("value", fields), codec.method.bits)
        whole = transform(values, back=True).reshape(keys.shape)
        sinks = self._sinks(fields)
        if sinks is not None:
            row, slot, sink = sinks
            keys[row, slot] = context.learned["sink_keys"][row, sink].float()
            whole[row, slot] = context.learned["sink_values"][row, sink].float()
        shape = (-1, self.layout.tokens, keys.shape[2])
        return keys.reshape(shape), whole.reshape(shape)

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        if takes_cpp(queries):
            cos_sin = self.rope.cos_sin_of(self.context, fields["key_words"].shape[1], self.planes)
            paired, parts = self.rope.pair(queries.float()), planar_parts("key", fields)
            out = rotated_scores(paired, *parts, self.order, self.n, cos_sin, self.codec.method.bits)
        else:
            out = super().scores(queries, fields)
        sinks = self._sinks(fields)
        if sinks is not None:
            row, slot, sink = sinks
            exact = self.context.learned["sink_keys"][row, sink].float()
            out[row, :, slot] = (queries[row].float() @ exact[:, :, None])[..., 0]
        return out

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        sinks, exact = self._sinks(fields), None
        if sinks is not None:
            row, slot, sink = sinks
            exact = weights[row, :, slot][..., None] * self.context.learned["sink_values"][row, sink, None].float()
            weights = weights.clone()
            weights[row, :, slot] = 0
        out = planar_output(weights, *planar_parts("value", fields), self.codec.method.bits)
        out = transform(out, back=True)
        return out if exact is None else out.index_add_(0, row, exact)
