"""Pairs graded per second: ours beside naive and bare engines, on the same model, pairs, precision and threads.

    python -m benchmarks.label_throughput [--quick] [--rounds N]

Generative kind (folder smollm2-135m of ASSAY_MODELS): ours (Ray Data + vLLM, the shared prompt first, rows sorted by
query, one token under the mask) against
  vllm_chat_json  vLLM's chat interface in the order of the file: guideline, then the pair, the answer as JSON;
  hf_generate     Hugging Face generate in batches of 32 with our prompt and one new token;
  bare_vllm       our token ids in our order, given to vLLM, started as ours is, without Ray.
Classifier (all-MiniLM-L6-v2 of the extra demo): ours against
  hf_classifier_unsorted  transformers in batches of 32 in the order of the file.

Rates are steady-state: starts are apart, ours counts from the engine's first answers, which are left out, to its last.
Each round runs all contestants one after the other, the slow ones on fewer of the same pairs. Pairs are those of ESCI
below ASSAY_DATA. The last line is JSON; above 1 is ours faster. Its tokens are those computed, prompt and answer, and a
hit rate is the share of the prompts' tokens that came from the prefix cache.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.guideline import ProductFields, labeller_product_text, load_guideline, render_markdown
from embeddings.labeller import LabellerRecipe, PairEncoder, load_labeller_card, save_labeller
from ray_apps.label import OFFLINE, engine_arguments, label_pairs
from ray_apps.placements import LabelPlacement

THREADS = 2
KV_CACHE_GIB = 1
HF_BATCH = 32
MAX_JSON_TOKENS = 12
SAME_STEP_SECONDS = 0.2
QUICK = {"ours": 192, "bare_vllm": 192, "vllm_chat_json": 48, "hf_generate": 8, "classifier": 1000}
FULL = {"ours": 2048, "bare_vllm": 2048, "vllm_chat_json": 256, "hf_generate": 128, "classifier": 8000}

Timed = tuple[int, float]
"""Pairs graded, and the seconds they took."""


def esci_pairs(root: Path, num_pairs: int) -> pa.Table:
    """Judged pairs in an order that separates the pairs of a query, as a file from elsewhere would have them."""
    examples = pq.read_table(root / "shopping_queries_dataset_examples.parquet", columns=["query", "product_id"])
    names = ["product_id", "product_title", "product_brand"]
    products = pq.read_table(root / "shopping_queries_dataset_products.parquet", columns=names)
    joined = examples.join(products, "product_id", join_type="inner").sort_by(
        [("query", "ascending"), ("product_id", "ascending")]
    )
    joined = joined.rename_columns({"product_title": "title", "product_brand": "brand"}).select(
        ["query", "title", "brand"]
    )
    # all pairs of as few queries as are needed, then shuffled
    few = joined.slice(0, num_pairs)
    few = few.take(np.random.default_rng(0).permutation(len(few)))
    return few.append_column("address", pa.array([f"{row:08d}" for row in range(len(few))]))


def untuned(folder: Path, recipe: LabellerRecipe) -> str:
    """A labeller's folder of the pretrained weights: speed does not depend on what they have learned."""
    from embeddings.backbone import resolve_model
    from embeddings.labeller_model import build_labeller, save_weights

    encoder = PairEncoder(resolve_model(recipe.model), recipe, load_guideline(recipe.guideline))
    save_weights(build_labeller(recipe, encoder, device="cpu"), encoder, folder / "weights")
    save_labeller(
        folder / "weights",
        str(folder / "labeller"),
        recipe,
        grade_token_ids=encoder.grade_token_ids,
        calibrations={},
        metrics={},
    )
    return str(folder / "labeller")


class Ours:
    """Our way of grading, and what the engine told of it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.told: dict[str, float] = {}

    def grade(self, pairs: pa.Table) -> Timed:
        """From the engine's first answers to its last, by its own clock: what it did before is its start."""
        placement = LabelPlacement(
            engine="vllm", part_rows=64, batch_rows=64, threads_per_engine=THREADS, kv_cache_gib=KV_CACHE_GIB
        )
        cost = pa.concat_tables(label_pairs(pairs, self.folder, placement)).sort_by("answered")
        answered = cost["answered"].to_numpy()
        # the answers of a step come together, and the first step's work is no part of the time
        later = cost.filter(answered > answered[0] + SAME_STEP_SECONDS)
        prompt, cached = (sum(later[name].to_pylist()) for name in ("tokens", "cached_tokens"))
        self.told |= token_figures("ours", len(later), prompt, cached, new=len(later))
        return len(later), float(answered[-1] - answered[0])


def token_figures(name: str, pairs: int, prompt: int, cached: int, new: int) -> dict[str, float]:
    """Tokens computed per pair, and the share of the prompts' that were not."""
    return {
        f"{name}_tokens_per_pair": round((prompt - cached + new) / pairs, 1),
        f"{name}_prefix_hit_rate": round(cached / prompt, 3),
    }


def time_parts(parts: Iterator[pa.Table]) -> Timed:
    """Pairs of the parts that are still to come, and what they take."""
    began = time.monotonic()
    done = sum(map(len, parts))
    return done, time.monotonic() - began


class VllmPeers:
    """vLLM in this process, with ours and with its own settings.

    Args:
        folder: of the labeller.
        compiled: lets vLLM compile the model for the naive peer, as it does unless told otherwise.
    """

    def __init__(self, folder: str, recipe: LabellerRecipe, compiled: bool) -> None:
        from vllm import LLM

        self.guideline = load_guideline(recipe.guideline)
        self.encoder = PairEncoder(folder, recipe, self.guideline)
        self.recipe = recipe
        placement = LabelPlacement(threads_per_engine=THREADS, kv_cache_gib=KV_CACHE_GIB)
        self.engine = LLM(folder, **engine_arguments(load_labeller_card(folder), placement))
        longest = recipe.max_tokens + MAX_JSON_TOKENS
        self.naive = LLM(folder, dtype="float32", max_model_len=longest, enforce_eager=not compiled)
        self.told: dict[str, float] = {}

    def bare(self, pairs: pa.Table) -> Timed:
        """Our token ids in our order."""
        from vllm import SamplingParams, TokensPrompt

        ordered = pairs.sort_by([("query", "ascending"), ("address", "ascending")])
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in self.encoder.encode_rows(ordered)]
        allowed = list(self.encoder.grade_token_ids)
        sampling = SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=3, allowed_token_ids=allowed, detokenize=False
        )
        self.engine.reset_prefix_cache()
        warm = self.encoder.encode(["warm"], [ProductFields("up")])
        self.engine.generate([TokensPrompt(prompt_token_ids=warm[0])], sampling, use_tqdm=False)
        return self._timed("bare_vllm", lambda: self.engine.generate(prompts, sampling, use_tqdm=False))

    def chat_json(self, pairs: pa.Table) -> Timed:
        """The naive way: guideline and pair as a chat message, the answer as JSON."""
        from vllm import SamplingParams

        page = render_markdown(self.guideline)
        ask = 'Answer as JSON: {"grade": 0}, {"grade": 1} or {"grade": 2}.'

        def message(query: str, product: str) -> list[dict[str, str]]:
            return [{"role": "user", "content": f"{page}\n\nQuery: {query}\nProduct: {product}\n\n{ask}"}]

        messages = list(map(message, pairs["query"].to_pylist(), product_texts(pairs, self.recipe)))
        sampling = SamplingParams(max_tokens=MAX_JSON_TOKENS, temperature=0.0)
        self.naive.reset_prefix_cache()
        self.naive.chat([message("warm", "up")], sampling, use_tqdm=False)
        return self._timed("vllm_chat_json", lambda: self.naive.chat(messages, sampling, use_tqdm=False))

    def _timed(self, name: str, ask: Callable[[], Sequence[Any]]) -> Timed:
        """Times all questions at once, and keeps how many tokens they took."""
        began = time.monotonic()
        answers = ask()
        seconds = time.monotonic() - began
        prompt = sum(len(answer.prompt_token_ids) for answer in answers)
        cached = sum(answer.num_cached_tokens or 0 for answer in answers)
        new = sum(len(output.token_ids) for answer in answers for output in answer.outputs)
        self.told |= token_figures(name, len(answers), prompt, cached, new)
        return len(answers), seconds


def product_texts(pairs: pa.Table, recipe: LabellerRecipe) -> list[str]:
    """Products as the labeller reads them."""
    columns = (pairs[name].to_pylist() for name in ("title", "brand"))
    return [
        labeller_product_text(ProductFields(title, brand), recipe.text) for title, brand in zip(*columns, strict=True)
    ]


def time_hf_generate(pairs: pa.Table, folder: str, recipe: LabellerRecipe) -> Timed:
    """Our prompt, one new token, batches in the order of the file."""
    import torch
    from transformers import AutoModelForCausalLM

    from embeddings.labeller_model import padded

    encoder = PairEncoder(folder, recipe, load_guideline(recipe.guideline))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = encoder.encode_rows(pairs)
    began = time.monotonic()
    with torch.inference_mode():
        for start in range(0, len(tokens), HF_BATCH):
            ids, mask = padded(tokens[start : start + HF_BATCH], encoder.pad_id, left=True)
            model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=encoder.pad_id)
    return len(tokens), time.monotonic() - began


def time_hf_classifier(pairs: pa.Table, folder: str, recipe: LabellerRecipe) -> Timed:
    """Batches of 32 in the order of the file, each padded to its longest pair."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    queries, products = pairs["query"].to_pylist(), product_texts(pairs, recipe)
    began = time.monotonic()
    with torch.inference_mode():
        for start in range(0, len(queries), HF_BATCH):
            batch = tokenizer(
                queries[start : start + HF_BATCH],
                products[start : start + HF_BATCH],
                truncation="longest_first",
                max_length=recipe.max_tokens,
                padding=True,
                return_tensors="pt",
            )
            model(**batch).logits.softmax(-1)
    return len(queries), time.monotonic() - began


def compare_generative(
    models: Path, esci: Path, counts: dict[str, int], rounds: int, scratch: Path, compiled: bool
) -> dict[str, Any]:
    """Pairs per second of ours and its three peers."""
    recipe = LabellerRecipe(kind="generative", model=str(models / "smollm2-135m"), max_tokens=1536)
    folder = untuned(scratch / "generative", recipe)
    peers, ours = VllmPeers(folder, recipe, compiled), Ours(folder)
    pairs = esci_pairs(esci, counts["ours"])
    contestants: dict[str, Callable[[pa.Table], Timed]] = {
        "vllm_chat_json": peers.chat_json,
        "bare_vllm": peers.bare,
        "hf_generate": lambda few: time_hf_generate(few, folder, recipe),
        "ours": ours.grade,
    }
    rates = run_rounds(contestants, pairs, counts, rounds)
    return {"pairs_per_sec": rates, "tokens": peers.told | ours.told}


def compare_classifier(esci: Path, counts: dict[str, int], rounds: int, scratch: Path) -> dict[str, float]:
    """Pairs per second of ours in this process and of transformers."""
    recipe = LabellerRecipe()
    folder = untuned(scratch / "classifier", recipe)
    pairs = esci_pairs(esci, counts["classifier"])
    contestants: dict[str, Callable[[pa.Table], Timed]] = {
        "hf_classifier_unsorted": lambda few: time_hf_classifier(few, folder, recipe),
        "ours": lambda few: time_parts(label_pairs(few, folder, LabelPlacement(engine="torch"))),
    }
    return run_rounds(contestants, pairs, dict.fromkeys(contestants, counts["classifier"]), rounds)


def run_rounds(
    contestants: dict[str, Callable[[pa.Table], Timed]], pairs: pa.Table, counts: dict[str, int], rounds: int
) -> dict[str, float]:
    """Median pairs per second of each contestant over the rounds."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            done, seconds = run(pairs.slice(0, counts[name]))
            found[name].append(done / seconds)
            print(f"{name}: {done} pairs in {seconds:.1f} s, {done / seconds:.1f} pairs/s", flush=True)
    return {name: float(np.median(rates)) for name, rates in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pairs, one round")
    parser.add_argument("--rounds", type=int, default=0, help="rounds; 1 with --quick, else 3")
    parser.add_argument("--compiled", action="store_true", help="lets vLLM compile the model for the chat")
    arguments = parser.parse_args(argv)
    data = os.environ.get("ASSAY_DATA", "")
    if not Path(data, "esci").is_dir():
        print("label_throughput: skipped, ASSAY_DATA names no folder with esci")
        return 0
    logging.basicConfig(level=logging.WARNING)
    os.environ |= OFFLINE | {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "OMP_NUM_THREADS": str(THREADS),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    import torch

    torch.set_num_threads(THREADS)
    counts, rounds = (QUICK, arguments.rounds or 1) if arguments.quick else (FULL, arguments.rounds or 3)
    told: dict[str, Any] = {"benchmark": "label_throughput", "threads": THREADS, "rounds": rounds}
    ratios: dict[str, float] = {}
    models = Path(os.environ.get("ASSAY_MODELS", ""))
    with tempfile.TemporaryDirectory() as scratch:
        rates = compare_classifier(Path(data, "esci"), counts, rounds, Path(scratch))
        told["classifier_pairs_per_sec"] = rates
        ratios["hf_classifier_unsorted"] = rates["ours"] / rates["hf_classifier_unsorted"]
        if (models / "smollm2-135m").is_dir():
            found = compare_generative(models, Path(data, "esci"), counts, rounds, Path(scratch), arguments.compiled)
            told |= {"generative_pairs_per_sec": found["pairs_per_sec"]} | found["tokens"]
            own = found["pairs_per_sec"]
            ratios |= {name: own["ours"] / rate for name, rate in own.items() if name != "ours"}
        else:
            print("label_throughput: generative kind skipped, ASSAY_MODELS names no folder with smollm2-135m")
    told["ratios"] = {name: round(value, 3) for name, value in ratios.items()}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
