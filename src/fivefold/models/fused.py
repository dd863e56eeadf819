"""The decoding step of a Llama's kind in fused kernels: few launches, every weight read once (`kernels/step`).

Such a model is known by its parts, not by its name (`parts_of`): RMSNorm, attention of plain projections with RoPE of
half heads, a gated MLP, two residuals; a norm and a head behind the layers. Whether its code does nothing else is seen
by trying: `verified` takes a step by the model's own code, and holds every layer and the head to it. What is of another
kind, or comes out otherwise, runs as its own code says.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fivefold.attention.picks import Picked
from fivefold.engine.session import Session
from fivefold.errors import FivefoldError
from fivefold.kernels.step.reference import ACTS, Biases, Norm, Pages, Turn, acted

BOUNDS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far what a layer adds, or the head's logits, may be from the model's own, in parts of their norm."""


class Unlike(Exception):
    """This model is not of the kind, in a few words."""


@dataclass(frozen=True)
class Linear:
    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Layer:
    """What a layer computes with. norms: of each head of queries and keys."""

    index: int
    before: Norm
    qkv: tuple[Linear, Linear, Linear]
    norms: tuple[Norm | None, Norm | None]
    scaling: float
    out: Linear
    behind: Norm
    gate: Linear
    up: Linear
    down: Linear
    act: str


@dataclass(frozen=True)
class Parts:
    """A whole model: embedding `[vocabulary, hidden]`, what makes cos and sin of positions, layers, norm and head."""

    embedding: torch.Tensor
    rotary: nn.Module
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear


# -- what a model is made of --------------------------------------------------------------------------------


def parts_of(model: PreTrainedModel) -> Parts:
    """The parts of a model of a Llama's kind. Raises `Unlike` if it is none, or somebody has changed how it runs."""
    untouched(model)
    base: Any = _children(model, {"model", "lm_head"})["model"]
    parts = _children(base, {"embed_tokens", "layers", "norm", "rotary_emb"})
    embedding = parts["embed_tokens"]
    if type(embedding) is not nn.Embedding:
        raise Unlike(f"the embedding is a {type(embedding).__name__}")
    layers: Any = parts["layers"]
    if len(layers) != model.config.num_hidden_layers:
        raise Unlike(f"{len(layers)} layers, of which {model.config.num_hidden_layers} run")
    each = tuple(_layer(layer) for layer in layers)
    head = _linear(model.get_submodule("lm_head"))
    found = Parts(embedding.weight, parts["rotary_emb"], each, _norm(parts["norm"]), head)
    kinds = {(weight.dtype, weight.device) for weight in model.parameters()}
    if len(kinds) > 1:
        raise Unlike("weights of several dtypes or devices")
    ((dtype, _),) = kinds
    if dtype not in BOUNDS:
        raise Unlike(f"weights in {dtype}")
    return found


def untouched(model: PreTrainedModel) -> list[int]:
    """The identities of all weights. Raises `Unlike` where somebody else's code runs in a module's place, or beside
    it."""
    if model.training:
        raise Unlike("the model is in train mode")
    weights: list[int] = []
    modules: list[nn.Module] = [model]
    for module in modules:  # every chunk asks: `Module.modules`, and its attributes, take several times as long
        known = vars(module)
        if known["_modules"]:
            modules += [one for one in known["_modules"].values() if one is not None]
        if known["_parameters"]:
            weights += map(id, known["_parameters"].values())
        for hooks in (known["_forward_hooks"], known["_forward_pre_hooks"]):
            for hook in hooks.values() if hooks else ():
                where = getattr(getattr(hook, "func", hook), "__module__", "") or ""
                # Those of transformers collect outputs that are asked for, and a step's are not.
                if not where.startswith(("fivefold.", "transformers.utils.output_capturing")):
                    raise Unlike(f"a hook of {where} on {_name(model, module)}")
        other = known.get("forward")
        if other is not None and (
            not type(other).__module__.startswith("fivefold.") or getattr(other, "before", None) is not None
        ):
            raise Unlike(f"another forward in the place of that of {_name(model, module)}")
    return weights


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module) or "the model"


def _children(module: nn.Module, names: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The modules in a module, by name: these, and no others, nor weights of its own."""
    found = dict(module.named_children())
    missing = sorted(names - found.keys())
    more = sorted(found.keys() - names - optional) + [name for name, _ in module.named_parameters(recurse=False)]
    if missing:
        raise Unlike(f"{type(module).__name__} without {missing[0]}")
    if more:
        raise Unlike(f"{type(module).__name__} with {more[0]}")
    return found


def _plain(weight: Any, what: str) -> Any:
    if type(weight.data) is not torch.Tensor or not weight.is_contiguous() or weight.data_ptr() % 16:
        raise Unlike(f"the weight of {what} is no plain tensor at a multiple of 16 bytes")
    return weight  # itself, so that nobody holds on to what it was before it is moved


def _linear(module: nn.Module) -> Linear:
    if type(module) is not nn.Linear:
        raise Unlike(f"a projection is a {type(module).__name__}")
    bias = None if module.bias is None else _plain(module.bias, "a bias")
    return Linear(_plain(module.weight, "a projection"), bias)


def _norm(module: nn.Module) -> Norm:
    names = [name for name, _ in module.named_parameters()]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if names != ["weight"] or not isinstance(eps, float) or module.weight.ndim != 1:
        raise Unlike(f"{type(module).__name__} is no RMSNorm")
    return Norm(_plain(module.weight, "a norm"), eps)


def _layer(layer: nn.Module) -> Layer:
    found = _children(layer, {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"})
    attention, mlp = found["self_attn"], found["mlp"]
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    parts = _children(attention, projections, frozenset({"q_norm", "k_norm"}))
    products = _children(mlp, {"gate_proj", "up_proj", "down_proj"}, frozenset({"act_fn"}))
    index, scaling = getattr(attention, "layer_idx", None), getattr(attention, "scaling", None)
    if not isinstance(index, int) or not isinstance(scaling, float):
        raise Unlike(f"{type(attention).__name__} does not say its number or its scaling")
    q, k = (None if name not in parts else _norm(parts[name]) for name in ("q_norm", "k_norm"))
    if (q is None) != (k is None):
        raise Unlike("a norm of queries or of keys alone")
    qkv = tuple(_linear(parts[name]) for name in ("q_proj", "k_proj", "v_proj"))
    gate, up, down = (_linear(products[name]) for name in ("gate_proj", "up_proj", "down_proj"))
    for some in (qkv, (gate, up)):
        if len({linear.bias is None for linear in some}) > 1:
            raise Unlike("some projections have a bias, others have none")
    return Layer(
        index, _norm(found["input_layernorm"]), (qkv[0], qkv[1], qkv[2]), (q, k), scaling, _linear(parts["o_proj"]),
        _norm(found["post_attention_layernorm"]), gate, up, down, _act(mlp),
    )  # fmt: skip


def _act(mlp: nn.Module) -> str:
    """Which of `ACTS` the activation of an MLP is, seen by trying it."""
    function = getattr(mlp, "act_fn", None)
    if not callable(function):
        raise Unlike(f"{type(mlp).__name__} without an activation")
    probe = torch.linspace(-6, 6, 241)
    found = function(probe)
    name = next((act for act in ACTS if torch.allclose(found, acted(probe, act), 1e-5, 1e-6)), None)
    if name is None:
        raise Unlike(f"the activation {type(function).__name__}")
    return name


# -- a step -------------------------------------------------------------------------------------------------


class Whole:
    """A step of all sequences of a cache, whose tables are up to date: see `DeviceTables.attend`."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    def __call__(self, session: Session, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits `[sequences, 1, vocabulary]`. ids, positions: `[sequences, 1]`."""
        parts = self.parts
        hidden = nn.functional.embedding(ids[:, 0], parts.embedding)
        turn = self.turn(hidden, positions)
        for layer in parts.layers:
            hidden = self.layer(session, layer, hidden, turn)
        return self.head(hidden)[:, None]

    def turn(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[sequences, head_dim]`, as the model's own module makes them."""
        made = self.parts.rotary(hidden[:, None], positions)
        cos, sin = (x.expand(len(hidden), *x.shape[1:])[:, 0].contiguous() for x in made)
        return cos, sin

    def layer(
        self, session: Session, layer: Layer, hidden: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """`[sequences, hidden]` behind a layer."""
        kernels, store = _kernels(), session.stores.get(layer.index)
        if store is not None:  # else its attention is left out
            tables, dim = store.bank.mirror, store.spec.head_dim
            spans, exact = tables.newest(store)
            weights, biases = _of(*layer.qkv)
            # Tokens that are rounded on their way into a page have a kernel of their own.
            place = Pages(spans, exact) if store.exact_pool.layout.holds is None else None
            q, k, v = kernels.heads(hidden, weights, biases, layer.before, Turn(*turn, layer.norms), place)
            new = [None if x is None else x.reshape(tables.rows, dim) for x in (k, v)]
            out = tables.attend(store, q.reshape(tables.rows, -1, dim), *new, layer.scaling)
            hidden = kernels.added(out.view(len(hidden), -1), layer.out.weight, layer.out.bias, hidden)
        (gate, up), biases = _of(layer.gate, layer.up)
        inner = kernels.gated(hidden, gate, up, biases, layer.behind, layer.act)
        return kernels.added(inner, layer.down.weight, layer.down.bias, hidden)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[sequences, vocabulary]`."""
        head = self.parts.head
        return _kernels().products(hidden, [head.weight], [head.bias], self.parts.norm)[0]


def _of(*linears: Linear) -> tuple[list[torch.Tensor], Biases]:
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


def _kernels() -> ModuleType:
    from fivefold.kernels.step import triton

    return triton


# -- whether it is right ------------------------------------------------------------------------------------


def verified(
    model: PreTrainedModel,
    session: Session,
    ids: torch.Tensor,
    positions: torch.Tensor,
    own: Callable[[], torch.Tensor],
) -> Whole | str:
    """The step of a model in fused kernels, or in a few words why there is none.

    own: takes the same step by the model's own code, and gives its logits `[sequences, 1, vocabulary]`. A step may be
    taken any number of times: it writes the same token to the same slots.
    """
    try:
        parts = parts_of(model)
        for layer in parts.layers:
            fits(session, layer)
            if layer.index in session.stores and layer.index not in session.stepping:
                raise Unlike(f"what layer {layer.index} reads is not one call of a kernel")
    except Unlike as why:
        return str(why)
    if torch.is_autocast_enabled(ids.device.type):
        return "the model is called under autocast"
    whole, seen, picks = Whole(parts), dict[int, tuple[torch.Tensor, torch.Tensor]](), list[Any]()
    tables = (bank.mirror for bank in session.banks)
    picked = next((one.picked for one in tables if one is not None and one.picked is not None), None)
    with watched(model, seen, lambda: picks.append(picked and picked.now)):
        logits = own()[:, 0]

    rest = ids, positions, seen, logits, picked, picks
    return differing(lambda: _apart(whole, session, *rest), parts.embedding.dtype) or whole


def _apart(
    whole: Whole,
    session: Session,
    ids: torch.Tensor,
    positions: torch.Tensor,
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]],
    logits: torch.Tensor,
    picked: Picked | None,
    picks: Sequence[Any],
) -> dict[str, torch.Tensor]:
    """How far each part is from the model's own code, whose layers have `seen` and left this (see `apart`). picks: what
    was picked behind each of them; whose picks differ by a rounding reads otherwise, and is right."""
    parts, live = whole.parts, session.batch  # other sequences are padding
    hidden = nn.functional.embedding(ids[:, 0], parts.embedding)
    turn = whole.turn(hidden, positions)
    far = {"the embedding": apart(hidden[:live], seen[0][0][:live], 0 * hidden[:live])}
    for number, layer in enumerate(parts.layers):
        if picked is not None and number:
            picked.now = picks[number - 1]
        given, wanted = seen[number]
        found = whole.layer(session, layer, given, turn)
        far[f"layer {layer.index}"] = apart(found[:live], wanted[:live], given[:live])
    found, wanted = whole.head(seen[len(parts.layers) - 1][1])[:live], logits[:live]
    far["the head"] = apart(found, wanted, 0 * wanted)
    return far


def differing(compare: Callable[[], dict[str, torch.Tensor]], dtype: torch.dtype) -> str | None:
    """Which part computes something else, or why that cannot be seen, in a few words; None if none does. compare: how
    far each one is (see `apart`)."""
    try:
        far = compare()
    except (torch.OutOfMemoryError, FivefoldError):
        raise
    except Exception as error:  # a rotary embedding that wants more, a shape that no kernel takes
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for name, one in zip(far, torch.stack(list(far.values())).tolist()):
        if not one <= BOUNDS[dtype]:
            return f"{name} computes something else ({one:.2g} of its norm apart)"
    return None


def fits(session: Session, layer: Layer) -> None:
    """Raise `Unlike` where a cache's layer is not made for what this one computes."""
    store = session.stores.get(layer.index)
    if store is None:
        if any(spec.layer == layer.index for spec in session.absent):
            return
        raise Unlike(f"layer {layer.index} has no store")
    spec, sizes = store.spec, [len(linear.weight) for linear in layer.qkv]
    if sizes != [n * spec.head_dim for n in (spec.query_heads, spec.kv_heads, spec.kv_heads)]:
        raise Unlike(f"projections of {sizes} rows")
    if spec.cap is not None:
        raise Unlike("scores are capped")
    if layer.before.gain.dtype is not spec.dtype:
        raise Unlike(f"weights in {layer.before.gain.dtype} and a cache in {spec.dtype}")


def apart(found: torch.Tensor, wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """How far what was found is from what is wanted, in parts of what was to be added to `given`; half a unit in the
    last place of the sum is no difference."""
    dtype, found, wanted = wanted.dtype, found.float(), wanted.float()
    rounded = torch.finfo(dtype).eps / 2 / BOUNDS[dtype] * wanted.norm()
    return (found - wanted).norm() / ((wanted - given.float()).norm() + rounded).clamp(min=1e-20)


@contextmanager
def watched(
    model: Any, seen: dict[int, tuple[torch.Tensor, torch.Tensor]], then: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Within it, what each layer is given and returns, `[tokens, hidden]` of all sequences, goes to `seen`; `then` is
    called behind each."""

    mine = threading.get_ident()

    def look(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if threading.get_ident() != mine:
            return  # of another thread's forward
        given = args[0] if args else kwargs["hidden_states"]
        returned = out[0] if isinstance(out, tuple) else out
        seen[number] = given.flatten(0, 1).clone(), returned.flatten(0, 1).clone()
        then()

    hooks = [
        layer.register_forward_hook(functools.partial(look, number), with_kwargs=True)
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
