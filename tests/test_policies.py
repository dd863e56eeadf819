"""What token policies choose, against whole attention matrices in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fivefold.methods import find
from policies import NearTie, PlainCache, Run

pytestmark = pytest.mark.usefixtures("one_thread")
DIM = 8
POLICIES = {
    "h2o": {"keep": 0.3},
    "snapkv": {"keep": 0.4, "window": 5, "kernel": 3},
    "keyformer": {"keep": 0.5, "steps": 6},
    "d2o": {"keep": 0.4},
    "elastic": {"keep": 0.5, "offset": 6},
}


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.slow
def test_the_engine_keeps_what_whole_matrices_would(name: str, data: st.DataObject) -> None:
    kv_heads, group, layers = (
        data.draw(st.integers(1, n), label=label) for n, label in ((3, "kv"), (3, "group"), (2, "l"))
    )
    batch = data.draw(st.integers(1, 2), label="batch")
    changes = data.draw(
        st.sampled_from([{}, {"keep": 0.7}, {"keep": 0.15}, {"floor": 9}, {"floor": 25}]), label="changes"
    )
    policy = find(name)(**{**POLICIES[name], **changes})
    # A text may come token by token from its beginning.
    singly = data.draw(st.sampled_from([0, 0, 0, 1, 7, 35]), label="singly")
    chunks = data.draw(st.lists(st.integers(2, 60), min_size=0 if singly else 1, max_size=3), label="chunks")
    steps = data.draw(st.integers(0, 12), label="steps")
    padding = [
        data.draw(st.integers(0, chunks[0]), label="padding") if batch > 1 and not i and not singly else 0
        for i in range(batch)
    ]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20), label="seed"))
    run, plain = Run(policy, kv_heads, kv_heads * group, DIM, layers), PlainCache(policy, batch, kv_heads, layers)
    total = 0
    for number, chunk in enumerate([1] * singly + chunks + [1] * steps):
        q, k, v = (
            torch.randn(layers, batch, heads, chunk, DIM, generator=generator) * size
            for heads, size in ((kv_heads * group, 2.0), (kv_heads, 1.0), (kv_heads, 1.0))
        )
        total += chunk
        mask = torch.ones(batch, total, dtype=torch.long)
        for sequence, pad in enumerate(padding):
            mask[sequence, :pad] = 0
        tokens = [chunk - (pad if number == 0 else 0) for pad in padding]
        if number and any(padding) and any(pad == chunks[0] for pad in padding):
            break  # nothing at all of a sequence, then something: refused elsewhere
        got = run.take(q, k, v, mask if any(padding) else None)
        try:
            want = plain.take(q, k, v, tokens)
        except NearTie:
            assume(False)
        for layer in range(layers):
            for sequence, real in enumerate(tokens):
                if real:
                    close = torch.allclose(got[layer][sequence, -real:], want[layer][sequence, -real:], atol=2e-4)
                    assert close, (number, layer, sequence)
            kept = run.kept(layer)
            for row in plain.rows[layer]:
                assert kept[row.place] == sorted(row.positions), (number, layer, row.place)
    for layer, rows in enumerate(plain.rows):
        held = run.tokens(layer)
        for row in rows:
            order = sorted(range(len(row.positions)), key=lambda s: row.positions[s])
            for got_tokens, tokens_of in zip(held[row.place], (row.keys, row.values)):
                wanted = torch.tensor(np.array([tokens_of[s] for s in order]), dtype=torch.float32).view(-1, DIM)
                assert torch.allclose(got_tokens, wanted, atol=1e-4)
