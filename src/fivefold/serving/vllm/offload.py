"""vLLM's native KV offloading (`--kv-offloading-size`) with packed blocks.

What goes to the host's memory and comes back are whole packed blocks, by vLLM's own connector: the exact companion
group opts out of prefix caching, so the connector leaves it alone, and what comes back is read packed to its end, as
behind a prefix hit. Two things it does not foresee:

- A request all of whose tokens come back computes its last one again. That token's group is packed already and has no
  exact page: the last block is left out, as vLLM's own prefix hits leave it out.
- A block that is still being copied out may be given to another request. The connector waits for the copy if one of
  the groups that it moves gets the block; here the exact group gets blocks too.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data
from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector as stock

from fivefold.serving.vllm.exact import ExactSpec
from fivefold.serving.vllm.options import without_the_last


class OffloadingConnector(stock.OffloadingConnector):
    """Takes the place of vLLM's connector of that name."""

    packed_blocks = True

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self.exact_groups = [i for i, spec in enumerate(groups) if isinstance(spec, ExactSpec)]
        self.packed_block = max(spec.block_size for spec in groups if not isinstance(spec, ExactSpec))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found, later = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if found:
            found = without_the_last(num_computed_tokens + found, request.num_tokens, self.packed_block)
            found = max(0, found - num_computed_tokens)
        return found, later and bool(found)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        given = self.scheduler._current_batch_allocated_block_ids
        for _, groups, _ in yield_req_data(scheduler_output):
            for group in self.exact_groups if groups else ():
                given.update(block for block in groups[group] if block)
        return super().build_connector_meta(scheduler_output)
