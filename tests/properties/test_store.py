"""Caches against plain models of them, under operations in any order."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from store_model import OPERATIONS, WEIGHTS, Setup, System

NAMES = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
STEPS = st.sampled_from(NAMES).flatmap(
    lambda name: st.tuples(st.just(name), st.tuples(*(st.integers(*bounds) for bounds in OPERATIONS[name])))
)


class StoreMachine(RuleBasedStateMachine):
    """Prints, when it fails, the seed of the setup and the shortest list of operations that it can find."""

    system: System | None = None

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.system = System(Setup.draw(random.Random(seed)))

    @rule(step=STEPS)
    def operate(self, step: tuple[str, tuple[int, ...]]) -> None:
        system, self.system = self.system, None  # where this fails, nothing is left to finish
        assert system is not None
        system.operate(*step)
        system.check()
        self.system = system

    def teardown(self) -> None:
        if self.system is not None:
            self.system.finish()


TestStore = pytest.mark.usefixtures("one_thread")(StoreMachine.TestCase)
# 25 runs of 50 operations, and 80 where there is time. CI always tries the same ones.
TestStore.settings = settings(
    max_examples=25,
    stateful_step_count=50,
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
class TestStoreForLonger(StoreMachine.TestCase):
    settings = settings(TestStore.settings, max_examples=80)
