"""A whole decoding step of a model as one CUDA graph: no launch gaps.

With `compress(..., cuda_graph=True)` the model's `forward` (`models/forward.py`) replays the step where it can, and
calls the model where it cannot: a chunk of several tokens, arguments that a graph does not know, layers whose steps
depend on the host (see `Step.why_not`). Before each replay the cache's page tables are brought up to date on the host
and sent to fixed places on the device (`attention/tables.py`); after it, the policies move what is due, as ever.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fivefold.attention.tables import DeviceTables, tables_of
from fivefold.engine.session import Session
from fivefold.errors import FivefoldError
from fivefold.kernels.choice import choose

_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep",
}  # fmt: skip
_WARM_UP = 2


class SteppedCache(Protocol):
    session: Session


class Step:
    """The decoding step of one cache: captured when the first token comes, and again when its tables are full."""

    def __init__(self) -> None:
        self.tables: list[DeviceTables] = []
        self.captures = 0
        self.replays = 0
        self.failed: str | None = None
        self._graph: Any = None
        self._logits: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        self._model: PreTrainedModel | None = None
        self._weights: list[tuple[torch.Tensor, int]] = []
        self._held = 0

    def reset(self) -> None:
        """Give the graph's memory back."""
        self._graph = self._logits = self._ids = self._positions = self._model = None
        self.tables, self._weights, self._held = [], [], 0

    @property
    def nbytes(self) -> int:
        """Bytes of what the graph holds: its inputs, and the memory it was captured in."""
        inputs = [x for x in (self._ids, self._positions) if x is not None]
        return self._held + sum(x.nbytes for x in inputs)

    def __call__(
        self, model: PreTrainedModel, forward: Callable[..., Any], cache: SteppedCache, given: dict[str, Any]
    ) -> CausalLMOutputWithPast | None:
        """One token for every sequence; None if it has to go through the model."""
        session, ids = cache.session, given.get("input_ids")
        if self.failed or ids is None or ids.ndim != 2 or ids.shape[1] != 1 or not _plain(given):
            return None
        if torch.is_grad_enabled() or session.length == 0:
            return None
        self.failed = self.why_not(session)
        if self.failed:
            warnings.warn(f"decoding without a CUDA graph: {self.failed}", stacklevel=5)
            self.reset()
            return None
        if ids.device != session.devices[0]:
            return None
        try:
            with session.atomic():
                logits = self._step(model, forward, cache, ids, given)
        except RuntimeError as error:
            if isinstance(error, FivefoldError | torch.OutOfMemoryError):
                raise
            self.failed = f"{type(error).__name__}: {error}".splitlines()[0]
            self.reset()
            warnings.warn(f"decoding without a CUDA graph: {self.failed}", stacklevel=5)
            return None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _step(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        cache: SteppedCache,
        ids: torch.Tensor,
        given: dict[str, Any],
    ) -> torch.Tensor:
        session, positions = cache.session, given.get("position_ids")
        session.admit(ids.shape[0], 1, given.get("attention_mask"), None)
        fresh = self._prepare(model, session, ids.shape[0])
        assert self._ids is not None and self._positions is not None
        self._ids.copy_(ids)
        self._positions.copy_(positions) if positions is not None else self._positions.fill_(session.length)
        if fresh:
            self._capture(forward, cache)
        return self._replay(forward, cache)

    @staticmethod
    def why_not(session: Session) -> str | None:
        """Why steps of this cache hang on the host, in a few words; None if they do not."""
        if session.companions is not None:
            return "layers with a sliding window are transformers' own"
        if len(session.devices) > 1:
            return f"its layers are on {len(session.devices)} devices"
        if session.devices[0].type == "cpu" and not choose(session.devices[0]).triton:
            return "the cache is on a CPU"
        return next((why for why in session.why_not_fused().values() if why is not None), None)

    def _prepare(self, model: PreTrainedModel, session: Session, batch: int) -> bool:
        """Tables and inputs at fixed places; whether they are new, and a graph must be captured."""
        tables = [tables_of(bank) for bank in session.banks]
        valid = (
            self.tables == tables
            and self._model is model
            and all(weight.data_ptr() == address for weight, address in self._weights)
        )
        if valid:
            return False
        self.reset()
        self.tables, device = tables, session.devices[0]
        with torch.inference_mode(False):
            self._ids = torch.zeros((batch, 1), dtype=torch.long, device=device)
            self._positions = torch.zeros_like(self._ids)
        self._model = model
        self._weights = [(weight, weight.data_ptr()) for weight in (*model.parameters(), *model.buffers())]
        return True

    def _capture(self, forward: Callable[..., Any], cache: SteppedCache) -> None:
        if cache.session.devices[0].type != "cuda":
            return  # in Triton's interpreter
        before = torch.cuda.memory_reserved()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # a step is the same however often it is taken
                self._run(forward, cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._run(forward, cache)
        self._graph = graph
        self._held = max(0, torch.cuda.memory_reserved() - before)
        self.captures += 1

    def _replay(self, forward: Callable[..., Any], cache: SteppedCache) -> torch.Tensor:
        self.replays += 1
        if self._graph is None:
            return self._run(forward, cache)
        self._graph.replay()
        assert self._logits is not None
        return self._logits.clone()

    def _run(self, forward: Callable[..., Any], cache: SteppedCache) -> torch.Tensor:
        cache.session.captured = True
        try:
            return forward(
                input_ids=self._ids, position_ids=self._positions, past_key_values=cache, use_cache=True
            ).logits
        finally:
            cache.session.captured = False


def _plain(given: dict[str, Any]) -> bool:
    """Whether a call asks for nothing but logits."""
    keep = given.get("logits_to_keep", 0)
    return (
        all(name in _KNOWN or value is None or value is False for name, value in given.items())
        and given.get("use_cache") is not False
        and given.get("return_dict") is not False
        and isinstance(keep, int)
    )
