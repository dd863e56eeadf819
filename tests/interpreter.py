"""Triton's interpreter, without what it does again and again though the answer stays the same: in half the time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any


def quicken() -> None:
    """What kernels compute stays as it is."""
    from triton.runtime import interpreter

    # For each call of a function within a kernel it looks through all of `triton.language` for what to replace. Here it
    # does so once for each function, and it stays replaced: no kernel is compiled where there is the interpreter.
    patch = interpreter._patch_lang

    @cache
    def once(function: Any) -> Any:
        patch(function)
        return interpreter._LangPatchScope()  # with nothing to put back

    interpreter._patch_lang = once
    # Each sum of integers is there twice, for an assertion that is looked at with TRITON_DEBUG alone.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)

    interpreter._get_np_dtype = _by(lambda dtype: dtype.scalar.name, interpreter._get_np_dtype)
    _shapes()


def _by(key: Any, answer: Any) -> Any:
    """A function of one argument that is asked once for each key."""
    known: dict[Any, Any] = {}

    def get(x: Any) -> Any:
        name = key(x)
        if name not in known:
            known[name] = answer(x)
        return known[name]

    return get


def _shapes() -> None:
    """Shapes are checked, and wrapped, once for each shape."""
    from triton.language import core

    block, tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, tuple[Any, Any]] = {}

    def new_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(x, "value", x) for x in shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = {name: vars(self)[name] for name in ("shape", "numel", "name")}
        self.element_ty = element_ty
        vars(self).update(blocks[key])

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in tensors:
            tensor(self, handle, type)
            tensors[key] = self.numel, self.shape
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = tensors[key]

    core.block_type.__init__, core.tensor.__init__ = new_block, new_tensor
