"""Titles encoded per second on a processor: ours beside SentenceTransformer.encode on the same model and titles.

    python -m benchmarks.encoding [--quick] [--rounds N] [--texts N] [--threads N]

  ours_fp32, ours_bf16  `embeddings.encoder.encode`, as every job calls it;
  ours_int8             `embeddings.quantised.QuantisedEncoder.encode`, OpenVINO;
  st_fp32, st_bf16      sentence-transformers' encode with its defaults, in bfloat16 the whole model;
  st_int8               sentence-transformers with backend="openvino", statically quantised by optimum-intel as
                        `export_static_quantized_openvino_model` does, with our calibration texts. optimum-intel may
                        want another transformers than ours: ASSAY_PEER_PATH names a folder that it was installed into
                        (pip install --target), first on this contestant's path; without it the contestant is left out.

Titles are those below ASSAY_DATA/titles, each once, sorted by length; runs of neighbours are drawn evenly from them,
so that both meet the lengths and the padding of the whole catalogue. --texts 0 takes all. Each contestant of a round is
a process of its own, one after the other; loading, quantising and a first call on a few titles are apart. The quality
of int8 and bfloat16 is measured once on judged queries of Home Depot. The last line is JSON; ratios above 1: ours is
better. `per_cpu_sec` counts processor seconds instead of the clock's: other work on the machine slows threads that wait
for each other more than threads that do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.home_depot import judged_titles
from embeddings.backbone import resolve_model
from embeddings.recipes import EncoderRecipe

QUICK: Final = ("ours_fp32", "ours_int8", "st_fp32")
CONTESTANTS: Final = (*QUICK, "ours_bf16", "st_bf16", "st_int8")
RATIOS: Final = {
    "st_encode_fp32": ("ours_fp32", "st_fp32"),
    "st_encode_int8": ("ours_int8", "st_fp32"),
    "st_encode_bf16": ("ours_bf16", "st_bf16"),
    "st_int8_own_backend": ("ours_int8", "st_int8"),
}
RUN_LENGTH: Final = 128
"""Neighbouring titles that are drawn together: four batches of sentence-transformers."""
WARM_TEXTS: Final = 256


@dataclass(frozen=True)
class Work:
    """What all contestants do.

    Attributes:
        data: folder that holds titles/ and home_depot/.
        place: folder of the encoder and of what is quantised, the same for all rounds.
        texts: how many titles; 0 is all.
        threads: of torch and OpenVINO.
        calibration: texts that set the ranges of int8.
        queries: judged ones.
    """

    data: Path
    place: Path
    texts: int
    threads: int
    calibration: int
    queries: int

    @property
    def encoder(self) -> Path:
        """Folder of the pretrained encoder with identity heads."""
        return self.place / "encoder"

    @cache  # noqa: B019 - one work per process
    def titles(self) -> tuple[list[str], list[str]]:
        """Titles to encode, and others to calibrate with."""
        column = pq.read_table(self.data / "titles" / "titles.parquet", columns=["title"])["title"]
        known = sorted({title for title in column.to_pylist() if title}, key=lambda title: (len(title), title))
        num_runs = len(known) // RUN_LENGTH
        wanted = min(num_runs, -(-self.texts // RUN_LENGTH)) if self.texts else num_runs
        starts = {int(run) * RUN_LENGTH for run in np.linspace(0, num_runs - 1, wanted)}
        chosen = [title for start in sorted(starts) for title in known[start : start + RUN_LENGTH]]
        others = sorted(set(known) - set(chosen)) or known
        rng = np.random.default_rng(0)
        rng.shuffle(chosen)
        return chosen, [others[row] for row in rng.choice(len(others), self.calibration)]


def build_ours(contestant: str, work: Work) -> Callable[[Sequence[str]], Any]:
    """Our way to encode documents."""
    from embeddings.encoder import encode, load_encoder
    from embeddings.quantised import load_quantised

    if contestant == "ours_int8":
        cache = work.place / "cache"
        return load_quantised(work.encoder, "document", cache=cache, calibration=work.titles()[1]).encode
    model, _ = load_encoder(work.encoder)
    return lambda texts: encode(model, texts, "document", bf16=contestant == "ours_bf16")


def build_theirs(contestant: str, work: Work) -> Callable[[Sequence[str]], Any]:
    """SentenceTransformer.encode of the same model."""
    from sentence_transformers import SentenceTransformer

    if contestant == "st_int8":
        folder = work.place / "peer_int8"
        if not folder.is_dir():
            quantise_theirs(folder, work)
        options = {"ov_config": {"INFERENCE_NUM_THREADS": work.threads}}
        model = SentenceTransformer(str(folder), device="cpu", backend="openvino", model_kwargs=options)
        model.max_seq_length = EncoderRecipe().max_document_tokens
        return partial(model.encode, normalize_embeddings=True)
    options = {"dtype": torch.bfloat16 if contestant == "st_bf16" else torch.float32}
    model = SentenceTransformer(str(work.encoder), device="cpu", model_kwargs=options)
    # heads are loaded in float32 whatever the backbone
    return model.to(options["dtype"]).encode_document  # type: ignore[no-any-return]


def quantise_theirs(folder: Path, work: Work) -> None:
    """The pretrained model for sentence-transformers' OpenVINO backend, in int8."""
    os.environ.update(CI="true", NNCF_CI="1")  # neither package is to report its use
    from datasets import Dataset
    from optimum.intel import OVConfig, OVQuantizationConfig, OVQuantizer
    from sentence_transformers import SentenceTransformer

    source = resolve_model(EncoderRecipe().model)
    model = SentenceTransformer(source, device="cpu", backend="openvino", model_kwargs={"export": True})
    limit = EncoderRecipe().max_document_tokens
    rows = [dict(model.tokenizer(text, truncation=True, max_length=limit)) for text in work.titles()[1]]
    config = OVConfig(quantization_config=OVQuantizationConfig(bits=8, num_samples=len(rows)))
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        fresh = Path(place, "fresh")
        shutil.copytree(source, fresh)
        quantiser = OVQuantizer.from_pretrained(model[0].auto_model)
        quantiser.quantize(calibration_dataset=Dataset.from_list(rows), save_directory=str(fresh), ov_config=config)
        fresh.rename(folder)


def measure(contestant: str, work: Work) -> dict[str, float]:
    """Texts per second of the clock and of the processor, and seconds until the first."""
    torch.set_num_threads(work.threads)
    texts, _ = work.titles()
    started = time.monotonic()
    encode = (build_ours if contestant.startswith("ours") else build_theirs)(contestant, work)
    encode(texts[:WARM_TEXTS])
    began, cpu = time.monotonic(), time.process_time()
    encode(texts)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
    return {
        "per_sec": len(texts) / seconds,
        "per_cpu_sec": len(texts) / cpu_seconds,
        "start_sec": began - started,
    }


def home_depot_queries(root: Path, num_queries: int) -> tuple[list[str], list[str], list[dict[int, int]], list[str]]:
    """Judged queries, all of their titles, grades by title's row, and other queries to calibrate with."""
    judged = judged_titles(root)
    names = sorted(judged)
    np.random.default_rng(0).shuffle(names)
    queries, others = names[:num_queries], names[num_queries:]
    titles = sorted({title for query in queries for title in judged[query]})
    row = {title: index for index, title in enumerate(titles)}
    return queries, titles, [{row[title]: grade for title, grade in judged[query].items()} for query in queries], others


def quality(work: Work) -> dict[str, Any]:
    """Parity reports of int8 and bfloat16 on Home Depot."""
    from embeddings.encoder import SIDES, encode, load_encoder
    from embeddings.parity import compare_vectors
    from embeddings.quantised import load_quantised

    torch.set_num_threads(work.threads)
    queries, products, grades, others = home_depot_queries(work.data / "home_depot", work.queries)
    model, _ = load_encoder(work.encoder)
    texts = {"query": queries, "document": products}
    calibration = {"query": others[: work.calibration], "document": work.titles()[1]}
    exact = [encode(model, texts[side], side) for side in SIDES]
    placed = {
        "bf16": [encode(model, texts[side], side, bf16=True) for side in SIDES],
        "int8": [
            load_quantised(work.encoder, side, cache=work.place / "cache", calibration=calibration[side]).encode(
                texts[side]
            )
            for side in SIDES
        ],
    }
    reports = {name: compare_vectors(*exact, *vectors, grades=grades) for name, vectors in placed.items()}
    return {name: asdict(report) | {"ndcg_loss": report.ndcg_loss} for name, report in reports.items()}


def run_alone(name: str, place: Path) -> dict[str, Any]:
    """What a process of its own finds."""
    command = [sys.executable, "-m", "benchmarks.encoding", "--only", name, "--place", str(place), *sys.argv[1:]]
    environment = dict(os.environ)
    if name == "st_int8":
        paths = environment["ASSAY_PEER_PATH"], environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return dict(json.loads(told.splitlines()[-1]))


def prepare(work: Work) -> None:
    """Writes the encoder that all contestants load."""
    from embeddings.encoder import build_encoder, save_encoder
    from embeddings.text import TextRecipe

    recipe = EncoderRecipe()
    save_encoder(build_encoder(recipe), work.encoder, {"text": TextRecipe(), "encoder": recipe})


def main() -> None:
    """Prints each round, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of three contestants, 4 minutes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=8192, help="titles to encode, 0 for all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if "ASSAY_DATA" not in os.environ:
        sys.exit("encoding: set ASSAY_DATA to the folder that holds titles/titles.parquet and home_depot/train.csv")
    with tempfile.TemporaryDirectory() as place:
        work = Work(
            data=Path(os.environ["ASSAY_DATA"]),
            place=given.place or Path(place),
            texts=given.texts,
            threads=given.threads,
            calibration=64 if given.quick else 300,
            queries=64 if given.quick else 1000,
        )
        if given.only:
            print(json.dumps(quality(work) if given.only == "quality" else measure(given.only, work)))
            return
        prepare(work)
        names = list(QUICK if given.quick else CONTESTANTS)
        if "st_int8" in names and "ASSAY_PEER_PATH" not in os.environ:
            print("st_int8 is left out: ASSAY_PEER_PATH names no folder with optimum-intel", flush=True)
            names.remove("st_int8")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(1 if given.quick else given.rounds):
            for name in names:
                found[name].append(run_alone(name, work.place))
                rounded = {key: round(value, 1) for key, value in found[name][-1].items()}
                print(f"round {number + 1}: {name} {json.dumps(rounded)}", flush=True)
        print(json.dumps(summary(found) | {"parity": run_alone("quality", work.place)}))


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds, and ours over the peer."""
    middle = {
        unit: {name: median(one[unit] for one in rounds) for name, rounds in found.items()}
        for unit in ("per_sec", "per_cpu_sec", "start_sec")
    }

    def ratios(rate: dict[str, float]) -> dict[str, float]:
        pairs = {name: pair for name, pair in RATIOS.items() if set(pair) <= set(rate)}
        return {name: round(rate[ours] / rate[peer], 2) for name, (ours, peer) in pairs.items()}

    told: dict[str, Any] = {unit: {name: round(value, 1) for name, value in of.items()} for unit, of in middle.items()}
    return told | {"ratios_cpu": ratios(middle["per_cpu_sec"]), "ratios": ratios(middle["per_sec"])}


if __name__ == "__main__":
    main()
