"""Ray's vLLM stage, telling besides what each answer cost; imported only where an engine is about to start.

Ray's own stage drops how many tokens of a prompt the engine found in its cache. Its answers have a place for
measurements, which is empty unless vLLM collects a dozen others at every step.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF


@dataclasses.dataclass(frozen=True)
class AnswerCost:
    """What an answer took."""

    cached_tokens: int
    """Tokens of the prompt that the engine had computed for another pair."""
    answered: float
    """When it came, in seconds of the engine's clock."""


class CountingStage(vLLMEngineStageUDF):  # type: ignore[misc]
    """The stage's worker, whose answers hold their AnswerCost under `metrics`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ask = self.llm._generate_async

        async def ask_and_count(request: Any) -> Any:
            answer = await ask(request)
            answer.metrics = AnswerCost(getattr(answer, "num_cached_tokens", None) or 0, time.time())
            return answer

        self.llm._generate_async = ask_and_count
