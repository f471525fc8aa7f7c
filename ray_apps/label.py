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
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayTaskError

from conf.load import ConfigError
from embeddings.calibration import calibrate
from embeddings.evidence import EvidenceHead
from embeddings.guideline import SHARED_BLOCK_TOKENS
from embeddings.labeller import LabellerCard, PairEncoder, load_labeller_card, load_pair_encoder, violations
from ray_apps.cluster import check_resources, connect, quiet_data
from ray_apps.placements import LabelPlacement

log = logging.getLogger(__name__)

NO_ANSWER = (float("nan"),) * 3
ENGINE_STAGE = "vLLMEngineStage"
CPU_HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention heads that vLLM 0.32 computes on a processor (its CPU_ATTN backend). It starts with others as well, and
dies at the first pair."""

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


def label_pairs(
    pairs: pa.Table | Iterable[pa.Table], folder: str, placement: LabelPlacement, *, num_pairs: int | None = None
) -> Iterator[pa.Table]:
    """Calibrated probabilities of pairs, part by part as they come, in any order.

    Args:
        pairs: columns address, query, title and, where known, dataset, which chooses the calibration, brand,
            category, description, attributes; as one table, or as blocks that are asked for in their order.
        folder: of the labeller.
        placement: engine and portions.
        num_pairs: rows of all blocks, where there are several.

    Yields:
        Columns address, p0, p1, p2, all three nan where the answer was no distribution; tokens, of the pair as the
        model reads it; cached_tokens, of these, not computed anew; answered, seconds, when the engine had the answer.
    """
    card, started, done = load_labeller_card(folder), time.monotonic(), 0
    blocks: Iterable[pa.Table] = [pairs] if isinstance(pairs, pa.Table) else pairs
    total = len(pairs) if isinstance(pairs, pa.Table) else num_pairs
    if total is None:
        raise ValueError("label_pairs: blocks need num_pairs, by which the engine is chosen")
    answers = _vllm_answers if placement.engine_for(total) == "vllm" else _torch_answers
    head = _head(folder, card.fingerprint)
    for keys, probability_N3 in answers(map(_ordered, blocks), folder, card, placement):
        probability_N3[violations(probability_N3)] = np.nan
        if head is not None:
            probability_N3 = head(probability_N3, np.array(keys["evidence"].to_pylist(), dtype=np.float64))
        calibrated_N3 = calibrate(card.calibrations, keys["dataset"].to_pylist(), probability_N3)
        done += len(keys)
        log.info("labelled %d of %d pairs, %.0f s", done, total, time.monotonic() - started)
        columns = {f"p{grade}": calibrated_N3[:, grade] for grade in range(3)}
        yield pa.table({"address": keys["address"], **columns} | {name: keys[name] for name in COSTS})


def _ordered(block: pa.Table) -> pa.Table:
    """Equal queries side by side, since a generative engine reads their common beginning once."""
    ordered = block.sort_by([("query", "ascending"), ("address", "ascending")])
    if "dataset" in ordered.column_names:
        return ordered
    return ordered.append_column("dataset", pa.array([""] * len(ordered), pa.string()))


Answers = Iterator[tuple[pa.Table, NDArray[np.float64]]]
"""Parts of the pairs, keys and costs, with what the labeller answers before calibration, [N, 3]."""
KEYS = ["address", "dataset", "evidence"]
COSTS = ["tokens", "cached_tokens", "answered"]


def _torch_answers(blocks: Iterable[pa.Table], folder: str, card: LabellerCard, placement: LabelPlacement) -> Answers:
    from embeddings.labeller_model import load_labeller, plain_probabilities

    model, encoder = load_labeller(folder)
    head = _head(folder, card.fingerprint)
    for block in blocks:
        for start in range(0, len(block), placement.part_rows):
            part = _with_evidence(block.slice(start, placement.part_rows), head)
            tokens = encoder.encode_rows(part)
            probability_N3 = plain_probabilities(model, tokens).astype(np.float64)
            cost = {
                "tokens": pa.array([len(pair) for pair in tokens], pa.int32()),
                "cached_tokens": pa.array([0] * len(part), pa.int32()),
                "answered": pa.array([time.time()] * len(part)),
            }
            yield pa.table({name: part[name] for name in KEYS} | cost), probability_N3


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


def _vllm_answers(blocks: Iterable[pa.Table], folder: str, card: LabellerCard, placement: LabelPlacement) -> Answers:
    check_servable(folder, placement)
    connect(placement.ray)
    bundles = placement.num_engines * placement.tensor_parallel
    check_resources(bundles + 1, bundles * placement.use_gpu)
    quiet_data()
    size = placement.batch_rows
    # put away one by one: the texts of all pairs lie in Ray's store and on its disk, never in this process
    kept = [ray.put(block.slice(start, size)) for block in blocks for start in range(0, len(block), size)]
    encoded = ray.data.from_arrow_refs(kept).map_batches(
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
        environment |= {
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
            # vLLM's own 128 would leave up to 127 tokens of what all pairs begin with to each
            given["block_size"] = SHARED_BLOCK_TOKENS
    return given


@lru_cache(maxsize=1)
def _encoder(folder: str, _fingerprint: str) -> PairEncoder:
    """Cached by what is in the folder: a worker may outlive the labeller that it first met there."""
    return load_pair_encoder(folder)


@lru_cache(maxsize=1)
def _head(folder: str, _fingerprint: str) -> EvidenceHead | None:
    """Cached likewise, with the encoder that it may hold."""
    return EvidenceHead.load(folder)


def _with_evidence(pairs: pa.Table, head: EvidenceHead | None) -> pa.Table:
    """The pairs with the numbers of their evidence; with none where no head weighs it."""
    numbers = head.evidence.numbers_of(pairs).tolist() if head is not None else [[]] * len(pairs)
    return pairs.append_column("evidence", pa.array(numbers, pa.list_(pa.float64())))


def _encode(batch: pa.Table, folder: str, fingerprint: str) -> pa.Table:
    pairs = _encoder(folder, fingerprint).encode_rows(batch)
    batch = _with_evidence(batch, _head(folder, fingerprint))
    batch = batch.append_column("tokens", pa.array([len(pair) for pair in pairs], pa.int32()))
    return batch.select([*KEYS, "tokens"]).append_column("tokenized_prompt", pa.array(pairs, pa.list_(pa.int32())))


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
    taken = {"cached_tokens": int(cost.get("cached_tokens", 0)), "answered": float(cost.get("answered", "nan"))}
    kept = {name: row[name] for name in (*KEYS, "tokens")}
    return kept | taken | {"probability": list(_probability(row, grade_token_ids))}


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
