"""Kernels in Triton that are launched before the one in front of them is done (programmatic dependent launch), in the
interpreter: none reads what is not there yet, or writes or ends too early."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fivefold.kernels.packed_decode import Form

if torch.cuda.is_available():
    pytest.skip("the kernels are compiled for the GPU here", allow_module_level=True)
pytest.importorskip("triton", reason="needs Triton")
import triton.language as tl
from triton.runtime import interpreter

import test_directions
import test_low_rank
import test_packed_decode

MODULES = [
    importlib.import_module(f"fivefold.kernels.{name}.triton") for name in ("packed_decode", "directions", "low_rank")
]
kernel = MODULES[0]
pytestmark = pytest.mark.usefixtures("one_thread")


class Chain:
    """Kernels one behind the other, as early as they may be. A program that has not waited finds in what the kernel in
    front of it left, and as long as that is not done in what is in front of all (`written`), what is not a number."""

    def __init__(self, written: torch.Tensor) -> None:
        self.left, self.names = [(written, written.clone())], []
        self.front = self.left[:]  # until it is known to be done
        self.lets = False  # whether that is known where the next kernel begins, if that is launched early
        self.given: list[torch.Tensor] = []

    def kernel(self, executor: Any, call: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.early = kwargs.get("launch_pdl", False)
        self.names += [executor.fn.__name__] * self.early
        self.knows, self.lets = self.lets or not self.early, True
        self.given = list({x.data_ptr(): x for x in args if isinstance(x, torch.Tensor) and x.dim()}.values())
        before, self.open, self.programs = [x.clone() for x in self.given], False, 0
        call(executor, *args, **kwargs)
        self.end()
        self.left = [(x, x.clone()) for x, y in zip(self.given, before) if not same(x, y)]
        assert self.left and self.programs

    def begin(self) -> None:
        self.end()
        self.open, self.waited = True, not self.early
        self.programs += 1
        self.own = [x.clone() for x in self.given]
        if self.early:
            late = self.left if self.knows else [*self.front, *self.left]
            for x, _ in late:
                x.fill_(torch.nan)
            self.late = late

    def end(self) -> None:
        if self.open:
            assert self.waited, "a program has ended without waiting"

    def wait(self) -> None:
        assert self.early
        if not self.waited:
            for x, there in self.late:
                x.copy_(there)
            assert all(same(x, y) for x, y in zip(self.given, self.own)), "a program has written before it waited"
        self.waited = True

    def let(self) -> None:
        self.lets &= self.knows or self.waited


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Chain]]:
    """What `decode` launches, as in a captured step on a GPU that can launch kernels early."""
    found: list[Chain] = []
    decode, call, begin = kernel.decode, interpreter.GridExecutor.__call__, interpreter.interpreter_builder.set_grid_idx

    def chained(queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(Chain(queries))
        return decode(queries, *args, **kwargs)

    def program(*index: int) -> None:
        found[-1].begin()
        begin(*index)

    for module in MODULES:
        monkeypatch.setattr(module, "overlaps", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(kernel, "decode", chained)
    monkeypatch.setattr(
        interpreter.GridExecutor, "__call__", lambda executor, *args, **kw: found[-1].kernel(executor, call, args, kw)
    )
    monkeypatch.setattr(interpreter.interpreter_builder, "set_grid_idx", program)
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda: found[-1].wait())
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda: found[-1].let())
    # Nothing comes of what is fetched early.
    monkeypatch.setattr(tl, "inline_asm_elementwise", lambda *args, **kwargs: None)
    yield found


def test_exact_pages_and_packed_ones(chains: list[Chain]) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    form, spans = Form(2, 32, 32, 64), [(0, 224, 0, 0, 33), (0, 0, 3, 40, 64), (0, 0, 0, 0, 0)]
    for columns in (0, 1):
        test_packed_decode.check("cpu", 3, 3, form, columns, 2, [(0, columns * 224, *x[2:]) for x in spans], bound=5e-3)
    assert [chain.names for chain in chains] == [["_exact", "_combine"]] * 2


@pytest.mark.parametrize(("inner", "dtype"), [(None, torch.float16), ((2, 32), torch.float32)], ids=["as-is", "packed"])
def test_pages_of_directions(inner: Any, dtype: torch.dtype, chains: list[Chain]) -> None:
    test_directions.test_pages_of_directions_and_exact_pages("cpu", inner, 64, dtype, 2)
    assert [chain.names for chain in chains] == [["_planar" if inner else "_plain", "_exact", "_combine"]]


def test_pages_of_features(chains: list[Chain]) -> None:
    torch.manual_seed(0)
    spans = [(0, 250, 0, 0, 33, 0, 0, 70000), (0, 0, 0, 0, 1, 0, 0, 0)]
    test_low_rank.check(test_low_rank.form_of("cpu", queries=3), spans, "cpu")
    assert [chain.names for chain in chains] == [["_expand", "_exact", "_combine"]]
