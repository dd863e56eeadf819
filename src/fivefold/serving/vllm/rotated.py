"""`rotatekv` inside vLLM: what its pages look like, and the codecs of a model's layers. It needs no vLLM.

vLLM gives attention keys after RoPE and no hidden states. The first is undone by position, which is a page's number in
the text; the second is what attention sinks are found in, so there are none (`sinks=0`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fivefold.kernels.packed_decode import Form
from fivefold.kernels.planar import PLANES
from fivefold.methods import channels_of
from fivefold.methods.bits.rotatekv import RotateCodec, RotateKV


@dataclass(frozen=True, eq=True)
class RotatedForm(Form):
    """What vLLM's blocks have to know of a page, as of one of `kivi`; but a record is the fields of `RotateCodec`, of
    one head, without sinks. channels: that share a scale, of keys too."""

    @classmethod
    def of(cls, method: RotateKV, head_dim: int) -> RotatedForm:
        return cls(method.bits, RotateCodec.group, channels_of(method, method.group, head_dim), head_dim)

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * 2 for _, shape, _ in self.parts)

    @property
    def parts(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of each."""
        scales = (PLANES[self.bits], self.head_dim // self.channels, 32)
        out: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for side, words in (("key", (self.head_dim, 32)), ("value", (32, self.head_dim))):
            out.append((f"{side}_words", words, torch.int16))
            out += [(f"{side}_{part}", scales, torch.float16) for part in ("scale", "zero")]
        return out

    def read(self, records: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fields of records int8 `[..., nbytes]`."""
        out: dict[str, torch.Tensor] = {}
        start = 0
        for name, shape, dtype in self.parts:
            size = torch.Size(shape).numel() * 2
            out[name] = records[..., start : start + size].contiguous().view(dtype).unflatten(-1, shape)
            start += size
        return out

    def records(self, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """The other way round: int8 `[pages, nbytes]` of fields `[pages, *shape]`."""
        parts = [fields[name].to(dtype).contiguous() for name, _, dtype in self.parts]
        return torch.cat([x.flatten(1).view(torch.int8) for x in parts], 1)


def codecs_of(method: RotateKV, model: str, dtype: torch.dtype, **loading: Any) -> list[RotateCodec]:
    """The codec of every layer of a model, whose weights are not looked at. loading: what transformers wants to know to
    load its configuration. Raises one sentence if a layer cannot be served, or where nothing was learned of the model.
    """
    from fivefold.models.outline import first_layer

    first, layers = first_layer(model, **loading)
    made: list[RotateCodec] = []
    for layer in range(layers):
        codec = method.codec(replace(first, layer=layer, dtype=dtype))
        assert isinstance(codec, RotateCodec)
        made.append(codec)
    return made
