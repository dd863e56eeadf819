"""Which layer breaks first: how far each layer's attention output is from the exact cache's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fivefold.evaluate.divergence import kl
from fivefold.models.huggingface import attention_modules


@dataclass(frozen=True)
class Trace:
    """The way of some tokens through the model, layer by layer: the hidden states that enter and leave each layer and
    the output of its attention module, `[sequences, tokens, hidden]` each."""

    entering: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)
    leaving: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Trace]) -> Trace:
        """Of chunks that followed each other."""
        return cls(*([torch.cat(states, 1) for states in zip(*of)] for of in zip(*(_states(part) for part in parts))))

    def of(self, row: int) -> Trace:
        """Of one sequence."""
        return Trace(*([state[row : row + 1] for state in states] for states in _states(self)))

    @classmethod
    def stacked(cls, traces: Sequence[Trace]) -> Trace:
        """Of sequences that went their way at different times."""
        return cls(*([torch.cat(states) for states in zip(*of)] for of in zip(*(_states(one) for one in traces))))


def _states(trace: Trace) -> list[list[torch.Tensor]]:
    return [trace.entering, trace.attention, trace.leaving]


def trace(
    model: Any, cache: Any, tokens: torch.Tensor, entering: list[torch.Tensor] | None = None, chunk: int | None = None
) -> Trace:
    """Feed `tokens: [sequences, tokens]`, `chunk` at a time (None: at once), after what `cache` holds. With `entering`,
    each layer is given these hidden states instead of what the layer before it put out. The tokens are in the cache
    afterwards."""
    parts, chunk = [], chunk or tokens.shape[1]
    for start in range(0, tokens.shape[1], chunk):
        given = None if entering is None else [hidden[:, start : start + chunk] for hidden in entering]
        with watched(model, given) as seen:
            model(tokens[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
        parts.append(seen)
    return Trace.joined(parts)


@contextlib.contextmanager
def watched(model: Any, entering: list[torch.Tensor] | None = None) -> Iterator[Trace]:
    """Within it, a call of the model fills what is yielded. entering: as for `trace`."""
    seen = Trace()
    names = {module: name for name, module in model.named_modules()}
    handles = []
    try:
        for index, module in sorted(attention_modules(model).items()):
            block = model.get_submodule(names[module].rpartition(".")[0])

            def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                if entering is not None:
                    hidden = entering[index]
                    args, kwargs = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
                seen.entering.append(hidden)
                return args, kwargs

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            for place, into in ((module, seen.attention), (block, seen.leaving)):

                def after(_: Any, args: Any, output: Any, into: list[torch.Tensor] = into) -> None:
                    into.append(output[0] if isinstance(output, tuple) else output)

                handles.append(place.register_forward_hook(after))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def errors(exact: Trace, own: Trace, carried: Trace) -> list[dict[str, float]]:
    """`errors_of_each` of one sequence."""
    return errors_of_each(exact, own, carried)[0]


def errors_of_each(exact: Trace, own: Trace, carried: Trace) -> list[list[dict[str, float]]]:
    """Of each sequence and layer, the relative error |output - exact| / |exact| of its attention, over all tokens.

    own: the layer was given the exact hidden states, so that only what its own cache lost counts. carried: as the
    model runs, with the errors of all layers before it.
    """
    place = exact.attention[0].device
    found = [
        torch.stack([_relative(*pair).to(place) for pair in zip(given.attention, exact.attention)], 1).tolist()
        for given in (own, carried)
    ]
    return [[{"own": one, "carried": two} for one, two in zip(*layers)] for layers in zip(*found)]


def _relative(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`[sequences]`."""
    size = wanted.float().norm(dim=(1, 2)).clamp_min(1e-30)
    return (given.float() - wanted.float()).norm(dim=(1, 2)) / size.to(given.device)


def lens(model: Any, exact: Trace, other: Trace) -> list[float]:
    """KL divergence (nats, mean over tokens) of what the residual stream behind each layer says about the next token.

    The logit lens: the model's final norm and output embeddings on each layer's hidden states (nostalgebraist, 2020).
    """
    base, head = model.base_model, model.get_output_embeddings()
    norm = base.norm if hasattr(base, "norm") else base.final_layer_norm

    def said(hidden: torch.Tensor) -> torch.Tensor:
        return head(norm(hidden)).float().log_softmax(-1)

    found = []
    for one, two in zip(exact.leaving, other.leaving):
        found.append(float(kl(said(one), said(two)).mean()))
    return found
