"""A whole decoding step of a model as one CUDA graph: no launch gaps.

`compress(..., cuda_graph=True)` puts a `Forward` in the place of the model's `forward`. It replays the step where it
can, and calls the model where it cannot: a chunk of several tokens, arguments that a graph does not know, layers whose
steps hang on the host (see `Step.why_not`). Before each replay the caches' page tables are brought up to date on the
host and sent to fixed places on the device (`attention/fixed.py`); after it, the policies move what is due, as ever.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fivefold.attention.fixed import FixedTables
from fivefold.attention.fused import why_not
from fivefold.errors import FivefoldError

if TYPE_CHECKING:
    from fivefold.models.huggingface import FivefoldCache, _State

_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep",
}  # fmt: skip
_WARM_UP = 2


class Forward:
    """A model's `forward` that replays decoding steps of caches with a `Step`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Somebody else's, put there before.
        self.before: Callable[..., Any] | None = vars(model).get("forward")
        functools.update_wrapper(self, model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        step: Step | None = getattr(cache, "step", None)
        if step is not None and cache is not None and len(args) <= 1:
            if args:
                kwargs = {"input_ids": args[0], **kwargs}
                args = ()
            out = step(self.model, self.plain, cache, kwargs)
            if out is not None:
                return out
        return self.plain(*args, **kwargs)

    @property
    def plain(self) -> Callable[..., Any]:
        return self.before or functools.partial(type(self.model).forward, self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        twin = Forward(copy.deepcopy(self.model, memo))
        twin.before = copy.deepcopy(self.before, memo)
        return twin


def install(model: PreTrainedModel) -> None:
    """Let a model's `forward` replay steps. Safe to call again."""
    if not isinstance(vars(model).get("forward"), Forward):
        model.forward = Forward(model)


def remove(model: PreTrainedModel) -> None:
    """Undo `install`."""
    mine = vars(model).get("forward")
    if isinstance(mine, Forward):
        del model.forward
        if mine.before is not None:
            model.forward = mine.before


class Step:
    """The decoding step of one cache: captured when the first token comes, and again when its tables are full."""

    def __init__(self) -> None:
        self.tables: FixedTables | None = None
        self.captures = 0
        self.replays = 0
        self.failed: str | None = None
        self._graph: Any = None
        self._logits: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None
        self._positions: torch.Tensor | None = None
        self._model: PreTrainedModel | None = None
        self._weights: list[tuple[torch.Tensor, int]] = []

    def reset(self) -> None:
        """Give the graph's memory back."""
        self._graph = self.tables = self._logits = self._ids = self._positions = self._model = None
        self._weights = []

    @property
    def nbytes(self) -> int:
        return 0 if self.tables is None else self.tables.nbytes

    def __call__(
        self, model: PreTrainedModel, forward: Callable[..., Any], cache: FivefoldCache, given: dict[str, Any]
    ) -> CausalLMOutputWithPast | None:
        """One token for every sequence; None if it has to go through the model."""
        state, ids = cache.state, given.get("input_ids")
        if self.failed or ids is None or ids.ndim != 2 or ids.shape[1] != 1 or not _plain(given):
            return None
        if torch.is_grad_enabled() or state.length == 0 or ids.device != state.device:
            return None
        state.mend()
        self.failed = self.why_not(state)
        if self.failed:
            warnings.warn(f"decoding without a CUDA graph: {self.failed}", stacklevel=4)
            self.reset()
            return None
        state.admit(ids.shape[0], 1, given.get("attention_mask"), None)
        length = state.length
        try:
            self._open(state)
            fresh = self._prepare(model, state, ids.shape[0])
            assert self.tables is not None and self._ids is not None and self._positions is not None
            self.tables.update()
            self._ids.copy_(ids)
            positions = given.get("position_ids")
            self._positions.copy_(positions) if positions is not None else self._positions.fill_(length)
            if fresh:
                self._capture(model, forward, cache)
            logits = self._replay(forward, cache)
        except BaseException as error:
            state.mend(length)
            if not isinstance(error, RuntimeError) or isinstance(error, FivefoldError | torch.OutOfMemoryError):
                raise
            self.failed = f"{type(error).__name__}: {error}".splitlines()[0]
            self.reset()
            warnings.warn(f"decoding without a CUDA graph: {self.failed}", stacklevel=4)
            return None
        state.settle(state.horizon)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    @staticmethod
    def why_not(state: _State) -> str | None:
        """Why steps of this cache hang on the host, in a few words; None if they do not."""
        if state.stock:
            return "layers with a sliding window are transformers' own"
        if any(role != "full" for role in state.roles.values()):
            return "what is read is picked anew in every step"
        for store in state.stores.values():
            if any(cohort.held is not None for cohort in store.cohorts):
                return "the tokens that are held are chosen in every step"
            reason = why_not(store, store.spec.device, store.spec.query_heads // store.spec.kv_heads)
            if reason is not None:
                return reason
        return None

    @staticmethod
    def _open(state: _State) -> None:
        """The token's slot in all layers, which then count it."""
        for store in state.stores.values():
            for cohort in store.cohorts:
                store.make_room(cohort)
        for index, store in state.stores.items():
            for cohort in store.cohorts:
                cohort.geometry = cohort.geometry.appended(1)
            state.logical[index] += 1

    def _prepare(self, model: PreTrainedModel, state: _State, batch: int) -> bool:
        """Tables and inputs at fixed places; whether they are new, and a graph must be captured."""
        valid = (
            self.tables is not None
            and self.tables.stores is state.stores
            and self._model is model
            and self.tables.fit()
            and all(weight.data_ptr() == address for weight, address in self._weights)
        )
        if valid:
            return False
        self.reset()
        self.tables = FixedTables(state.stores)
        with torch.inference_mode(False):
            self._ids = torch.zeros((batch, 1), dtype=torch.long, device=state.device)
            self._positions = torch.zeros_like(self._ids)
        self._model = model
        self._weights = [(weight, weight.data_ptr()) for weight in (*model.parameters(), *model.buffers())]
        return True

    def _capture(self, model: PreTrainedModel, forward: Callable[..., Any], cache: FivefoldCache) -> None:
        if cache.state.device.type != "cuda":
            return  # in Triton's interpreter
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
        self.captures += 1

    def _replay(self, forward: Callable[..., Any], cache: FivefoldCache) -> torch.Tensor:
        self.replays += 1
        if self._graph is None:
            return self._run(forward, cache)
        self._graph.replay()
        assert self._logits is not None
        return self._logits.clone()

    def _run(self, forward: Callable[..., Any], cache: FivefoldCache) -> torch.Tensor:
        cache.state.fixed = self.tables
        try:
            return forward(
                input_ids=self._ids, position_ids=self._positions, past_key_values=cache, use_cache=True
            ).logits
        finally:
            cache.state.fixed = None


def _plain(given: dict[str, Any]) -> bool:
    """Whether a call asks for nothing but logits."""
    keep = given.get("logits_to_keep", 0)
    return (
        all(name in _KNOWN or value is None or value is False for name, value in given.items())
        and given.get("use_cache") is not False
        and given.get("return_dict") is not False
        and isinstance(keep, int)
    )
