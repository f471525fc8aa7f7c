"""Texts trained per second: ours beside sentence-transformers' trainer on the same instances, backbone and loss.

    python -m benchmarks.train_step [--quick] [--rounds N] [--loss supcon] [--dropout 0.0] [--device cuda] [--queries N]

  ours                   ContrastiveTrainer: each distinct text once per step, groups of like length, tokens kept from
                         an earlier epoch;
  ours_first_epoch       the same with texts that it has not seen before;
  ours_compiled          the same with a compiled backbone, compilation left out;
  sentence_transformers  SentenceTransformerTrainer with the same loss (`TrainerLoss`), a column per product;
  st_pairs               the same trainer with its own CoSENTLoss on rows of query, product and grade, as its users do;
  ours_in_passes         ours with texts_per_pass, for its memory;
  one_thread, two_workers  ours with one thread, and as two DDP processes of one thread each: what a second worker adds.

Each contestant of a round is a process of its own, one after the other, two threads, fused AdamW, the first steps left
out; items are queries and products, all of a row graded. Instances are those of Home Depot below ASSAY_DATA. With
--device cuda memory is that of the graphics card, and one_thread and two_workers are left out. The last line is JSON;
above 1 is ours better, `efficiency` is two_workers over twice one_thread, and `tflops` what ours computes of its texts'
own tokens, no padding counted, by six operations per token and weight of the layers and twelve per token, dimension and
token beside it; over the card's peak this is the MFU.
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
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from benchmarks.home_depot import judged_titles
from embeddings.batches import BatchRecipe, Instance, collate
from embeddings.recipes import EncoderRecipe, LossRecipe, LossTerm, TrainRecipe

if TYPE_CHECKING:
    from embeddings.training import ContrastiveTrainer

QUICK: Final = ("ours", "sentence_transformers", "st_pairs", "ours_in_passes")
CPU_ONLY: Final = ("one_thread", "two_workers")
CONTESTANTS: Final = (*QUICK, "ours_first_epoch", "ours_compiled", *CPU_ONLY)
NUM_PRODUCTS: Final = 8
TEXTS_PER_PASS: Final = 64
LEFT_OUT: Final = 2
"""First steps of a contestant, in which memory is taken and kernels are chosen."""
QUICK_STEPS, STEPS = 8, 24


@dataclass(frozen=True)
class Work:
    """What all contestants do.

    Attributes:
        root: folder of Home Depot's files.
        loss: its name.
        dropout: of the backbone.
        steps: that count.
        device: torch's name.
        queries: of a step.
        model: pretrained encoder.
    """

    root: Path
    loss: str
    dropout: float
    steps: int
    device: str
    queries: int
    model: str

    @property
    def encoder(self) -> EncoderRecipe:
        """Of every contestant."""
        return EncoderRecipe(model=self.model)

    def recipe(self, **changes: Any) -> TrainRecipe:
        """The same for all contestants: rate, loss, size of a step."""
        batch = BatchRecipe(queries_per_step=self.queries, max_products_per_query=NUM_PRODUCTS)
        terms = (LossTerm(loss=self.loss),)  # type: ignore[arg-type]
        return TrainRecipe(loss=LossRecipe(terms=terms), batch=batch, max_steps=1000, dropout=self.dropout, **changes)


def clock(device: str) -> float:
    """Seconds at which all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def home_depot_instances(root: Path) -> list[Instance]:
    """Queries with at least eight judged products, of which the first eight count, in the order of the file."""
    judged = judged_titles(root)
    found = []
    for query, graded in judged.items():
        titles = list(graded)[:NUM_PRODUCTS]
        grades = np.array([graded[title] for title in titles], dtype=np.int8)
        if len(titles) == NUM_PRODUCTS and np.unique(grades).size > 1:
            found.append(Instance(("home_depot", query), query, titles, grades))
    return found


def train_ours(
    instances: list[Instance],
    work: Work,
    *,
    rank: int = 0,
    world_size: int = 1,
    wrap: Any = None,
    compiled: bool = False,
    texts_per_pass: int = 0,
    first_epoch: bool = False,
) -> dict[str, float]:
    """Seconds of the steps that count, and what they computed, in teraflops."""
    from embeddings.encoder import build_encoder
    from embeddings.training import ContrastiveTrainer

    model = build_encoder(work.encoder, device=work.device)
    placement = {"rank": rank, "world_size": world_size} | ({"wrap": wrap} if wrap else {})
    recipe = work.recipe(texts_per_pass=texts_per_pass)
    trainer = ContrastiveTrainer(model, instances, recipe, compiled=compiled, **placement)
    if not first_epoch:
        for step in range(LEFT_OUT + work.steps):
            _tokens(trainer, step)
    started = 0.0
    for step in range(LEFT_OUT + work.steps):
        if step == LEFT_OUT:
            started = clock(work.device)
        trainer.train_step(step)
    seconds = clock(work.device) - started
    operations = sum(_operations(trainer, step) for step in range(LEFT_OUT, LEFT_OUT + work.steps))
    return {"seconds": seconds, "tflops": operations / seconds / 1e12}


def _tokens(trainer: ContrastiveTrainer, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Token tensors of the queries and of the products of a step, which the trainer keeps."""
    batch = collate(trainer.sampler.step_instances(step, trainer.rank, trainer.world_size))
    return trainer.tokens(batch.query_texts, "query"), trainer.tokens(batch.document_texts, "document")


def _operations(trainer: ContrastiveTrainer, step: int) -> float:
    """Floating-point operations of a step's texts, forward and backward, without padding."""
    from embeddings.backbone import layers_of

    layers, width = layers_of(trainer.model), trainer.model.get_embedding_dimension()
    weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    length_N = torch.cat([features["attention_mask"].sum(dim=1).double() for features in _tokens(trainer, step)])
    return float((6 * weights * length_N + 12 * len(layers) * width * length_N**2).sum())


def train_theirs(instances: list[Instance], work: Work, *, in_pairs: bool) -> dict[str, float]:
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
                self.started = clock(work.device)
            elif state.global_step == state.max_steps:
                self.seconds = clock(work.device) - self.started

    model, recipe = build_encoder(work.encoder, device=work.device), work.recipe()
    set_dropout(model, work.dropout)
    if in_pairs:
        pairs = [(one, place) for one in instances for place in range(NUM_PRODUCTS)]
        columns = {
            "query": [one.query for one, _ in pairs],
            "product": [one.products[place] for one, place in pairs],
            "label": [one.grades[place] / 2 for one, place in pairs],
        }
        loss: Any = CoSENTLoss(model)
        size = work.queries * NUM_PRODUCTS
    else:
        columns = {"query": [one.query for one in instances]}
        for place in range(NUM_PRODUCTS):
            columns[f"product_{place}"] = [one.products[place] for one in instances]
        columns["label"] = [one.grades.tolist() for one in instances]
        loss, size = TrainerLoss(model, recipe.loss), work.queries
    watch = Clock()
    with tempfile.TemporaryDirectory() as place:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=place,
            max_steps=LEFT_OUT + work.steps,
            per_device_train_batch_size=size,
            learning_rate=recipe.learning_rate,
            optim="adamw_torch_fused",
            bf16=has_fast_bf16(work.device),
            router_mapping={name: "query" if name == "query" else "document" for name in columns if name != "label"},
            use_cpu=work.device == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = Dataset.from_dict(columns)
        SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=rows, loss=loss, callbacks=[watch]
        ).train()
    return {"seconds": watch.seconds}


def _worker(rank: int, work: Work, place: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    wrap = torch.nn.parallel.DistributedDataParallel
    found = train_ours(home_depot_instances(work.root), work, rank=rank, world_size=2, wrap=wrap)
    Path(place, str(rank)).write_text(str(found["seconds"]))
    torch.distributed.destroy_process_group()


def two_workers(work: Work) -> dict[str, float]:
    """Seconds of the slower of two processes."""
    with tempfile.TemporaryDirectory() as place:
        torch.multiprocessing.spawn(_worker, args=(work, place), nprocs=2)
        return {"seconds": max(float(Path(place, str(rank)).read_text()) for rank in range(2))}


def measure(contestant: str, work: Work) -> dict[str, float]:
    """Items per second and peak memory of this process with one contestant."""
    instances = home_depot_instances(work.root)
    torch.set_num_threads(1 if contestant == "one_thread" else 2)
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "ours_compiled": lambda: train_ours(instances, work, compiled=True),
        "ours_first_epoch": lambda: train_ours(instances, work, first_epoch=True),
        "ours_in_passes": lambda: train_ours(instances, work, texts_per_pass=TEXTS_PER_PASS),
        "sentence_transformers": lambda: train_theirs(instances, work, in_pairs=False),
        "st_pairs": lambda: train_theirs(instances, work, in_pairs=True),
        "two_workers": lambda: two_workers(work),
    }
    found = runs.get(contestant, lambda: train_ours(instances, work))()
    items = work.queries * (1 + NUM_PRODUCTS) * work.steps
    on_card = work.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_card else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return {
        "items_per_sec": items / found["seconds"],
        "peak_gib": peak / 2**30,
        **({"tflops": found["tflops"]} if "tflops" in found else {}),
    }


def main() -> None:
    """Prints each round, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few steps and contestants, 3 minutes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loss", default="supcon")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the backbone, for all contestants")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--queries", type=int, default=32, help="of a step")
    parser.add_argument("--model", default=EncoderRecipe().model, help="name or folder of the pretrained encoder")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if "ASSAY_DATA" not in os.environ:
        sys.exit("train_step: set ASSAY_DATA to the folder that holds home_depot/train.csv")
    work = Work(
        root=Path(os.environ["ASSAY_DATA"], "home_depot"),
        loss=given.loss,
        dropout=given.dropout,
        steps=QUICK_STEPS if given.quick else STEPS,
        device=given.device,
        queries=given.queries,
        model=given.model,
    )
    if given.only:
        print(json.dumps(measure(given.only, work)))
        return
    names = [name for name in (QUICK if given.quick else CONTESTANTS) if given.device == "cpu" or name not in CPU_ONLY]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(1 if given.quick else given.rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.train_step", "--only", name, *sys.argv[1:]]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            found[name].append(json.loads(told))
            rate, memory = found[name][-1]["items_per_sec"], found[name][-1]["peak_gib"]
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
    if tflops := [one["tflops"] for one in found["ours"] if "tflops" in one]:
        told["tflops"] = round(median(tflops), 2)
    if "ours_compiled" in rate:
        ratios["compiled_sentence_transformers"] = rate["ours_compiled"] / rate["sentence_transformers"]
    if "two_workers" in rate:
        told["efficiency"] = round(rate["two_workers"] / (2 * rate["one_thread"]), 2)
    return told | {"ratios": {name: round(value, 2) for name, value in ratios.items()}}


if __name__ == "__main__":
    main()
