"""Texts trained per second: ours beside sentence-transformers' trainer on the same instances, backbone and loss.

    python -m benchmarks.train_step [--quick] [--rounds N] [--loss supcon] [--dropout 0.0]

  ours                   ContrastiveTrainer: each distinct text once per step, groups of like length;
  ours_compiled          the same with a compiled backbone, compilation left out;
  sentence_transformers  SentenceTransformerTrainer with the same loss (`TrainerLoss`), a column per product;
  st_pairs               the same trainer with its own CoSENTLoss on rows of query, product and grade, as its users do;
  ours_in_passes         ours with texts_per_pass, for its memory;
  one_thread, two_workers  ours with one thread, and as two DDP processes of one thread each: what a second worker adds.

Each contestant of a round is a process of its own, one after the other, two threads, fused AdamW, the first steps left
out; items are queries and products, all of a row graded. Instances are those of Home Depot below ASSAY_DATA. The
last line is JSON; above 1 is ours better, `efficiency` is two_workers over twice one_thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import pyarrow.csv as pc
import torch

from embeddings.batches import BatchRecipe, Instance
from embeddings.recipes import EncoderRecipe, LossRecipe, LossTerm, TrainRecipe

QUICK: Final = ("ours", "sentence_transformers", "st_pairs", "ours_in_passes")
CONTESTANTS: Final = (*QUICK, "ours_compiled", "one_thread", "two_workers")
NUM_PRODUCTS: Final = 8
NUM_QUERIES: Final = 32
TEXTS_PER_PASS: Final = 64
LEFT_OUT: Final = 2
"""First steps of a contestant, in which memory is taken and kernels are chosen."""
QUICK_STEPS, STEPS = 8, 24


def home_depot_instances(root: Path) -> list[Instance]:
    """Queries with at least eight judged products, of which the first eight count, in the order of the file."""
    options = pc.ReadOptions(encoding="latin-1")
    rows = pc.read_csv(root / "train.csv", read_options=options).select(["search_term", "product_title", "relevance"])
    judged: dict[str, dict[str, int]] = {}
    for query, title, mean in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        judged.setdefault(query, {})[title] = 0 if mean <= 1.5 else 1 if mean < 2.5 else 2
    found = []
    for query, graded in judged.items():
        titles = list(graded)[:NUM_PRODUCTS]
        grades = np.array([graded[title] for title in titles], dtype=np.int8)
        if len(titles) == NUM_PRODUCTS and np.unique(grades).size > 1:
            found.append(Instance(("home_depot", query), query, titles, grades))
    return found


def recipe_of(loss: str, dropout: float, **changes: Any) -> TrainRecipe:
    """The same for all contestants: rate, loss, size of a step."""
    batch = BatchRecipe(queries_per_step=NUM_QUERIES, max_products_per_query=NUM_PRODUCTS)
    terms = (LossTerm(loss=loss),)  # type: ignore[arg-type]
    return TrainRecipe(loss=LossRecipe(terms=terms), batch=batch, max_steps=1000, dropout=dropout, **changes)


def train_ours(
    instances: list[Instance],
    recipe: TrainRecipe,
    steps: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    wrap: Any = None,
    compiled: bool = False,
) -> float:
    """Seconds of the steps that count."""
    from embeddings.encoder import build_encoder
    from embeddings.training import ContrastiveTrainer

    model = build_encoder(EncoderRecipe())
    placement = {"rank": rank, "world_size": world_size} | ({"wrap": wrap} if wrap else {})
    trainer = ContrastiveTrainer(model, instances, recipe, compiled=compiled, **placement)
    started = 0.0
    for step in range(LEFT_OUT + steps):
        if step == LEFT_OUT:
            started = time.monotonic()
        trainer.train_step(step)
    return time.monotonic() - started


def train_theirs(instances: list[Instance], recipe: TrainRecipe, steps: int, *, in_pairs: bool) -> float:
    """Seconds of the steps that count, by sentence-transformers' trainer."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss
    from transformers import TrainerCallback

    from embeddings.backbone import has_fast_bf16, set_dropout
    from embeddings.encoder import build_encoder
    from embeddings.trainer_loss import TrainerLoss

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times the steps."""

        started = seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == LEFT_OUT:
                self.started = time.monotonic()
            self.seconds = time.monotonic() - self.started

    model = build_encoder(EncoderRecipe())
    set_dropout(model, recipe.dropout or 0.0)
    if in_pairs:
        pairs = [(one, place) for one in instances for place in range(NUM_PRODUCTS)]
        columns = {
            "query": [one.query for one, _ in pairs],
            "product": [one.products[place] for one, place in pairs],
            "label": [one.grades[place] / 2 for one, place in pairs],
        }
        loss: Any = CoSENTLoss(model)
        size = NUM_QUERIES * NUM_PRODUCTS
    else:
        columns = {"query": [one.query for one in instances]}
        for place in range(NUM_PRODUCTS):
            columns[f"product_{place}"] = [one.products[place] for one in instances]
        columns["label"] = [one.grades.tolist() for one in instances]
        loss, size = TrainerLoss(model, recipe.loss), NUM_QUERIES
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=place,
            max_steps=LEFT_OUT + steps,
            per_device_train_batch_size=size,
            learning_rate=recipe.learning_rate,
            optim="adamw_torch_fused",
            bf16=has_fast_bf16("cpu"),
            router_mapping={name: "query" if name == "query" else "document" for name in columns if name != "label"},
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = Dataset.from_dict(columns)
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=[clock]
        ).train()
    return clock.seconds


def _worker(rank: int, loss: str, dropout: float, steps: int, root: str, place: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    wrap = torch.nn.parallel.DistributedDataParallel
    instances = home_depot_instances(Path(root))
    seconds = train_ours(instances, recipe_of(loss, dropout), steps, rank=rank, world_size=2, wrap=wrap)
    Path(place, str(rank)).write_text(str(seconds))
    torch.distributed.destroy_process_group()


def two_workers(root: Path, loss: str, dropout: float, steps: int) -> float:
    """Seconds of the slower of two processes."""
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(_worker, args=(loss, dropout, steps, str(root), place), nprocs=2)
        return max(float(Path(place, str(rank)).read_text()) for rank in range(2))


def measure(contestant: str, root: Path, loss: str, dropout: float, steps: int) -> dict[str, float]:
    """Items per second and peak memory of this process with one contestant."""
    instances = home_depot_instances(root)
    torch.set_num_threads(1 if contestant == "one_thread" else 2)
    recipe = recipe_of(loss, dropout, texts_per_pass=TEXTS_PER_PASS if contestant == "ours_in_passes" else 0)
    runs: dict[str, Callable[[], float]] = {
        "ours_compiled": lambda: train_ours(instances, recipe, steps, compiled=True),
        "sentence_transformers": lambda: train_theirs(instances, recipe, steps, in_pairs=False),
        "st_pairs": lambda: train_theirs(instances, recipe, steps, in_pairs=True),
        "two_workers": lambda: two_workers(root, loss, dropout, steps),
    }
    seconds = runs.get(contestant, lambda: train_ours(instances, recipe, steps))()
    items = NUM_QUERIES * (1 + NUM_PRODUCTS) * steps
    return {
        "items_per_sec": items / seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    """Prints each round, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few steps and contestants, 3 minutes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loss", default="supcon")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the backbone, for all contestants")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if "ASSAY_DATA" not in os.environ:
        sys.exit("train_step: set ASSAY_DATA to the folder that holds home_depot/train.csv")
    root = Path(os.environ["ASSAY_DATA"], "home_depot")
    steps = QUICK_STEPS if given.quick else STEPS
    if given.only:
        print(json.dumps(measure(given.only, root, given.loss, given.dropout, steps)))
        return
    names = QUICK if given.quick else CONTESTANTS
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(1 if given.quick else given.rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.train_step", "--only", name, "--loss", given.loss]
            command += ["--dropout", str(given.dropout), *(["--quick"] if given.quick else [])]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            found[name].append(json.loads(told))
            rate, memory = found[name][-1].values()
            print(f"round {number + 1}: {name} {rate:.1f} items/s, {memory:.2f} GiB", flush=True)
    print(json.dumps(summary(found)))


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds, and ours over the others."""
    rate = {name: median(one["items_per_sec"] for one in rounds) for name, rounds in found.items()}
    # the memory of two workers is not this process's
    memory = {
        name: median(one["peak_gib"] for one in rounds) for name, rounds in found.items() if name != "two_workers"
    }
    ratios = {
        "sentence_transformers": rate["ours"] / rate["sentence_transformers"],
        "st_pairs": rate["ours"] / rate["st_pairs"],
        "memory_sentence_transformers": memory["sentence_transformers"] / memory["ours"],
    }
    told: dict[str, Any] = {
        "items_per_sec": {name: round(value, 1) for name, value in rate.items()},
        "peak_gib": {name: round(value, 2) for name, value in memory.items()},
    }
    if "two_workers" in rate:
        ratios["compiled_sentence_transformers"] = rate["ours_compiled"] / rate["sentence_transformers"]
        told["efficiency"] = round(rate["two_workers"] / (2 * rate["one_thread"]), 2)
    return told | {"ratios": {name: round(value, 2) for name, value in ratios.items()}}


if __name__ == "__main__":
    main()
