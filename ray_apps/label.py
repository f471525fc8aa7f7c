"""Grading pairs: Ray Data streams them through a vLLM engine; few pairs are cheaper with torch alone.

The engine is given token ids, computes in float32 and answers what the labeller's own model answers, within
1e-3. Small runs are dominated by its start, so it runs eagerly (compiling takes 27 s on two cores and gains
nothing on short texts) and with one process besides its actor instead of two (each spends 20 s on imports).
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError

from conf.load import ConfigError
from embeddings.calibration import calibrate
from embeddings.labeller import LabellerCard, PairEncoder, load_labeller_card, load_pair_encoder, violations
from ray_apps.cluster import check_resources, connect, quiet_data
from ray_apps.placements import LabelPlacement

log = logging.getLogger(__name__)

NO_ANSWER = (float("nan"),) * 3
ENGINE_STAGE = "vLLMEngineStage"
CPU_HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention heads that vLLM 0.32 computes on a processor (its CPU_ATTN backend). It starts with others as well, and
dies at the first pair."""
CPU_BLOCK_TOKENS = 32
"""Tokens of a block of the engine's cache on a processor: the fewest that CPU_ATTN takes. Only whole blocks are shared,
so that under vLLM's own 128 up to 127 tokens of what all pairs begin with are computed for each."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # On CPU this keeps the model inside the engine's process; the engine itself stays a process of its own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Environment of an engine: the labeller is a folder, so nothing is ever fetched or reported."""
CPU_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**31),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""Environment of an engine on a processor: glibc keeps the memory of a step for the next one. Otherwise it goes back to
the kernel with every layer, and some of the time goes into clearing it anew."""


def chosen_engine(placement: LabelPlacement, num_pairs: int) -> Literal["vllm", "torch"]:
    """The engine that `auto` stands for."""
    if placement.engine == "auto":
        return "vllm" if num_pairs >= placement.vllm_from_pairs else "torch"
    return placement.engine


def label_pairs(
    pairs: pa.Table,
    folder: str,
    placement: LabelPlacement,
    first: pa.Table | None = None,
    observe: Callable[[pa.Table], None] | None = None,
) -> Iterator[pa.Table]:
    """Calibrated probabilities of pairs, part by part as they come, in any order.

    Args:
        pairs: columns address, query, title and, where known, dataset, which chooses the calibration, brand,
            category, description, attributes.
        folder: of the labeller.
        placement: engine and portions.
        first: pairs with the same columns that are asked before all others.
        observe: is given what the vLLM engine's answers took, part by part: columns prompt_tokens, cached_tokens (of
            these, not computed anew) and answered (seconds; nan of a classifier).

    Yields:
        Columns address, p0, p1, p2; all nan where the answer was no distribution.
    """
    card, started, done = load_labeller_card(folder), time.monotonic(), 0
    # equal queries side by side: a generative engine reads their common beginning once
    ordered = pairs.sort_by([("query", "ascending"), ("address", "ascending")])
    if first is not None:
        ordered = pa.concat_tables([first.select(ordered.column_names), ordered])
    if "dataset" not in ordered.column_names:
        ordered = ordered.append_column("dataset", pa.array([""] * len(ordered), pa.string()))
    answers = _vllm_answers if chosen_engine(placement, len(ordered)) == "vllm" else _torch_answers
    for keys, probability_N3 in answers(ordered, folder, card, placement):
        if observe is not None and COSTS[0] in keys.column_names:
            observe(keys.select(COSTS))
        probability_N3[violations(probability_N3)] = np.nan
        calibrated_N3 = calibrate(card.calibrations, keys["dataset"].to_pylist(), probability_N3)
        done += len(keys)
        log.info("labelled %d of %d pairs, %.0f s", done, len(ordered), time.monotonic() - started)
        columns = {f"p{grade}": calibrated_N3[:, grade] for grade in range(3)}
        yield pa.table({"address": keys["address"], **columns})


Answers = Iterator[tuple[pa.Table, NDArray[np.float64]]]
"""Parts of the pairs, columns address and dataset, with what the labeller answers before calibration, [N, 3]."""
KEYS = ["address", "dataset"]
COSTS = ["prompt_tokens", "cached_tokens", "answered"]


def _torch_answers(pairs: pa.Table, folder: str, card: LabellerCard, placement: LabelPlacement) -> Answers:
    from embeddings.labeller_model import load_labeller, plain_probabilities

    model, encoder = load_labeller(folder)
    for start in range(0, len(pairs), placement.part_rows):
        part = pairs.slice(start, placement.part_rows)
        yield part.select(KEYS), plain_probabilities(model, encoder.encode_rows(part)).astype(np.float64)


def check_servable(folder: str, placement: LabelPlacement) -> None:
    """Refuses a labeller that vLLM would start with and then die of, and a placement it cannot be split over.

    Raises:
        ConfigError: the engine is on a processor and is to be split, or the model's attention heads have a width it
            cannot compute there, or they do not split over the graphics cards.
    """
    if placement.tensor_parallel > 1 and not placement.use_gpu:
        raise ConfigError(
            f"placement.tensor_parallel={placement.tensor_parallel}: only graphics cards share an engine; "
            "give placement.use_gpu=true, or more placement.num_engines"
        )
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    heads = config.get("num_attention_heads")
    width = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else None)
    if not placement.use_gpu and width and width not in CPU_HEAD_WIDTHS:
        raise ConfigError(
            f"labeller={folder}: its attention heads are {width} wide, vLLM on a processor computes "
            f"{', '.join(map(str, CPU_HEAD_WIDTHS))}; give placement.engine=torch, or tune another backbone"
        )
    if heads and heads % placement.tensor_parallel:
        raise ConfigError(
            f"placement.tensor_parallel={placement.tensor_parallel}: the {heads} attention heads of labeller={folder} "
            "do not split evenly; give a divisor of them"
        )


def _vllm_answers(pairs: pa.Table, folder: str, card: LabellerCard, placement: LabelPlacement) -> Answers:
    check_servable(folder, placement)
    connect(placement.ray)
    bundles = placement.num_engines * placement.tensor_parallel
    check_resources(bundles + 1, bundles * placement.use_gpu)
    quiet_data()
    size = placement.batch_rows
    blocks = [pairs.slice(start, size) for start in range(0, len(pairs), size)]
    encoded = ray.data.from_arrow(blocks).map_batches(
        _encode, fn_kwargs={"folder": folder, "fingerprint": card.fingerprint}, batch_format="pyarrow", batch_size=size
    )
    processor = _processor(folder, card, placement)
    try:
        for batch in processor(encoded).iter_batches(batch_size=placement.part_rows, batch_format="pyarrow"):
            probability_N3 = np.array(batch["probability"].to_pylist(), dtype=np.float64).reshape(-1, 3)
            yield batch.select(KEYS + COSTS), probability_N3
    except (RayActorError, RayTaskError) as error:
        died = error if isinstance(error, RayActorError) else error.cause
        if not isinstance(died, RayActorError):
            raise
        raise RuntimeError(
            f"label_pairs: the vLLM engine died (placement.max_engine_restarts={placement.max_engine_restarts}); its "
            "log is among worker-*.out in Ray's session folder; run again to go on, or give placement.engine=torch"
        ) from error


def _processor(folder: str, card: LabellerCard, placement: LabelPlacement) -> Any:
    with warnings.catch_warnings():
        # Ray imports vLLM into this process as well, and both warn of deprecated spellings of their own
        warnings.simplefilter("ignore")
        from ray.data.llm import build_processor

        from ray_apps.engine_stage import CountingStage

        processor = build_processor(
            _engine_config(folder, card, placement),
            preprocess=partial(_request, grade_token_ids=card.grade_token_ids),
            postprocess=partial(_answer, grade_token_ids=card.grade_token_ids),
        )
    # Ray Data starts a dead actor again for ever and has no setting for it: a model that kills its engine would hang.
    stage = processor.get_stage_by_name(ENGINE_STAGE)
    stage.map_batches_kwargs["max_restarts"] = placement.max_engine_restarts
    # past the stage's validator, which would take its placement for unset the second time
    object.__setattr__(stage, "fn", CountingStage)
    return processor


def _engine_config(folder: str, card: LabellerCard, placement: LabelPlacement) -> Any:
    from ray.data.llm import vLLMEngineProcessorConfig

    environment, engine = dict(OFFLINE), engine_arguments(card, placement)
    bundle = {"CPU": 1, "GPU": 1} if placement.use_gpu else {"CPU": 1}
    if not placement.use_gpu:
        environment |= CPU_MEMORY | {
            "VLLM_CPU_KVCACHE_SPACE": str(placement.kv_cache_gib),
            # Ray gives an actor with one CPU one thread; the engine may use the core that feeds it as well
            "OMP_NUM_THREADS": str(placement.threads_per_engine),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
    return vLLMEngineProcessorConfig(
        model_source=folder,
        task_type="classify" if card.kind == "classifier" else "generate",
        engine_kwargs=engine,
        batch_size=placement.batch_rows,
        max_concurrent_batches=placement.max_concurrent_batches,
        concurrency=placement.num_engines,
        runtime_env={"env_vars": environment},
        placement_group_config={"bundles": [bundle] * placement.tensor_parallel},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        log_engine_metrics=False,
    )


def engine_arguments(card: LabellerCard, placement: LabelPlacement) -> dict[str, Any]:
    """What vLLM is started with; float32 and the mask's logprobs decide grades, the rest only speed."""
    given: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": card.max_tokens + (card.kind == "generative"),
        "max_num_seqs": placement.max_num_seqs,
        "tensor_parallel_size": placement.tensor_parallel,
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    if placement.max_num_batched_tokens is not None:
        given["max_num_batched_tokens"] = placement.max_num_batched_tokens
    if card.kind == "generative":
        given |= {
            # raw logprobs would be those before the mask: no distribution over the three grades
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": 3,
            "enable_prefix_caching": True,
        }
        if not placement.use_gpu:
            given["block_size"] = CPU_BLOCK_TOKENS
    return given


@lru_cache(maxsize=1)
def _encoder(folder: str, _fingerprint: str) -> PairEncoder:
    """Cached by what is in the folder: a worker may outlive the labeller that it first met there."""
    return load_pair_encoder(folder)


def _encode(batch: pa.Table, folder: str, fingerprint: str) -> pa.Table:
    tokens = pa.array(_encoder(folder, fingerprint).encode_rows(batch), pa.list_(pa.int32()))
    return batch.select(KEYS).append_column("tokenized_prompt", tokens)


def _request(row: dict[str, Any], grade_token_ids: tuple[int, ...]) -> dict[str, Any]:
    if not grade_token_ids:
        return row
    return row | {
        "sampling_params": {
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": len(grade_token_ids),
            "allowed_token_ids": list(grade_token_ids),
            "detokenize": False,
        }
    }


def _answer(row: dict[str, Any], grade_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """Probabilities of a row the engine has answered, nan where a grade has none; and what the answer took."""
    cost = row.get("metrics") or {}
    taken = {
        "prompt_tokens": int(row.get("num_input_tokens") or 0),
        "cached_tokens": int(cost.get("cached_tokens", 0)),
        "answered": float(cost.get("answered", "nan")),
    }
    return {name: row[name] for name in KEYS} | taken | {"probability": list(_probability(row, grade_token_ids))}


def _probability(row: dict[str, Any], grade_token_ids: tuple[int, ...]) -> tuple[float, ...]:
    if not grade_token_ids:
        values = row.get("embeddings")
        given = () if values is None else tuple(float(value) for value in np.ravel(values))
        return given if len(given) == len(NO_ANSWER) else NO_ANSWER
    answers = row.get("logprobs")
    if answers is None or len(answers) == 0:
        return NO_ANSWER
    by_token = {int(token): float(value["logprob"]) for token, value in dict(answers[0]).items() if value is not None}
    return tuple(float(np.exp(by_token.get(token, float("nan")))) for token in grade_token_ids)
