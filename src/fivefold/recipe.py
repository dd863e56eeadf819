"""What the user asked for: at most one method per slot, written `duo(keep=0.5) + kivi(bits=2)`."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fivefold.errors import RecipeError
from fivefold.methods import SLOTS, Method, Slot, TokenPolicy, find, registered
from fivefold.store.rows import Extent
from fivefold.store.spec import LayerSpec

_LONGEST = 20_000


@dataclass(frozen=True)
class Recipe:
    """Methods in the order of the slots; none is `full()`, the exact baseline.

    `Recipe.parse(str(recipe)) == recipe`. Raises `RecipeError` for two methods in one slot and for methods that
    exclude each other.
    """

    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):
            raise RecipeError(f"Recipe({self.methods!r}) is given a text: write Recipe.parse({self.methods!r}).")
        ordered = tuple(sorted(self.methods, key=lambda m: SLOTS.index(m.slot)))
        object.__setattr__(self, "methods", ordered)
        for one, two in pairwise(ordered):
            if one.slot == two.slot:
                raise RecipeError(
                    f"{one.name} and {two.name} both fill the slot {one.slot!r}: keep one of them in the recipe."
                )
        for one in ordered:
            for other in ordered:
                if one is not other and (why := one.excludes(other)):
                    raise RecipeError(f"{one.name} and {other.name} cannot be combined: {why}")

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe written as `text`. Nothing in it is ever executed. Raises `RecipeError`."""
        return cls(tuple(method for method in _parse(text) if method is not None))

    def get(self, slot: Slot) -> Method | None:
        """The method in `slot`, if any."""
        return next((method for method in self.methods if method.slot == slot), None)

    @property
    def packer(self) -> Method | None:
        """The method that brings the codec, if there is one."""
        return self.get("bits") or self.get("channels")

    @property
    def chooser(self) -> TokenPolicy | None:
        """The method that chooses tokens by the whole prompt, if there is one: what is held of a prompt then depends on
        how it is cut, and on what follows."""
        return next((method for method in self.methods if isinstance(method, TokenPolicy) and method.chooses), None)

    def divided(self, specs: Sequence[LayerSpec]) -> tuple[list[LayerSpec], list[LayerSpec]]:
        """The layers that have a cache, and those whose attention is left out. Raises `RecipeError` if it all is."""
        gone = frozenset().union(*(method.absent(specs) for method in self.methods))
        kept = [spec for spec in specs if spec.layer not in gone]
        if specs and not kept:
            raise RecipeError(f"{self} leaves out the attention of every layer that has a cache: keep at least one.")
        return kept, [spec for spec in specs if spec.layer in gone]

    def of_layer(self, spec: LayerSpec) -> Recipe:
        """What it comes to in one layer: no parameter has values by layer then, and methods that leave the layer as it
        is are not there. Raises `RecipeError`."""
        mine = tuple(one for method in self.methods for one in method.of_layer(spec))
        return self if mine == self.methods else Recipe(mine)

    def extents(self, spec: LayerSpec) -> list[Extent]:
        """What each KV head of a layer holds when all methods have had their say."""
        out = [Extent(recent=spec.window)] * spec.kv_heads
        for method in self.of_layer(spec).methods:
            wanted = method.extents(spec)
            if wanted is not None:
                out = [one.intersect(other) for one, other in zip(out, wanted, strict=True)]
        return out

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods)) or "full()"


def _parse(text: str) -> list[Method | None]:
    if not isinstance(text, str):
        raise RecipeError(f"a recipe is a text, and this is of type {type(text).__name__}: write 'kivi(bits=2)'.")
    if not text.strip():
        raise RecipeError(f"the recipe is empty ({text!r}): write full(), or for example 'kivi(bits=2)'.")
    if len(text) > _LONGEST:
        raise RecipeError(f"the recipe has {len(text)} characters: at most {_LONGEST} are read.")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" (at character {error.offset})" if isinstance(error, SyntaxError) and error.offset else ""
        raise RecipeError(
            f"cannot read the recipe {text!r}{where}: write methods as name(key=value) joined by '+'."
        ) from None
    nodes: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        nodes.append(tree.right)
        tree = tree.left
    nodes.append(tree)
    return [_method(node, text) for node in reversed(nodes)]


def _method(node: ast.expr, text: str) -> Method | None:
    if isinstance(node, ast.Name):
        node = ast.Call(node, [], [])
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise RecipeError(
            f"cannot read {_source(node, text)!r} in the recipe: write methods as name(key=value) joined by '+'."
        )
    name = node.func.id
    if node.args:
        raise RecipeError(f"{name}({_source(node.args[0], text)}) lacks a name for its value: write key=value.")
    values: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise RecipeError(f"cannot read '**' in {name}(...): write key=value.")
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise RecipeError(
                f"{name}({keyword.arg}={_source(keyword.value, text)}) is no plain value: use a number, a text in "
                "quotes, True, False, None or a list."
            ) from None
        if isinstance(value, set):
            raise RecipeError(
                f"{name}({keyword.arg}={_source(keyword.value, text)}) is several recipes, and one is wanted here: "
                "write one value, or use fivefold sweep or fivefold plan."
            )
        values[keyword.arg] = value
    if name == "full":
        if values:
            raise RecipeError(f"full() takes no parameters: remove {', '.join(values)}.")
        return None
    return build(name, values)


def build(name: str, values: dict[str, Any]) -> Method:
    """The method `name` with parameters `values`. Raises `RecipeError`."""
    method = find(name)
    known = [part.name for part in dataclasses.fields(method)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise RecipeError(f"{name}() has no parameter {key!r}: it has {', '.join(known) or 'none'}.")
    try:
        made = method(**values)
    except TypeError as error:  # a required parameter is missing
        raise RecipeError(f"{name}() cannot be made: {error}.") from None
    # Printed as it was written; two methods with equal parameters are equal all the same.
    object.__setattr__(made, "_written", frozenset(values))
    return made


def _source(node: ast.expr, text: str) -> str:
    return ast.get_source_segment(text.strip(), node) or ast.dump(node)


def describe() -> list[dict[str, Any]]:
    """Every method with its slot, paper, summary and parameters, and what it cannot be combined with."""
    defaults = {}
    for name, cls in registered().items():
        defaults[name] = cls()
    rows: list[dict[str, Any]] = [
        {"name": "full", "slot": None, "paper": None, "summary": "Everything kept exact: the baseline.",
         "parameters": [], "excludes": []}
    ]  # fmt: skip
    for name, cls in registered().items():
        parameters = [
            {
                "name": part.name,
                "default": part.default,
                "help": part.metadata.get("help", ""),
                "choices": part.metadata.get("choices"),
                "low": part.metadata.get("low"),
                "high": part.metadata.get("high"),
                "by_layer": part.metadata.get("by_layer", False),
                "exact": part.metadata.get("exact"),
            }
            for part in dataclasses.fields(cls)  # type: ignore[arg-type]
        ]
        excludes = []
        for other, instance in defaults.items():
            if other == name:
                continue
            why = defaults[name].excludes(instance) or instance.excludes(defaults[name])
            if instance.slot == cls.slot:
                why = f"both fill the slot {cls.slot!r}."
            if why:
                excludes.append({"method": other, "why": why})
        summary = (cls.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        rows.append(
            {"name": name, "slot": cls.slot, "paper": cls.paper, "summary": " ".join(summary.split()),
             "parameters": parameters, "excludes": excludes}
        )  # fmt: skip
    return rows
