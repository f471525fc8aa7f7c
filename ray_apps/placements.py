"""Where models are tuned and pairs are graded; apart from the apps, so that settings load without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from conf.load import meaning, settings
from ray_apps.cluster import RayPlacement

Sharding = Annotated[
    Literal["none", "fsdp"],
    meaning("fsdp: weights, gradients and optimiser states in parts on the workers, for a model too large for one"),
]


@settings
class TunePlacement:
    """Where the labeller is fine-tuned; never part of a run's identity."""

    ray: RayPlacement = RayPlacement()
    num_workers: Annotated[int, meaning("training workers", ge=1)] = 1
    use_gpu: Annotated[bool, meaning("a graphics card per worker")] = False
    sharding: Sharding = "none"
    threads_per_worker: Annotated[int, meaning("CPUs and torch threads of a worker", "CPUs", ge=1)] = 2
    checkpoint_every_steps: Annotated[int, meaning("steps between two checkpoints", "steps", ge=1)] = 100
    max_failures: Annotated[int, meaning("worker deaths after which the run gives up", ge=0)] = 2


@settings
class LabelPlacement:
    """Where and in which portions pairs are graded; never part of a run's identity."""

    ray: RayPlacement = RayPlacement()
    engine: Annotated[
        Literal["auto", "vllm", "torch"], meaning("auto: vllm from vllm_from_pairs on, else torch in this process")
    ] = "vllm"
    vllm_from_pairs: Annotated[int, meaning("with engine=auto, fewer pairs are not worth a start", "pairs", ge=0)] = (
        20_000
    )
    part_rows: Annotated[int, meaning("pairs written at once; a death loses at most these", "pairs", ge=1)] = 2_000
    num_engines: Annotated[int, meaning("vLLM engines", ge=1)] = 1
    use_gpu: Annotated[bool, meaning("graphics cards for the engines")] = False
    tensor_parallel: Annotated[
        int, meaning("graphics cards that share an engine, for a labeller too large or slow on one", "cards", ge=1)
    ] = 1
    threads_per_engine: Annotated[int, meaning("threads of an engine on CPU", "threads", ge=1)] = 2
    batch_rows: Annotated[int, meaning("pairs sent to an engine at once", "pairs", ge=1)] = 128
    max_concurrent_batches: Annotated[int, meaning("batches under way in an engine", "batches", ge=1)] = 4
    max_num_seqs: Annotated[int, meaning("pairs of a step of the engine", "pairs", ge=1)] = 128
    max_num_batched_tokens: Annotated[
        int | None, meaning("tokens computed in a step; null takes vLLM's own", "tokens", ge=1)
    ] = None
    max_engine_restarts: Annotated[
        int, meaning("deaths of an engine that are made good; what is graded already stays in any case", ge=0)
    ] = 0
    kv_cache_gib: Annotated[int, meaning("an engine's cache on CPU", "GiB", ge=1)] = 1
    price_per_hour: Annotated[float, meaning("of an engine's machine, for cost and plan; 0: unknown", ge=0)] = 0.0
    currency: Annotated[str, meaning("of the price")] = "USD"

    def engine_for(self, num_pairs: int) -> Literal["vllm", "torch"]:
        """The engine that `auto` stands for."""
        if self.engine == "auto":
            return "vllm" if num_pairs >= self.vllm_from_pairs else "torch"
        return self.engine

    def cost(self, seconds: float) -> float:
        """What the engines cost for so long, in the currency."""
        return self.price_per_hour * self.num_engines * seconds / 3600
