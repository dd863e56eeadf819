"""A whole decoding step of a model as one CUDA graph: no launch gaps.

With `compress(..., cuda_graph=True)` the model's `forward` (`models/forward.py`) replays the step where it can, and
calls the model where it cannot: a chunk of several tokens, arguments that a graph does not know, layers whose steps
depend on the host (see `Step.why_not`). Before each replay the cache's page tables are brought up to date on the host
and sent to fixed places on the device (`attention/tables.py`); after it, the policies move what is due, as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fivefold.attention.tables import DeviceTables, tables_of
from fivefold.attention.watch import unsteady
from fivefold.engine import decoding
from fivefold.engine.admission import Padded
from fivefold.engine.session import Session
from fivefold.errors import CacheStateError, FivefoldError
from fivefold.interrupts import uninterrupted
from fivefold.kernels.choice import choose
from fivefold.kernels.device import Beside, no_garbage
from fivefold.models.fused import Whole, verified
from fivefold.models.selection import NAME, Remembered, selected
from fivefold.models.specs import configs_of

_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep",
}  # fmt: skip
_WARM_UP = 2
_equal: Callable[[list[torch.Tensor], list[int], list[int]], bool] | None = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", None
)
"""Where torch has it (builds with CUDA): compares the addresses of some hundred weights in a microsecond."""


class SteppedCache(Protocol):
    session: Session
    windows: frozenset[int]


@dataclass
class Captured:
    """A step of so many sequences: its tables and inputs at fixed places, and the graph. whole: the step in
    fused kernels; None if the model's own code runs. held: bytes of its memory."""

    tables: list[DeviceTables]
    ids: torch.Tensor
    positions: torch.Tensor
    whole: Whole | None = None
    graph: Any = None
    logits: torch.Tensor | None = None
    held: int = 0
    next: int = -1
    """What `positions` say of all sequences, where they say the same."""


class Step:
    """The decoding step of one cache: captured when the first token comes, and again when its tables are full.

    Where sequences come and go (`cache.join`), batches are padded to a power of two, and each size has a step of its
    own, which stays when the sequences are others.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.failed: str | None = None
        """Why the last step was none of its replays."""
        self.reserved = 0
        """How many tokens of each sequence there shall be room for at least."""
        self.fuses = True
        """Whether steps may be in fused kernels."""
        self.own: str | None = None
        """Why steps run the model's own code, and not fused kernels, in a few words; None if no step does."""
        self._tells = Remembered(_tells)
        self.reset()

    def reset(self) -> None:
        """Give the graphs' memory back."""
        self.broken = False
        """Whether a step could not be captured, so that none is any more."""
        self.captured: dict[int, Captured] = {}
        self._model: PreTrainedModel | None = None
        self._weights: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._all: list[int] = []
        self._alive: list[weakref.ref[Any]] = []
        self._moved = True
        self._next: Captured | None = None
        self._pool: Any = None
        self._beside: Beside | None = None
        """Where runs what need not wait for a step that a GPU is at work on."""
        self._ready: object = None
        self._whys: Mapping[int, str | None] = {}

    @property
    def tables(self) -> list[DeviceTables]:
        """Of all sizes."""
        return [tables for captured in self.captured.values() for tables in captured.tables]

    @property
    def nbytes(self) -> int:
        """Bytes of what the graphs hold: their inputs, the memory they were captured in, and tables that show no bank
        just now."""
        idle = sum(tables.nbytes for tables in self.tables if tables.bank.mirror is not tables)
        return idle + sum(c.held + c.ids.nbytes + c.positions.nbytes for c in self.captured.values())

    @uninterrupted
    def __call__(
        self, model: PreTrainedModel, forward: Callable[..., Any], cache: SteppedCache, given: dict[str, Any]
    ) -> CausalLMOutputWithPast | None:
        """One token for every sequence; None if it has to go through the model."""
        session, ids = cache.session, given.get("input_ids")
        uninterrupted.begin()
        if self.broken or ids is None or ids.ndim != 2 or ids.shape[1] != 1 or session.length == 0:
            return None
        why: str | None = None
        whys: Mapping[int, str | None] | None = self._whys
        if self._ready != _stamp(session):
            if unsteady(session.stores, session.revocable):
                return None  # the host plans this one
            why, whys = _unfit(session), None
            if why is None:
                whys = session.why_not_fused()
                why = _first(whys)
        if why and self.captured:
            self.reset()
        self.failed = why or why_not_now(model, given, ids, _device(session), self._tells)
        if self.failed:
            decoding.tell(session, f"decoding without a CUDA graph: {self.failed}", 6)
            return None
        try:
            early = self._early(model, forward, cache, ids, given) if whys is self._whys else None
            with session.atomic(step=True):
                logits = self._step(model, forward, cache, ids, given, whys, early)
        except RuntimeError as error:
            if isinstance(error, FivefoldError | torch.OutOfMemoryError):
                raise
            self.reset()
            self.failed, self.broken = f"{type(error).__name__}: {error}".splitlines()[0], True
            decoding.tell(session, f"decoding without a CUDA graph: {self.failed}", 6)
            return None
        try:
            self._look_ahead(session)
        except SystemExit:
            raise
        except BaseException:  # the token is stored: what fails here is done again, and said, as the next step begins
            self._ready = self._next = None
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _look_ahead(self, session: Session) -> None:
        """While the device is at work on a step: what it chose is written, and whether the next one is a graph's, if
        nothing happens in between."""
        self._ready = self._next = None
        for bank in session.banks:
            bank.flush()
        with suppress(CacheStateError):  # it is raised where it matters
            if not unsteady(session.stores, session.revocable) and _unfit(session) is None:
                self._whys = session.why_not_fused()
                if _first(self._whys) is None:
                    self._ready = _stamp(session)
                    self._next = self._early_one(session)
                    for tables in () if self._next is None else self._next.tables:
                        tables.bank.look_ahead(tables.exact_columns)  # what this step gave up is free now

    def _step(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        cache: SteppedCache,
        ids: torch.Tensor,
        given: dict[str, Any],
        whys: Mapping[int, str | None] | None,
        early: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """early: the logits, if the step is taken already (see `_early`)."""
        session, positions, batch = cache.session, given.get("position_ids"), ids.shape[0]
        assert session.change is not None
        session.change.beside = self._beside = self._beside or Beside(_device(session))
        banks = session.banks
        size, same = self._size(session, batch), self._same(model)
        captured = self.captured.get(size) if same else None
        # Other sequences may be here since: tables are found for them before anybody makes some.
        known = captured.tables if captured is not None and len(captured.tables) == len(banks) else None
        for number, bank in enumerate(banks):
            tables = bank.mirror if known is None else known[number]
            right = tables is not None and tables.sequences == size
            if not (right and ((bank.mirror is tables and tables.fit()) or tables.bind(bank))) and session.ragged:
                DeviceTables(bank, size, self.reserved)
        session.admit(batch, 1, given.get("attention_mask"), None, whys)
        if not session.stepping:
            raise Padded
        found = [tables_of(bank) for bank in banks]
        fresh = captured is None or captured.tables != found
        if fresh:
            captured = self._prepare(model, found, size, same)
        assert captured is not None
        if early is not None and captured is self._next and not fresh and all(tables.sent for tables in found):
            return early  # what was postponed is done before this is committed
        self._put(captured, session, ids, positions)
        if fresh:
            self._fuse(model, cache, captured)
            self._capture(forward, cache, captured)
            self.captured[size] = captured  # not before: what fails begins anew
        logits = self._replay(forward, cache, captured)[:batch]
        session.change.launched()
        return logits

    def _size(self, session: Session, batch: int) -> int:
        """For how many sequences the step of so many is captured."""
        if not session.ragged:
            return batch
        size, now = 1 << (batch - 1).bit_length(), getattr(session.banks[0].mirror, "sequences", 0)
        # A few sequences less, or more, are no reason to go from one to the other.
        return now if batch <= now <= 2 * size and 3 * now < 8 * batch and now in self.captured else size

    @staticmethod
    def _put(captured: Captured, session: Session, ids: torch.Tensor, positions: torch.Tensor | None) -> None:
        """Inputs to where the graph looks for them."""
        batch = len(ids)
        captured.ids[:batch].copy_(ids)
        if positions is not None:
            captured.positions[:batch].copy_(positions)
        elif captured.next != session.length:
            captured.positions.fill_(session.length)
        captured.next = -1

    def _early_one(self, session: Session) -> Captured | None:
        """What a step can be taken by before it is begun. The model's own code wants a change that is begun."""
        captured = self.captured.get(self._size(session, session.batch))
        if captured is None or (captured.graph is None and captured.whole is None):
            return None
        return captured if captured.tables == [bank.mirror for bank in session.banks] else None

    def _early(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        cache: SteppedCache,
        ids: torch.Tensor,
        given: dict[str, Any],
    ) -> torch.Tensor | None:
        """Take a step before it is begun, where all that it needs is known: the host's part is then done while a GPU is
        at work on it. It writes to slots that are nobody's until it is committed. Returns the logits, or None."""
        session, captured, positions = cache.session, self._next, given.get("position_ids")
        if captured is None or len(ids) != session.batch or session.change is not None or session.sparse:
            return None
        if given.get("attention_mask") is not None and not session.trusting:
            return None
        # All weights are looked at once it runs (`_step`). Until then it is enough that what it reads is memory still.
        if self._model is not model or (self._moved and not self._same(model)):
            return None
        for tables in captured.tables:
            tables.bank.flush()  # where that failed behind the last step
        if not all(tables.foreseen for tables in captured.tables):
            return None
        for tables in captured.tables:
            tables.send_ahead()
        self._put(captured, session, ids, positions)
        logits = self._replay(forward, cache, captured)[: len(ids)]
        if positions is None:
            captured.positions.add_(1)
            captured.next = session.length + 1
        return logits

    @staticmethod
    def why_not(session: Session) -> str | None:
        """Why steps of this cache depend on the host, in a few words; None if they do not."""
        return _unfit(session) or _first(session.why_not_fused())

    def _same(self, model: PreTrainedModel) -> bool:
        """Whether what was captured is this model with these weights."""
        if self._model is not model:
            return False
        if _equal is not None:
            return bool(_equal(self._weights, self._addresses, self._all))
        return list(map(torch.Tensor.data_ptr, self._weights)) == self._addresses

    def _freed(self, _: object) -> None:
        self._moved = True

    def _prepare(self, model: PreTrainedModel, tables: list[DeviceTables], size: int, same: bool) -> Captured:
        """Inputs at fixed places, for a graph that is yet to be captured. same: as `_same`."""
        if not same:
            self.reset()
            self._model = model
            self._weights = [*model.parameters(), *model.buffers()]
            self._addresses = [weight.data_ptr() for weight in self._weights]
            self._all = list(range(len(self._weights)))
            # A storage is told of as long as anybody has it. torch keeps its object that long, too.
            self._alive = [weakref.ref(weight.untyped_storage(), self._freed) for weight in self._weights]
            self._moved = any(ref() is None for ref in self._alive)
        self.captured.pop(size, None)  # its memory is the next one's
        with torch.inference_mode(False):
            ids = torch.zeros((size, 1), dtype=torch.long, device=tables[0].device)
            return Captured(tables, ids, torch.zeros_like(ids))

    def _fuse(self, model: PreTrainedModel, cache: SteppedCache, captured: Captured) -> None:
        """Find out whether fused kernels do what the model's own code does."""
        if not self.fuses:
            self.own = "as was asked for"
            return
        own = partial(self._run, partial(type(model).forward, model), cache, captured)
        found = verified(model, cache.session, captured.ids, captured.positions, own)
        self.own, captured.whole = (found, None) if isinstance(found, str) else (None, found)

    def _capture(self, forward: Callable[..., Any], cache: SteppedCache, captured: Captured) -> None:
        if cache.session.devices[0].type != "cuda":
            return  # in Triton's interpreter
        before = torch.cuda.memory_reserved()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):  # a step is the same however often it is taken
                self._run(forward, cache, captured)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if not any(one.graph for one in self.captured.values()):
            self._pool = torch.cuda.graph_pool_handle()  # a pool goes with the last of its graphs
        # One graph runs at a time, and what it returns is copied at once: so all can use the same memory.
        with no_garbage(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            captured.logits = self._run(forward, cache, captured)
        captured.graph = graph
        captured.held = max(0, torch.cuda.memory_reserved() - before)
        self.captures += 1

    def _replay(self, forward: Callable[..., Any], cache: SteppedCache, captured: Captured) -> torch.Tensor:
        self.replays += 1
        if captured.graph is None:
            return self._run(forward, cache, captured)
        if self._beside is not None:
            self._beside.mark()
        captured.graph.replay()
        assert captured.logits is not None
        return captured.logits.clone()

    def _run(self, forward: Callable[..., Any], cache: SteppedCache, captured: Captured) -> torch.Tensor:
        cache.session.captured = True
        try:
            if captured.whole is not None:
                logits = captured.whole(cache.session, captured.ids, captured.positions)
            else:
                assert self._model is not None
                given = {"input_ids": captured.ids, "position_ids": captured.positions, "past_key_values": cache}
                with selected(configs_of(self._model), NAME, cache.windows):
                    logits = forward(**given, use_cache=True).logits
            for tables in captured.tables:
                tables.join()
            return logits
        finally:
            cache.session.captured = False


def _unfit(session: Session) -> str | None:
    """Why no step of such a session is a graph, whatever its layers hold, in a few words; None if one may be."""
    if session.companions is not None:
        return "layers with a sliding window are transformers' own"
    if len(session.devices) > 1:
        return f"its layers are on {len(session.devices)} devices"
    if session.devices[0].type == "cpu" and not choose(session.devices[0]).triton:
        return "the cache is on a CPU"
    return None


def _device(session: Session) -> torch.device:
    return session.stores[session.first].spec.device


def _stamp(session: Session) -> object:
    """What is found out about a session's next step stands while this is the same."""
    return session.turn, session.recording, choose(_device(session))


def _first(whys: Mapping[int, str | None]) -> str | None:
    """Why the first layer is no kernel's that is not."""
    return next((why for why in whys.values() if why is not None), None)


def _tells(model: PreTrainedModel) -> bool:
    """Whether the model's configuration asks for hidden states or attentions."""
    return any(getattr(model.config, name, False) for name in ("output_hidden_states", "output_attentions"))


def why_not_now(
    model: PreTrainedModel,
    given: dict[str, Any],
    ids: torch.Tensor,
    device: torch.device,
    tells: Callable[[PreTrainedModel], bool] = _tells,
) -> str | None:
    """Why this call cannot be replayed, in a few words; None if it can."""
    if tells(model):
        return "the model's configuration asks for hidden states or attentions, which a replay does not know"
    mask, more = given.get("attention_mask"), [name for name, x in given.items() if name not in _KNOWN]
    asked = [name for name in more if given[name] is not None and given[name] is not False]
    if asked:
        return f"the call has {asked[0]}, which a replay does not know"
    if given.get("use_cache") is False or given.get("return_dict") is False:
        return "the call wants its output in another form"
    if not isinstance(given.get("logits_to_keep", 0), int) or (mask is not None and mask.ndim != 2):
        return "the call has a mask or logits_to_keep of another form"
    if torch.is_grad_enabled():
        return "gradients are on (call the model under torch.inference_mode())"
    return None if ids.device == device else f"input_ids are on {ids.device}, and the cache is on {device}"
