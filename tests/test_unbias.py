"""What rounding adds to attention is taken off: mikv's correction, which kivi has too."""

from __future__ import annotations

import pytest
import torch

from fivefold.methods import Codec
from fivefold.methods.bits.kivi import Kivi
from fivefold.methods.bits.mikv import MiKV
from fivefold.store import LayerSpec

DIM, PAGES = 32, 40
SPEC = LayerSpec(0, 1, 2, 12, DIM, torch.float32, torch.device("cpu"))


def codec_of(name: str, unbias: bool) -> Codec:
    if name == "mikv":
        return MiKV(balance=False, unbias=unbias).codec(SPEC)
    return Kivi(unbias=unbias).codec(SPEC)


@pytest.mark.parametrize("name", ["mikv", "kivi"])
def test_coarse_tokens_draw_no_more_attention_than_they_would_exactly(name: str) -> None:
    """The mean of exp(score) over many tokens is that of the exact scores; without the correction it is larger."""
    torch.manual_seed(0)
    keys, queries = torch.randn(2, PAGES * 256, DIM), torch.randn(2, 6, DIM) * 0.5
    pages = keys.view(-1, 256, DIM)
    fields = codec_of(name, True).encode(pages, pages, 0, None)
    by_row = {part: x.unflatten(0, (2, PAGES)) for part, x in fields.items()}
    exact = (queries @ keys.transpose(1, 2)).exp().mean(-1)
    unbiased, noisy = (codec_of(name, unbias).scores(queries, by_row) for unbias in (True, False))
    assert (unbiased <= noisy).all()
    drawn = [float((x.exp().mean(-1) / exact).log().mean()) for x in (noisy, unbiased)]
    assert drawn[0] > 0.5 and abs(drawn[1]) < 0.15


def test_the_kernels_that_correct_nothing_are_not_asked() -> None:
    assert Kivi().codec(SPEC).form is not None and Kivi(unbias=True).codec(SPEC).form is None
    assert not Kivi().unbias  # as published
