"""Which attention a model uses: ours while it is called with our cache, and otherwise what its user chose.

transformers reads the name of the implementation from the configuration, in every layer and where masks are made. So
`selected` writes ours there for the time of one call, and puts the user's back. A call without our cache that another
thread makes meanwhile finds our name there: `stock_attention` and `stock_mask` then do what the user's would have done.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "fivefold"
"""Of our attention and our masks."""
_lock = threading.RLock()  # a context that Ctrl-C left behind may end, as it is collected, within another one
_here = threading.local()


def decoder_config(model: Any) -> Any:
    """The configuration of a model's decoder: its own, or that of the text part of a multimodal model."""
    return model.config.get_text_config(decoder=True)


class Remembered:
    """What `ask` says of a model's configuration, until anything in that is another: a configuration takes
    microseconds for each attribute, which a step would wait for."""

    def __init__(self, ask: Callable[[Any], Any]) -> None:
        self._ask, self._config, self._was, self._is = ask, None, dict[str, Any](), None

    def __call__(self, model: Any) -> Any:
        config = model.config
        if self._config is not config or self._was != vars(config):
            self._is = self._ask(model)
            alone = decoder_config(model) is config and not getattr(config, "is_heterogeneous", False)
            self._config, self._was = (config, dict(vars(config))) if alone else (None, {})
        return self._is


@dataclass
class _Selection:
    """config: whose implementation is another just now. before: what it was. users: calls that want it so."""

    config: Any
    before: str
    users: int = 0


_selections: dict[int, _Selection] = {}


@contextmanager
def selected(configs: list[Any], name: str, windows: frozenset[int] = frozenset()) -> Iterator[None]:
    """Within it, models with these configurations use the implementation `name`; calls of this thread may nest.

    windows: the lengths of sliding windows that it sees to itself, without a mask.
    """
    with _lock:
        for config in configs:
            one = _selections.setdefault(id(config), _Selection(config, config._attn_implementation))
            one.users += 1
            config._attn_implementation = name
    before = getattr(_here, "name", None), windows_here()
    _here.name, _here.windows = name, windows
    try:
        yield
    finally:
        _here.name, _here.windows = before
        with _lock:
            for config in configs:
                one = _selections[id(config)]
                one.users -= 1
                if not one.users:
                    del _selections[id(config)]
                    config._attn_implementation = one.before


def is_selected(name: str) -> bool:
    """Whether this thread is in a call for which `name` was selected."""
    return getattr(_here, "name", None) == name


def windows_here() -> frozenset[int]:
    """The `windows` of the call that this thread is in."""
    return getattr(_here, "windows", frozenset())


def implementation(config: Any) -> str:
    """The attention that the user of a model chose."""
    found = _selections.get(id(config))
    name = config._attn_implementation if found is None else found.before
    return name or "sdpa"


def stock_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """What a module would have called without us, with a mask of `stock_mask`."""
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", sdpa_attention_forward)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation(module.config), eager)
    return function(module, query, key, value, attention_mask, **kwargs)


def stock_mask(config: Any, **kwargs: Any) -> Any:
    """What would have made a mask without us; None where an implementation wants none."""
    name = implementation(config)
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[name](config=config, **kwargs)
