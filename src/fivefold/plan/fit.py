"""What whole steps take beyond what the pieces do: the constants of `Machine` that come from timed steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fivefold.plan import memory
from fivefold.plan.machine import Machine
from fivefold.plan.shape import LayerShape, ModelShape
from fivefold.plan.time import Read, prefill, step
from fivefold.recipe import Recipe

HOST = 1.05
"""A prompt whose launches add more than this to the device's least work is bound by the host."""
FITTED = (
    "step", "word", "fused_layer", "fused_several", "layer", "pointwise", "own_layer", "own_pointwise", "packed_layer",
    "packed_row",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A decoding step that was timed. own: by the model's own code."""

    model: ModelShape
    batch: int
    reads: tuple[Read, ...]
    seconds: float
    own: bool = False

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Row:
        """A row of `measure.timed_step`."""
        reads = tuple(Read(**read) for read in row["reads"])
        return cls(llama(row["shape"]), row["batch"], reads, row["seconds"], bool(row.get("own_code")))


@dataclass(frozen=True)
class Prompt:
    """A prompt whose reading was timed; its other fields are what `time.prefill` is given. own: by the model's own
    code."""

    model: ModelShape
    tokens: int
    chunk: int | None
    packed: float
    bits: int | None
    reach: float
    split: bool
    seconds: float
    own: bool = False

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Prompt:
        """A row of `reading.timed_prompt`."""
        recipe, model, context = Recipe.parse(row["recipe"]), llama(row["shape"]), row["context"]
        bits = getattr(recipe.get("bits"), "bits", None)
        packed = row["cache_bytes"] / context if bits else 0.0
        reach, split = memory.reach_of(recipe, model, context)
        own = bool(row.get("own_code"))
        return cls(model, context, row["chunk"], packed, bits, reach, split, row["seconds"], own)

    def predicted(self, machine: Machine) -> float:
        names = ("packed", "bits", "reach", "split", "own")
        given = {name: getattr(self, name) for name in names}
        one = prefill(self.model, machine, self.tokens, chunk=self.chunk, **given)
        assert one is not None
        return one.seconds


def llama(shape: Mapping[str, Any], name: str = "llama") -> ModelShape:
    """A Llama by the arguments of its configuration, in bfloat16."""
    hidden, wide, count = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv_heads, words = shape["num_attention_heads"], shape["num_key_value_heads"], shape["vocab_size"]
    dim, tied = shape.get("head_dim") or hidden // heads, shape.get("tie_word_embeddings", False)
    layer = 2 * hidden * dim * (heads + kv_heads) + 3 * hidden * wide + 2 * hidden
    parameters = count * layer + words * hidden * (1 if tied else 2) + hidden
    return ModelShape(
        name=name,
        family="llama",
        layers=(LayerShape("full", heads, kv_heads, dim),) * count,
        hidden=hidden,
        vocabulary=words,
        parameters=parameters,
        embedding=0 if tied else words * hidden,
        weight_bytes=2 * parameters,
    )


def fit_steps(rows: Sequence[Row], machine: Machine) -> Machine:
    """The machine with those of `FITTED` that rows tell of, so that the relative errors of the rows are least; none of
    them negative. Rows that the host bounds say nothing of them."""
    rows = [row for row in rows if row.seconds > HOST * machine.waits(len(row.model.layers))] or rows
    plain = [row for row in rows if not row.own and not machine.fuses(row.batch)]
    fused = {row.batch for row in rows if not row.own and machine.fuses(row.batch)}
    told = {"fused_layer": 1 in fused, "fused_several": bool(fused - {1})}
    told |= {"layer": bool(plain), "pointwise": bool(plain)}
    told |= dict.fromkeys(("own_layer", "own_pointwise"), any(row.own for row in rows))
    names = [name for name in FITTED if told.get(name, True)]
    none: dict[str, Any] = dict.fromkeys(names, 0.0)
    bare = replace(machine, **none, host_step={})
    ones: list[dict[str, Any]] = [{name: 1.0} for name in names]
    ways = [replace(bare, **one) for one in ones]

    def seconds(row: Row, using: Machine) -> float:
        one = step(row.model, using, row.batch, row.reads, own=row.own)
        assert one is not None
        return one.seconds

    table, wanted = [], []
    for row in rows:
        known = seconds(row, bare)
        # Each constant is a factor of one term.
        table.append([(seconds(row, way) - known) / row.seconds for way in ways])
        wanted.append((row.seconds - known) / row.seconds)
    given: dict[str, Any] = dict(zip(names, least(np.array(table), np.array(wanted))))
    if not plain and given.get("own_layer"):  # no more than the model's own code takes
        given |= {"layer": given["own_layer"], "pointwise": given["own_pointwise"]}
    return replace(machine, **given)


def _idle(machine: Machine) -> Machine:
    """The machine if nobody ever waited for its host to launch a layer."""
    quick: dict[str, Any] = {
        name: {kind: [(begin, 0.0) for begin, _ in chunks] for kind, chunks in getattr(machine, name).items()}
        for name in ("host_chunk", "own_host_chunk")
    }
    return replace(machine, **quick)


def fit_prompts(rows: Sequence[Prompt], machine: Machine) -> Machine:
    """The machine with the `prompt_pointwise` and `own_prompt_pointwise` for which the relative errors of the rows are
    least. Rates of products and of attention stay as they were measured: both grow with the tokens, as what is fitted
    does, and rows of one model cannot tell them apart. Rows that the host bounds say nothing about the device."""
    for name, own in (("prompt_pointwise", False), ("own_prompt_pointwise", True)):
        least_work = replace(machine, **{name: 0.0})  # type: ignore[arg-type]
        idle = _idle(least_work)
        busy = [row for row in rows if row.own is own and row.predicted(least_work) <= HOST * row.predicted(idle)]
        if not busy:
            continue
        known, seconds = np.array([row.predicted(idle) for row in busy]), np.array([row.seconds for row in busy])
        one = replace(idle, **{name: 1.0})  # type: ignore[arg-type]
        table = np.array([row.predicted(one) for row in busy]) - known
        (moved,) = least((table / seconds)[:, None], (seconds - known) / seconds)
        machine = replace(machine, **{name: moved})  # type: ignore[arg-type]
    return machine


def fit_switch(rows: Sequence[Mapping[str, Any]], machine: Machine) -> Machine:
    """The machine with what putting caches away and bringing them back takes; rows: of `measure.switched`."""
    given: dict[str, Any] = {}
    for rate, start, name in (("to_host", "put_start", "offload_s"), ("from_host", "bring_start", "restore_s")):
        seconds = np.array([row[name] for row in rows])
        packed = np.array([row["recipe"] != "full()" for row in rows], dtype=float)
        table = np.stack([1 - packed, packed, np.array([row["bytes"] for row in rows])], 1) / seconds[:, None]
        exact, other, each = least(table, np.ones(len(rows)))
        given |= {start: {"exact": exact, "packed": other}, rate: 1 / each if each else getattr(machine, rate)}
    return replace(machine, **given)


def least(table: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Least squares without negative numbers: columns that would be negative are left out, the worst one first."""
    active = list(range(table.shape[1]))
    while active:
        scale = np.abs(table[:, active]).max(0)
        scale[scale == 0] = 1.0
        found = np.linalg.lstsq(table[:, active] / scale, wanted, rcond=None)[0] / scale
        if (found >= 0).all():
            break
        active.pop(int(np.argmin(found * scale)))
    out = [0.0] * table.shape[1]
    for column, x in zip(active, found if active else []):
        out[column] = float(x)
    return out
