"""The labeller apart from its weights: recipe, card, the tokens of a pair, calibration, the folder it is kept in.

Two kinds behind one interface: `classifier` (query and product in one sequence, a head of three classes) and
`generative` (a causal LM that answers one grade token). Either kind turns a pair into token ids, and those into
three logits; training, plain torch and vLLM all see the same ids, so their probabilities agree.

Importing this module does not import torch: a job's settings need the recipe only.
"""

# N pairs

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from conf.load import ConfigError, meaning, settings, validate
from embeddings.anchors import ANCHOR_FILE, write_anchors
from embeddings.calibration import Calibration, Decision
from embeddings.evidence import ENCODER_FOLDER, EVIDENCE_FILE, EvidenceHead
from embeddings.guideline import (
    SHARED_BLOCK_TOKENS,
    Guideline,
    LabellerKind,
    ProductFields,
    guideline_source,
    labeller_product_text,
    load_guideline,
    neutralise,
    products_of,
    prompt_fingerprint,
    prompt_segments,
    render_markdown,
)
from embeddings.text import TextRecipe
from lake.storage import atomic_folder

CARD_FILE = "assay_labeller.json"
GUIDELINE_FILE = "guideline.yaml"
GRADE_WORDS = ("0", "1", "2")
MIN_PRODUCT_TOKENS = 16
"""A prompt that leaves less than this to the product is refused: the title would be cut."""

LABELLER_TEXT = TextRecipe(
    clauses=("{title}", "by {brand}", "in {category}", "{description}"), max_description_chars=160
)


@settings
class LabellerRecipe:
    """Which model becomes the labeller, and how it is fine-tuned."""

    kind: Annotated[LabellerKind, meaning("classifier: head of three classes; generative: one grade token")] = (
        "classifier"
    )
    model: Annotated[str, meaning("Hugging Face name or folder of the backbone")] = "all-MiniLM-L6-v2"
    guideline: Annotated[str, meaning("version of the guideline, or its YAML file")] = "v1"
    text: Annotated[TextRecipe, meaning("what the labeller reads of a product")] = LABELLER_TEXT
    max_tokens: Annotated[int, meaning("longest pair; the longer of query and product is cut", "tokens", ge=16)] = 128
    tuning: Annotated[Literal["full", "lora"], meaning("all weights, or low-rank adapters merged at the end")] = "full"
    lora_rank: Annotated[int, meaning("rank of the adapters", ge=1)] = 16
    epochs: Annotated[float, meaning("passes over the pairs, or a part of one; 0: as pretrained", "epochs", ge=0)] = 3.0
    batch_size: Annotated[int, meaning("pairs of a step, over all workers", "pairs", ge=1)] = 32
    learning_rate: Annotated[float, meaning("peak rate", gt=0)] = 1e-4
    warmup_share: Annotated[float, meaning("share of the steps with a rising rate; then it falls to 0", ge=0, le=1)] = (
        0.1
    )
    weight_decay: Annotated[float, meaning("AdamW's decay of matrices", ge=0)] = 0.01
    dropout: Annotated[
        float | None, meaning("of the backbone while it is tuned; null takes the backbone's own", ge=0, lt=1)
    ] = None
    targets: Annotated[
        Literal["soft", "hard"],
        meaning("soft: the shares of raters at or above each grade, which differ where people do; hard: the consensus"),
    ] = "soft"
    loss: Annotated[
        Literal["ordinal", "cross_entropy"],
        meaning("ordinal: of P(grade >= 1) and P(grade >= 2), which knows that 0 is further from 2 than from 1"),
    ] = "ordinal"
    preference_weight: Annotated[
        float,
        meaning("weight, beside the grades' loss, of that by which of two products of a query is better", ge=0),
    ] = 0.0
    preference_wide_share: Annotated[
        float,
        meaning("share of that loss on wide preferences, as of grade 2 to 0; the rest on narrow ones", ge=0, le=1),
    ] = 0.5
    random_irrelevant_per_query: Annotated[
        int, meaning("random products added as grade 0 per train query", "products", ge=0)
    ] = 1
    """The pairs to be graded are mostly random products, which annotated sets hardly hold; without these the
    labeller has never seen its commonest case."""
    class_weights: Annotated[
        Literal["none", "balanced"], meaning("balanced weighs grades by inverse frequency and distorts probabilities")
    ] = "none"
    keep_epoch: Annotated[Literal["best", "last"], meaning("best: by quadratic kappa on validation queries")] = "best"
    patience: Annotated[
        int | None, meaning("passes without a better kappa after which tuning stops; null: never", "epochs", ge=1)
    ] = None
    decision: Annotated[
        Decision,
        meaning(
            "a judged pair's grade: by cuts that give grades at people's rates, or the most probable, oftener right"
        ),
    ] = "rates"
    evidence: Annotated[
        Literal["none", "words", "encoder"],
        meaning(
            "what is weighed beside the answer where train pairs are 1,000: words, their rarity and likeness; encoder, "
            "besides what baseline_model says of tokens and neighbours, which costs what a small labeller does"
        ),
    ] = "words"
    few_shot_per_grade: Annotated[
        int, meaning("train pairs of each grade shown in a generative labeller's prompt", "pairs", ge=0)
    ] = 0
    folds: Annotated[
        int, meaning("labellers tuned besides, each without one part of the train queries, which it grades", ge=0)
    ] = 0
    """Their grades, of pairs that the grading labeller has not learned from, go to the table labeller_oof."""
    baseline_model: Annotated[str, meaning("encoder whose cosine is the baseline, and which evidence asks")] = (
        "all-MiniLM-L6-v2"
    )
    precision: Annotated[
        Literal["auto", "fp32", "bf16"],
        meaning("of training; auto: bf16 where hardware computes it, unless deterministic"),
    ] = "auto"
    deterministic: Annotated[bool, meaning("bit-equal reruns on equal machines, threads and workers")] = False
    seed: Annotated[int, meaning("of order, random pairs, head and dropout", ge=0)] = 0

    def __post_init__(self) -> None:
        if self.few_shot_per_grade and self.kind != "generative":
            raise ValueError("few_shot_per_grade: only a prompt shows examples; give kind=generative, or 0")
        if self.patience and self.keep_epoch == "last":
            raise ValueError("patience: stops by the best epoch; give keep_epoch=best, or null")


@settings
class LabellerCard:
    """What a labeller's folder says of itself."""

    kind: Annotated[LabellerKind, meaning("kind")]
    guideline: Annotated[str, meaning("version of the guideline")]
    prompt: Annotated[str, meaning("fingerprint of the prompt")]
    text: Annotated[TextRecipe, meaning("what is read of a product")]
    max_tokens: Annotated[int, meaning("longest pair", "tokens")]
    grade_token_ids: Annotated[tuple[int, ...], meaning("tokens of the grades 0, 1, 2; empty for a classifier")]
    calibrations: Annotated[
        dict[str, Calibration], meaning("of a data set's judged pairs, by data set; '' is that of any other pairs")
    ]
    metrics: Annotated[dict[str, float], meaning("agreement with people, and calibration")]
    fingerprint: Annotated[str, meaning("hash of weights, tokenizer, evidence and all above but the metrics")]

    @property
    def decoding(self) -> str:
        """The task and its decoding parameters, part of every grade's address."""
        return "classify" if self.kind == "classifier" else "generate max_tokens=1 allowed=0,1,2 temperature=0"

    def address(self, query_hash: str, product_hash: str) -> str:
        """Content address of the grade that this labeller gives a pair of texts."""
        parts = (self.guideline, self.prompt, self.fingerprint, self.decoding, query_hash, product_hash)
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


class PairEncoder:
    """Turns pairs into token ids, cut to fit: of a classifier's pair the longer side first, of a prompt the product.

    A prompt cuts its query only where that would leave less than 16 tokens to the product, and itself never. What
    stands before the product is filled up with blank lines to whole blocks of an engine's cache, so that of a query's
    further pairs the engine computes the product alone.

    Args:
        source: folder or name of the tokenizer.
        card: kind, text recipe and token limit, of a recipe or a card.
        guideline: only the generative kind reads it.

    Raises:
        ConfigError: the model reads fewer tokens, the prompt leaves the product no room, or a grade is not one token.
    """

    def __init__(self, source: str, card: LabellerRecipe | LabellerCard, guideline: Guideline) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.kind, self.text, self.max_tokens = card.kind, card.text, card.max_tokens
        if self.max_tokens > self.tokenizer.model_max_length:
            raise ConfigError(
                f"recipe.max_tokens={self.max_tokens}: {source} reads "
                f"{self.tokenizer.model_max_length}; give at most that"
            )
        if self.kind == "generative":
            self.grade_token_ids = grade_token_ids(self.tokenizer, source)
            self._fixed = [self._ids(segment) for segment in prompt_segments(guideline)]
            if self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]:
                self._fixed[0].insert(0, self.tokenizer.bos_token_id)
            room = self.max_tokens - sum(map(len, self._fixed))
            if room < 2 * MIN_PRODUCT_TOKENS:
                raise ConfigError(
                    f"recipe.max_tokens={self.max_tokens}: the prompt of guideline {guideline.version} leaves "
                    f"{room} tokens to query and product; give at least {self.max_tokens - room + 128}"
                )
            self._room = room
            blank = self._ids("\n")
            self._blank = blank if len(blank) == 1 else []
        else:
            self.grade_token_ids = ()

    @property
    def pad_id(self) -> int:
        """Token that fills a batch; it is masked out, so any will do where the tokenizer has none."""
        return int(self.tokenizer.pad_token_id or 0)

    def encode(self, queries: Sequence[str], products: Sequence[ProductFields]) -> list[list[int]]:
        """Token ids of each pair."""
        asked = [neutralise(query) for query in queries]
        shown = [labeller_product_text(product, self.text) for product in products]
        if not asked:
            return []
        if self.kind == "classifier":
            # segment ids stay 0 in training as well: engines that are given ids cannot know them
            encoded = self.tokenizer(asked, shown, truncation="longest_first", max_length=self.max_tokens)
            return [list(ids) for ids in encoded["input_ids"]]
        before, between, after = self._fixed
        pairs = []
        for query, product in zip(map(self._ids, asked), map(self._ids, shown), strict=True):
            kept = query[: self._room - MIN_PRODUCT_TOKENS]
            kept += self._blank * self._to_whole_blocks(len(kept))
            pairs.append([*before, *kept, *between, *product[: self._room - len(kept)], *after])
        return pairs

    def _to_whole_blocks(self, query_tokens: int) -> int:
        """Blank lines after a query with which all that stands before the product ends with a block; 0 without room."""
        before, between, _ = self._fixed
        missing = -(len(before) + query_tokens + len(between)) % SHARED_BLOCK_TOKENS
        return missing if query_tokens + missing + MIN_PRODUCT_TOKENS <= self._room else 0

    def encode_rows(self, rows: pa.Table) -> list[list[int]]:
        """Token ids of rows with columns query and title and any other text column of a product."""
        return self.encode(rows["query"].to_pylist(), products_of(rows))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def grade_token_ids(tokenizer: Any, source: str) -> tuple[int, ...]:
    """The single tokens of the grades 0, 1 and 2.

    Raises:
        ConfigError: the tokenizer needs several tokens for one of them.
    """
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in GRADE_WORDS]
    if any(len(item) != 1 for item in ids) or len({item[0] for item in ids}) != len(ids):
        raise ConfigError(
            f"model={source}: expected one token for each of 0, 1 and 2, got {ids}; "
            "choose a model whose tokenizer has single digits, or kind=classifier"
        )
    return tuple(int(item[0]) for item in ids)


def violations(probability_N3: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Marks answers that are no distribution: not finite, negative, or not summing to 1 within 1e-3."""
    finite_N = np.isfinite(probability_N3).all(axis=1)
    with np.errstate(invalid="ignore"):
        off_N = np.abs(probability_N3.sum(axis=1) - 1) > 1e-3
    return np.asarray(~finite_N | (probability_N3 < 0).any(axis=1) | off_N)


def save_labeller(
    weights: str | Path,
    target: str,
    recipe: LabellerRecipe,
    *,
    grade_token_ids: tuple[int, ...],
    calibrations: Mapping[str, Calibration],
    metrics: Mapping[str, float],
    head: EvidenceHead | None = None,
    anchors: pa.Table | None = None,
) -> LabellerCard:
    """Makes a labeller's folder of a Hugging Face folder, card, guideline, evidence and anchors, all or nothing."""
    guideline = load_guideline(recipe.guideline)
    essentials: dict[str, Any] = {
        "kind": recipe.kind,
        "guideline": guideline.version,
        "prompt": prompt_fingerprint(guideline, recipe.kind, recipe.text, recipe.max_tokens),
        "text": dataclasses.asdict(recipe.text),
        "max_tokens": recipe.max_tokens,
        "grade_token_ids": list(grade_token_ids),
        "calibrations": {name: dataclasses.asdict(found) for name, found in calibrations.items()},
    }
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    files = sorted(path for path in Path(weights).iterdir() if path.is_file())
    for path in files:
        digest.update(_digest_of_file(path))
    if head is not None:
        digest.update(head.text().encode())
        if head.evidence.encoder:
            for path in sorted(path for path in Path(head.evidence.encoder).rglob("*") if path.is_file()):
                digest.update(_digest_of_file(path))
    values = {**essentials, "metrics": dict(metrics), "fingerprint": digest.hexdigest()[:16]}
    with atomic_folder(target) as scratch:
        for path in files:
            shutil.copy(path, scratch / path.name)
        (scratch / GUIDELINE_FILE).write_text(guideline_source(recipe.guideline), encoding="utf-8")
        (scratch / CARD_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if head is not None:
            (scratch / EVIDENCE_FILE).write_text(head.text(), encoding="utf-8")
            if head.evidence.encoder:
                shutil.copytree(head.evidence.encoder, scratch / ENCODER_FOLDER)
        if anchors is not None:
            write_anchors(scratch, anchors)
    return load_labeller_card(target)


def _digest_of_file(path: Path) -> bytes:
    with path.open("rb") as stream:
        return path.name.encode() + hashlib.file_digest(stream, "sha256").digest()


def load_labeller_card(folder: str | Path) -> LabellerCard:
    """The card of a labeller's folder.

    Raises:
        ConfigError: the folder is no labeller's.
    """
    path = Path(folder, CARD_FILE)
    if not path.is_file():
        raise ConfigError(f"labeller={folder}: no {CARD_FILE} there; give a folder that tune_labeller wrote")
    return validate(LabellerCard, json.loads(path.read_text(encoding="utf-8")), source=str(path))


def load_pair_encoder(folder: str | Path) -> PairEncoder:
    """The encoder of pairs as the labeller in this folder was trained with, under its own copy of the guideline."""
    return PairEncoder(str(folder), load_labeller_card(folder), load_guideline(str(Path(folder, GUIDELINE_FILE))))


def export_labeller(source: str, out: str) -> None:
    """Copies a labeller as a Hugging Face folder with its guideline as a page and its calibration card.

    Raises:
        ConfigError: `source` is no labeller's folder, or `out` exists and is no exported labeller.
    """
    card, target = load_labeller_card(source), Path(out)
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not (target / CARD_FILE).is_file():
        raise ConfigError(f"out={out}: is there already and is no labeller's folder; give another out=DIR")
    guideline = load_guideline(str(Path(source, GUIDELINE_FILE)))
    with atomic_folder(str(target.absolute())) as scratch:
        # anchors are texts of the lake's shops
        shutil.copytree(source, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns(ANCHOR_FILE))
        (scratch / "guideline.md").write_text(render_markdown(guideline), encoding="utf-8")
        (scratch / "README.md").write_text(_readme(card), encoding="utf-8")


def _readme(card: LabellerCard) -> str:
    how = (
        "AutoModelForSequenceClassification; softmax of its three logits"
        if card.kind == "classifier"
        else f"AutoModelForCausalLM; softmax of the next token's logits over the tokens {list(card.grade_token_ids)}; "
        f"after the query stand blank lines, so that {SHARED_BLOCK_TOKENS} divides the tokens before the product"
    )
    rows = [f"| {name} | {value:.4f} |" for name, value in sorted(card.metrics.items())]
    return "\n".join(
        [
            "# Labeller",
            "",
            f"Grades (query, product) pairs 0, 1 or 2 under guideline {card.guideline} (guideline.md).",
            f"Kind {card.kind}: {how}; pairs are cut to {card.max_tokens} tokens, segment ids are 0.",
            f"Where there is an {EVIDENCE_FILE}, its head (embeddings/evidence.py of Assay) first weighs evidence",
            "beside the answer; without it the answers are only as good as the model, and no longer calibrated.",
            f"Calibrate by `calibrations` of {CARD_FILE}, one for the judged pairs of each data set, '' for any other",
            "pairs: divide log probabilities by `temperature`, add `bias`, normalise; then map P(grade >= 1) through",
            "the knots of `relevant` and P(grade 2 given grade >= 1) through those of `exact`, straight lines between.",
            "The grade is the number of `cuts` that the expected grade reaches; without cuts, the most probable one.",
            f"Fingerprint {card.fingerprint}, prompt {card.prompt}.",
            "",
            "Fitted on calibration queries, measured on test queries; `ece` is the expected calibration error.",
            "",
            "| metric | value |",
            "|---|---|",
            *rows,
            "",
        ]
    )
