"""Where tokens live: pools of fixed-size pages, and the tiers of one layer that are made of them."""

from fivefold.store.context import Context, Rope
from fivefold.store.held import Held
from fivefold.store.layer_cache import LayerCache
from fivefold.store.layout import Field, PageLayout
from fivefold.store.pages import Budget, PagePool
from fivefold.store.rows import Extent
from fivefold.store.spec import LayerSpec

__all__ = ["Budget", "Context", "Extent", "Field", "Held", "LayerCache", "LayerSpec", "PageLayout", "PagePool", "Rope"]
