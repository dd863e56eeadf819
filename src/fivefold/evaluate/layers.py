"""Which layer breaks first: how far each layer's attention output is from the exact cache's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from fivefold.evaluate.divergence import kl
from fivefold.models.huggingface import attention_modules


@dataclass(frozen=True)
class Trace:
    """A chunk's way through the model, layer by layer: the hidden states that enter and leave each layer and the output
    of its attention module, `[tokens, hidden]` each."""

    entering: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)
    leaving: list[torch.Tensor] = field(default_factory=list)


def trace(
    model: Any, cache: Any, tokens: torch.Tensor, entering: list[torch.Tensor] | None = None, chunk: int | None = None
) -> Trace:
    """Feed `tokens: [1, tokens]`, `chunk` at a time (None: at once), after what `cache` holds. With `entering`, each
    layer is given these hidden states instead of what the layer before it put out. The tokens are in the cache
    afterwards."""
    parts, chunk = [], chunk or tokens.shape[1]
    for start in range(0, tokens.shape[1], chunk):
        parts.append(Trace())
        given = None if entering is None else [hidden[start : start + chunk] for hidden in entering]
        with _hooks(model, parts[-1], given):
            model(tokens[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
    names = [name.name for name in fields(Trace)]
    return Trace(*([torch.cat(states) for states in zip(*(getattr(p, name) for p in parts))] for name in names))


@contextlib.contextmanager
def _hooks(model: Any, seen: Trace, entering: list[torch.Tensor] | None) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}
    handles = []
    try:
        for index, module in sorted(attention_modules(model).items()):
            block = model.get_submodule(names[module].rpartition(".")[0])

            def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                if entering is not None:
                    hidden = entering[index][None]
                    args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
                seen.entering.append(hidden[0])
                return args, kwargs

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            for place, into in ((module, seen.attention), (block, seen.leaving)):

                def after(_: Any, args: Any, output: Any, into: list[torch.Tensor] = into) -> None:
                    into.append((output[0] if isinstance(output, tuple) else output)[0])

                handles.append(place.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def errors(exact: Trace, own: Trace, carried: Trace) -> list[dict[str, float]]:
    """Of each layer, the relative error |output - exact| / |exact| of its attention, over all tokens.

    own: the layer was given the exact hidden states, so that only what its own cache lost counts. carried: as the
    model runs, with the errors of all layers before it.
    """
    return [
        {"own": _relative(own.attention[at], wanted), "carried": _relative(carried.attention[at], wanted)}
        for at, wanted in enumerate(exact.attention)
    ]


def _relative(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((given.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-30))


def lens(model: Any, exact: Trace, other: Trace) -> list[float]:
    """KL divergence (nats, mean over tokens) of what the residual stream behind each layer says about the next token.

    The logit lens: the model's final norm and output embeddings on each layer's hidden states (nostalgebraist, 2020).
    """
    base, head = model.base_model, model.get_output_embeddings()
    norm = base.norm if hasattr(base, "norm") else base.final_layer_norm

    def said(hidden: torch.Tensor) -> torch.Tensor:
        return head(norm(hidden[None]))[0].float().log_softmax(-1)

    found = []
    for one, two in zip(exact.leaving, other.leaving):
        found.append(float(kl(said(one), said(two)).mean()))
    return found
