"""What whole steps take beyond what the pieces do: the constants of `Machine` that come from timed steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fivefold.plan.machine import Machine
from fivefold.plan.shape import LayerShape, ModelShape
from fivefold.plan.time import Read, step

FITTED = ("step", "sequence", "layer", "packed_layer")


@dataclass(frozen=True)
class Row:
    """A decoding step that was timed."""

    model: ModelShape
    batch: int
    reads: tuple[Read, ...]
    seconds: float

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Row:
        """A row of `measure.timed_step`."""
        reads = tuple(Read(**read) for read in row["reads"])
        return cls(llama(row["shape"]), row["batch"], reads, row["seconds"])


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


def fit_steps(rows: Sequence[Row], machine: Machine, efficiencies: bool = False) -> Machine:
    """The machine with `FITTED`, and on demand the shares of bandwidth of attention, so that the relative errors of the
    rows are least; none of them negative."""
    none: dict[str, Any] = dict.fromkeys(FITTED, 0.0)
    bare = replace(machine, **none)
    kinds = sorted({read.pages for row in rows for read in row.reads}) if efficiencies else []
    names = [*FITTED, *kinds]
    table, wanted = [], []
    for row in rows:
        reads = row.reads if not efficiencies else tuple(replace(read, nbytes=0) for read in row.reads)
        known = step(row.model, bare, row.batch, reads)
        assert known is not None
        packing = max((read.launches for read in row.reads if read.kind == "packed"), default=0)
        line = [1.0, float(row.batch), float(len(row.model.layers)), float(packing)]
        line += [sum(read.nbytes for read in row.reads if read.pages == kind) / machine.bandwidth for kind in kinds]
        table.append([x / row.seconds for x in line])
        wanted.append((row.seconds - known.seconds) / row.seconds)
    found = dict(zip(names, least(np.array(table), np.array(wanted))))
    given: dict[str, Any] = {name: found[name] for name in FITTED}
    if efficiencies:
        # Never more than the memory can give: what is above belongs to the constants.
        given["attention"] = {**machine.attention, **{k: min(1.0, 1 / found[k]) for k in kinds if found[k] > 0}}
    return replace(machine, **given)


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
