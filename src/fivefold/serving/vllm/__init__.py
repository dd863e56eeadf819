"""Fivefold's `kivi` pages inside vLLM: an attention backend whose blocks are packed pages.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"fivefold": "kivi(bits=4)"}'

vLLM calls `register` in every process that it starts (entry point group `vllm.general_plugins`). Nothing of vLLM is
imported before that, and nowhere outside this package. See docs/vllm.md.
"""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from fivefold.errors import RecipeError
from fivefold.serving.vllm.options import NO_RECIPE, RECIPE, Facts, Options, check_version, recipe_text

__all__ = ["register"]
_told: dict[str, str] = {}
_BACKEND = "fivefold.serving.vllm.backend.KiviBackend"


def register() -> None:
    """Make the attention backend known to vLLM. Raises one sentence if a recipe is asked for that cannot be served."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    asked = os.environ.get(RECIPE)
    if asked:
        check_version(vllm.__version__)
        Options.parse(asked)
    if not hasattr(EngineArgs.create_engine_config, "fivefold"):
        EngineArgs.create_engine_config = _checking(EngineArgs.create_engine_config)
    try:
        check_version(vllm.__version__)
    except ImportError:
        return  # said when a recipe is asked for
    _register(asked is not None)


def _register(on_cpu: bool) -> None:
    """on_cpu: whether a CPU takes it too, which knows one backend and gets ours in its place."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    if on_cpu:
        register_backend(AttentionBackendEnum.CPU_ATTN, _BACKEND)
    elif AttentionBackendEnum.CPU_ATTN.is_overridden():
        AttentionBackendEnum.CPU_ATTN.clear_override()


def _checking(create: Any) -> Any:
    """`EngineArgs.create_engine_config`, which says what cannot be served before any process is started."""

    @wraps(create)
    def create_engine_config(self: Any, *args: Any, **settings: Any) -> Any:
        config = create(self, *args, **settings)
        prepare(config)
        return config

    create_engine_config.fivefold = True  # type: ignore[attr-defined]
    return create_engine_config


def prepare(config: Any) -> None:
    """Check a vLLM configuration, and choose the backend where it asks for a recipe."""
    import vllm
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    cpu = current_platform.is_cpu()
    chosen = config.attention_config.backend
    if os.environ.get(RECIPE) == _told.pop("recipe", None):
        os.environ.pop(RECIPE, None)  # of an engine before, in this process
    text = recipe_text(config.additional_config, os.environ.get(RECIPE))
    if text is None:
        if cpu:
            _register(False)
        elif chosen == AttentionBackendEnum.CUSTOM and AttentionBackendEnum.CUSTOM.get_path() == _BACKEND:
            raise RecipeError(NO_RECIPE)
        return
    check_version(vllm.__version__)
    options = Options.parse(text)
    options.check(facts_of(config))
    if cpu:
        if RECIPE not in os.environ:  # workers register before they have a configuration
            os.environ[RECIPE] = _told["recipe"] = text
        _register(True)
    elif chosen is None:
        config.attention_config.backend = AttentionBackendEnum.CUSTOM
    elif chosen != AttentionBackendEnum.CUSTOM:
        raise RecipeError(
            f"{options.recipe} needs Fivefold's attention backend, and {chosen.name} is chosen: write "
            "--attention-backend CUSTOM."
        )


def facts_of(config: Any) -> Facts:
    """What vLLM is asked to serve."""
    from vllm.platforms import current_platform

    model, parallel, text = config.model_config, config.parallel_config, config.model_config.hf_text_config
    speculation = config.speculative_config
    # Layers of a model that has windows may do without; those of one whose windows are off say None or 0.
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds and not kinds & {"sliding_attention", "chunked_attention"}:
        window = None
    return Facts(
        model=str(model.model),
        head_dim=model.get_head_size(),
        query_heads=model.get_num_attention_heads(parallel),
        kv_heads=model.get_num_kv_heads(parallel),
        dtype=model.dtype,
        window=window or None,
        cap=getattr(text, "attn_logit_softcapping", None),
        mla=bool(model.use_mla),
        attention_free=bool(model.is_attention_free),
        encoder=bool(model.is_encoder_decoder) or model.runner_type == "pooling",
        hybrid=bool(model.is_hybrid),
        speculation=None if speculation is None else str(speculation.method),
        pipeline=parallel.pipeline_parallel_size,
        context_parallel=parallel.decode_context_parallel_size,
        cache_dtype=str(config.cache_config.cache_dtype),
        cpu=current_platform.is_cpu(),
    )
