"""Every table of the lake: columns with meaning and unit, key, the one engine that writes it.

Engines derive their types from these specifications and tables are created only from them. docs/tables.md is
generated from this file.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

Engine = Literal["spark", "delta-rs"]

STRING, INT8, INT32, INT64 = pa.string(), pa.int8(), pa.int32(), pa.int64()
FLOAT64, TIMESTAMP, BOOL = pa.float64(), pa.timestamp("us", tz="UTC"), pa.bool_()
SPLITS = ("train", "validation", "calibration", "test")
CandidateSource = Literal["annotated", "sampled", "mined", "engagement"]
SOURCES: tuple[CandidateSource, ...] = ("annotated", "sampled", "mined", "engagement")

JUDGES: tuple[str, ...] = ("expert", "human")
"""Sources of a training pair whose grade is no labeller's."""

CONSENSUS = "consensus"
"""Who judged in the ledger's human rows that are no expert's verdict."""


class Grade(enum.IntEnum):
    """How well a product answers a query, under the guideline."""

    IRRELEVANT = 0
    PARTIAL = 1
    EXACT = 2


@dataclass(frozen=True)
class Column:
    """One column: its Arrow type and what a reader must know of it."""

    name: str
    type: pa.DataType
    meaning: str
    unit: str = ""
    nullable: bool = False


@dataclass(frozen=True)
class TableSpec:
    """A table as the lake creates and guards it.

    Attributes:
        writer: the only engine that writes the table; all engines read it.
        key: columns whose values are unique together.
        partition_by: columns by whose values a part of the table is replaced.
        checks: Delta CHECK constraints, name -> SQL condition.
    """

    name: str
    meaning: str
    writer: Engine
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    partition_by: tuple[str, ...] = ()
    checks: tuple[tuple[str, str], ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, with nullability as specified."""
        return pa.schema([pa.field(column.name, column.type, nullable=column.nullable) for column in self.columns])

    @property
    def column_names(self) -> list[str]:
        """Column names in order."""
        return [column.name for column in self.columns]


_DATASET = Column("dataset", STRING, "data set the row belongs to; ids are unique within it")
_QUERY_ID = Column("query_id", STRING, "query, unique within the data set")
_PRODUCT_ID = Column("product_id", STRING, "product, unique within the data set")
_PAIR = (_DATASET, _QUERY_ID, _PRODUCT_ID)
_RUN = Column("run_id", STRING, "run that wrote the row")
_CREATED = Column("created_at", TIMESTAMP, "when the row was written", "UTC")
_PROBABILITIES = tuple(
    Column(f"p{grade}", FLOAT64, f"calibrated probability of grade {grade}", "0..1") for grade in Grade
)
_GRADE_CHECK = ("grade_is_0_1_2", "grade IN (0, 1, 2)")


def _grade(meaning: str) -> Column:
    return Column("grade", INT8, meaning, "0 irrelevant, 1 partial, 2 exact")


CATALOG_PRODUCT = TableSpec(
    "catalog_product",
    "Products of the catalogue, cleaned, one row each.",
    "spark",
    ("dataset", "product_id"),
    (
        _DATASET,
        _PRODUCT_ID,
        Column("title", STRING, "name of the product"),
        Column("description", STRING, "free text", nullable=True),
        Column("brand", STRING, "brand or maker", nullable=True),
        Column("category", STRING, 'taxonomy path, levels joined by " > "', nullable=True),
        Column("attributes", STRING, '"name: value" pairs joined by "; "', nullable=True),
        Column("price", FLOAT64, "price", "the catalogue's currency", nullable=True),
        Column("product_hash", STRING, "sha256 over the text fields; equal texts share it", "hex"),
    ),
)

QUERY = TableSpec(
    "query",
    "Queries with the split that every later step obeys.",
    "spark",
    ("dataset", "query_id"),
    (
        _DATASET,
        _QUERY_ID,
        Column("text", STRING, "the query as typed, trimmed"),
        Column(
            "normalised",
            STRING,
            "lower case, punctuation that carries no meaning and repeated blanks removed",
        ),
        Column("query_hash", STRING, "sha256 of text", "hex"),
        Column("split", STRING, "train, validation, calibration or test; by hash of the normalised text"),
        Column("given_split", STRING, "train or test as the data set gave it", nullable=True),
    ),
    checks=(("split_is_known", f"split IN {SPLITS}"),),
)

SEARCH_EVENT = TableSpec(
    "search_event",
    "What shoppers saw and did, one row per event.",
    "spark",
    ("dataset", "event_id"),
    (
        _DATASET,
        Column("event_id", STRING, "event, unique within the data set"),
        Column("session_id", STRING, "visit in which it happened"),
        _QUERY_ID,
        _PRODUCT_ID,
        Column("kind", STRING, "impression, click, cart or purchase"),
        Column("position", INT32, "place in the result list, first is 1", "rank"),
        Column("event_time", TIMESTAMP, "when it happened", "UTC"),
    ),
    checks=(
        ("kind_is_known", "kind IN ('impression', 'click', 'cart', 'purchase')"),
        ("position_is_a_rank", "position >= 1"),
    ),
)

HUMAN_ANNOTATION = TableSpec(
    "human_annotation",
    "Marks that people gave, as given, with the grade each maps to.",
    "spark",
    ("dataset", "query_id", "product_id", "annotator", "mark_number"),
    (
        *_PAIR,
        Column("annotator", STRING, "who gave the mark, where known", nullable=True),
        Column("mark_number", INT32, "running number of the mark within its pair and annotator, first is 1"),
        Column("mark", STRING, "the mark as given"),
        Column("scale", STRING, "scale the mark stands on"),
        Column("num_marks", INT32, "raters behind the mark; above 1 where only their mean is known", "raters"),
        _grade("grade the mark maps to"),
        Column("grade_value", FLOAT64, "the mark on the scale of grades; a mean of raters may lie between two", "0..2"),
    ),
    checks=(
        _GRADE_CHECK,
        ("grade_value_is_a_grade", "grade_value BETWEEN 0 AND 2"),
        ("marks_are_counted_from_1", "num_marks >= 1 AND mark_number >= 1"),
    ),
)

ANNOTATION_CONSENSUS = TableSpec(
    "annotation_consensus",
    "One human grade per pair; an expert's verdict takes the place of the marks.",
    "spark",
    ("dataset", "query_id", "product_id"),
    (
        *_PAIR,
        _grade("consensus of the marks, or the expert's verdict"),
        Column("num_marks", INT32, "raters behind it", "raters"),
        Column("agreement", FLOAT64, "share of the marks that equal the grade", "0..1"),
        Column(
            "at_least_1", FLOAT64, "share of the raters at grade 1 or 2; a mean between grades counts in part", "0..1"
        ),
        Column("at_least_2", FLOAT64, "share of the raters at grade 2, likewise", "0..1"),
        Column("judge", STRING, "human (marks) or expert (verdict)"),
    ),
    checks=(
        _GRADE_CHECK,
        ("marks_are_counted_from_1", "num_marks >= 1"),
        ("agreement_is_a_share", "agreement > 0 AND agreement <= 1"),
        ("shares_fall_with_the_grade", "at_least_2 >= 0 AND at_least_2 <= at_least_1 AND at_least_1 <= 1"),
    ),
)

CLICK_MODEL = TableSpec(
    "click_model",
    "How often shoppers look at each place of a result list, by a position-based click model.",
    "spark",
    ("dataset", "first_position"),
    (
        _DATASET,
        Column("first_position", INT32, "first place of a bin of places that count as one", "rank"),
        Column("examination", FLOAT64, "looks per impression there; 1 at the first place", "0..1"),
        Column("impressions", INT64, "products shown there", "events"),
        Column("clicks", INT64, "clicks there", "events"),
        Column("converged", BOOL, "whether the fit came to rest; with too few clicks there is none, and 1 everywhere"),
    ),
    checks=(
        ("examination_is_a_share", "examination > 0 AND examination <= 1"),
        ("clicks_are_shown", "first_position >= 1 AND clicks >= 0 AND clicks <= impressions"),
    ),
)
CLICK_MODEL_ROUND = TableSpec(
    "click_model_round",
    "Rounds of the fit of the click model.",
    "spark",
    ("dataset", "round"),
    (
        _DATASET,
        Column("round", INT32, "running number, first is 1"),
        Column("log_likelihood", FLOAT64, "of all impressions with and without a click", "nats"),
        Column("log_posterior", FLOAT64, "the same with the prior of the attraction, which no round lowers", "nats"),
        Column("change", FLOAT64, "largest change of an examination"),
    ),
    checks=(("round_is_counted_from_1", "round >= 1"),),
)
ENGAGEMENT = TableSpec(
    "engagement",
    "Behaviour per pair, freed of the places at which products were shown.",
    "spark",
    ("dataset", "query_id", "product_id"),
    (
        *_PAIR,
        Column("impressions", INT64, "times shown", "events"),
        Column("clicks", INT64, "clicks", "events"),
        Column("carts", INT64, "cart additions", "events"),
        Column("purchases", INT64, "purchases", "events"),
        Column(
            "expected_clicks",
            FLOAT64,
            "clicks an average product would have had at these positions",
            "events",
        ),
        Column("corrected_rate", FLOAT64, "(clicks + prior) / (expected clicks + prior); 1 is average"),
        Column(
            "examinations", FLOAT64, "impressions by how often shoppers look at their places", "looks", nullable=True
        ),
        Column("breadth", FLOAT64, "products over which the query's clicks spread", "products", nullable=True),
        Column(
            "stratum", INT32, "class of the query by breadth, 1 the narrowest; 0: fewer than two clicks", nullable=True
        ),
        *(
            Column(name, FLOAT64, f"{what} per look, {told}", "0..1", nullable=True)
            for rate, what in (("click_rate", "clicks"), ("cart_rate", "carts"), ("purchase_rate", "purchases"))
            for name, told in (
                (rate, "drawn to the mean of the query's class"),
                (f"{rate}_low", "lower end of the 95 % interval"),
                (f"{rate}_high", "upper end of the 95 % interval"),
            )
        ),
    ),
    checks=(
        ("counts_are_counts", "impressions >= 0 AND clicks >= 0 AND carts >= 0 AND purchases >= 0"),
        ("expectation_and_rate_are_positive", "expected_clicks >= 0 AND corrected_rate > 0"),
        *(
            (f"{rate}_is_a_rate", f"{rate} IS NULL OR ({rate} >= 0 AND {rate} <= 1)")
            for rate in ("click_rate", "cart_rate", "purchase_rate")
        ),
    ),
)
AUDIT_CONFLICT = TableSpec(
    "audit_conflict",
    "Pairs whose human grade is in doubt, with the evidence.",
    "spark",
    ("dataset", "query_id", "product_id"),
    (
        *_PAIR,
        Column(
            "kind", STRING, "first rule met: loved_but_irrelevant, ignored_but_exact, labeller_disagrees or doubtful"
        ),
        _grade("the human grade in doubt"),
        Column("num_marks", INT32, "raters behind it", "raters", nullable=True),
        Column("impressions", INT64, "times shown", "events"),
        Column("clicks", INT64, "clicks", "events"),
        Column("purchases", INT64, "purchases", "events"),
        Column("corrected_rate", FLOAT64, "clicks over expected clicks; 1 is average, and for a pair nobody saw"),
        Column("stratum", INT32, "class of the query by breadth, 1 the narrowest; 0: unknown", nullable=True),
        Column("click_rate", FLOAT64, "clicks per look", "0..1", nullable=True),
        Column("click_rate_low", FLOAT64, "lower end of its 95 % interval", "0..1", nullable=True),
        Column("click_rate_high", FLOAT64, "upper end of its 95 % interval", "0..1", nullable=True),
        *(
            Column(f"p{grade}", FLOAT64, f"probability of {grade} by the labeller", "0..1", nullable=True)
            for grade in range(3)
        ),
        *(
            Column(f"posterior_{grade}", FLOAT64, f"probability of {grade} from all evidence", "0..1", nullable=True)
            for grade in range(3)
        ),
        Column("wrong_probability", FLOAT64, "of the other grades together", "0..1", nullable=True),
        Column("expected_change", FLOAT64, "mean distance to the true grade", "steps", nullable=True),
        Column("priority", FLOAT64, "what a review is worth, larger first: expected change by traffic"),
    ),
    checks=(_GRADE_CHECK, ("counts_are_counts", "impressions >= 0 AND clicks >= 0 AND purchases >= 0")),
)
AUDIT_VERDICT = TableSpec(
    "audit_verdict",
    "What an expert decided of a doubtful pair; the newest row of a pair counts.",
    "spark",
    ("dataset", "query_id", "product_id", "decided_at"),
    (
        *_PAIR,
        _grade("the expert's grade"),
        Column("expert", STRING, "who decided"),
        Column("decided_at", TIMESTAMP, "when", "UTC"),
        Column("note", STRING, "why", nullable=True),
    ),
    checks=(_GRADE_CHECK,),
)

CANDIDATE_PAIR = TableSpec(
    "candidate_pair",
    "Pairs that wait for a grade of the labeller.",
    "spark",
    ("dataset", "query_id", "product_id", "source"),
    (
        *_PAIR,
        Column("source", STRING, "annotated (marks without consensus), sampled, mined or engagement"),
    ),
    partition_by=("source",),
    checks=(("source_is_known", f"source IN {SOURCES}"),),
)

PAIR_GRADE = TableSpec(
    "pair_grade",
    "The ledger: every grade ever given. Append-only; one row per address.",
    "delta-rs",
    ("address",),
    (
        Column(
            "address",
            STRING,
            "sha256 over guideline version, prompt, labeller, decoding, query text and product text; of a human row "
            "over who judged, the verdict and the texts",
            "hex",
        ),
        *_PAIR,
        Column("query_hash", STRING, "sha256 of the query's text", "hex"),
        Column("product_hash", STRING, "sha256 over the product's text fields", "hex"),
        _grade("most probable grade after calibration"),
        *_PROBABILITIES,
        Column("judge", STRING, "kind of judge: labeller, votes (several labellers) or human"),
        Column("labeller", STRING, "fingerprint of weights and calibration; of votes that of all; of a human row who"),
        Column("guideline", STRING, "version of the guideline; empty for people"),
        Column("prompt", STRING, "fingerprint of the prompt; empty for people", "hex"),
        Column("decoding", STRING, "task and decoding parameters; empty for people"),
        _RUN,
        _CREATED,
        Column(
            "supersedes", STRING, "address of the row that was the pair of texts' newest before", "hex", nullable=True
        ),
    ),
    checks=(_GRADE_CHECK,),
)

CLASS_RATE = TableSpec(
    "class_rate",
    "What a population of pairs that people did not choose adds to a labeller's log probabilities, by its class rates.",
    "delta-rs",
    ("labeller", "dataset", "source"),
    (
        Column("labeller", STRING, "fingerprint of the labeller"),
        _DATASET,
        Column("source", STRING, "source of the candidates that are the population"),
        *(
            Column(f"bias_{grade}", FLOAT64, f"added to the log probability of grade {grade}", "nats")
            for grade in Grade
        ),
        Column("num_pairs", INT64, "pairs of the population that people have graded", "pairs"),
        _RUN,
        _CREATED,
    ),
)

CATALOG_CANDIDATE = TableSpec(
    "catalog_candidate",
    "Pairs of the whole catalogue that may be relevant; the nightly run grades those of the greatest value first.",
    "delta-rs",
    ("dataset", "query_id", "product_id"),
    (
        *_PAIR,
        Column("query_hash", STRING, "sha256 of the query's text when the pair was found", "hex"),
        Column("product_hash", STRING, "sha256 over the product's text fields when the pair was found", "hex"),
        Column("sources", pa.list_(STRING), "what found it: engagement, lexical, embedding"),
        Column("cosine", FLOAT64, "cosine of query and product", "-1..1"),
        Column("coverage", FLOAT64, "weighted share of the query's words that the product holds", "0..1"),
        Column("relevance", FLOAT64, "chance of grade 1 or 2 that cosine and coverage give", "0..1"),
        Column("demand", FLOAT64, "searches of the query: most impressions of one of its products, and 1", "events"),
        Column("value", FLOAT64, "demand x relevance: searches in which the product has a chance to be shown"),
        Column("origin", STRING, "hash of encoder and recipe that found it", "hex"),
        _RUN,
    ),
)

TRAINING_INSTANCE = TableSpec(
    "training_instance",
    "One query with several graded products: what the encoder learns from. Train queries only.",
    "spark",
    ("stage", "dataset", "query_id"),
    (
        Column("stage", INT32, "1, or 2 (all original plus mined pairs)"),
        _DATASET,
        _QUERY_ID,
        Column("query", STRING, "text of the query"),
        Column("product_ids", pa.list_(STRING), "products, in id order"),
        Column("grades", pa.list_(INT8), "grade of each product", "0, 1, 2"),
        Column("sources", pa.list_(STRING), "where each pair comes from: human, expert, or the candidate's source"),
        Column(
            "at_least_1",
            pa.list_(FLOAT64),
            "of each pair, share of raters, or probability of the labeller, at grade 1 or 2",
            "0..1",
            nullable=True,
        ),
        Column("at_least_2", pa.list_(FLOAT64), "the same at grade 2", "0..1", nullable=True),
    ),
    partition_by=("stage",),
)

MINED_PAIR = TableSpec(
    "mined_pair",
    "Pairs found by nearest-neighbour search with an encoder, before they are graded.",
    "delta-rs",
    ("round", "dataset", "query_id", "product_id"),
    (
        *_PAIR,
        Column("rank", INT32, "place among the query's neighbours, first is 1", "rank"),
        Column("score", FLOAT64, "cosine of query and product", "-1..1"),
        Column("band", STRING, "top (rank <= k/2, may hold hard negatives) or tail (may hold hard positives)"),
        Column("shard", INT32, "shard of the catalogue that held the product"),
        Column("model", STRING, "fingerprint of the encoder"),
        Column("round", INT32, "mining round, first is 1"),
        _RUN,
        Column(
            "lowest_positive",
            FLOAT64,
            "lowest cosine of the query's products of its best grade, 1 or 2",
            "-1..1",
            nullable=True,
        ),
    ),
)

EMBEDDING_MANIFEST = TableSpec(
    "embedding_manifest",
    "Shard files of product vectors, one row per file.",
    "delta-rs",
    ("model", "dataset", "catalog", "shard"),
    (
        _RUN,
        _DATASET,
        Column("model", STRING, "fingerprint of the encoder"),
        Column("catalog", STRING, "fingerprint of the products encoded"),
        Column("shard", INT32, "number of the shard, first is 0"),
        Column("path", STRING, "shard file, relative to the lake"),
        Column("num_rows", INT64, "vectors in the file", "rows"),
        Column("width", INT32, "length of a vector"),
        Column("sha256", STRING, "hash of the file", "hex"),
    ),
)

EVALUATION = TableSpec(
    "evaluation",
    "Retrieval quality, one row per model and data set.",
    "delta-rs",
    ("run_id", "dataset", "model"),
    (
        _RUN,
        _DATASET,
        Column("model", STRING, "pretrained, stage1, stage2 or the folder's name"),
        Column("fingerprint", STRING, "fingerprint of the encoder"),
        Column("split", STRING, "queries judged: test, or all"),
        Column("num_queries", INT64, "queries measured", "queries"),
        Column("num_queries_left_out", INT64, "queries without a grade above 0", "queries"),
        Column("num_pairs", INT64, "judged pairs pooled for separation", "pairs"),
        Column("num_products", INT64, "catalogue searched", "products"),
        Column("metrics", pa.map_(STRING, FLOAT64), "metric -> value"),
        Column("gain_over_pretrained", pa.map_(STRING, FLOAT64), "metric -> mean paired difference to pretrained"),
        Column("gain_low", pa.map_(STRING, FLOAT64), "lower end of its 95 % bootstrap interval over queries"),
        Column("gain_high", pa.map_(STRING, FLOAT64), "upper end"),
        _CREATED,
    ),
)

EVALUATION_QUERY = TableSpec(
    "evaluation_query",
    "Metrics per query and model, behind the rows of evaluation.",
    "delta-rs",
    ("run_id", "dataset", "model", "query_id"),
    (
        _RUN,
        _DATASET,
        Column("model", STRING, "pretrained, stage1, stage2 or the folder's name"),
        _QUERY_ID,
        Column("query", STRING, "text of the query"),
        Column("metrics", pa.map_(STRING, FLOAT64), "metric -> value"),
        Column("top_product_ids", pa.list_(STRING), "the ten best products, best first"),
    ),
)

EVALUATION_PAIR = TableSpec(
    "evaluation_pair",
    "Score of every judged test pair under every model.",
    "delta-rs",
    ("run_id", "dataset", "model", "query_id", "product_id"),
    (
        _RUN,
        *_PAIR,
        Column("model", STRING, "pretrained, stage1, stage2 or the folder's name"),
        _grade("human consensus"),
        Column("score", FLOAT64, "cosine of query and product", "-1..1"),
    ),
)

LABELLER_OOF = TableSpec(
    "labeller_oof",
    "Grades of human-graded pairs by labellers that had not learned from them; what the audit compares people with.",
    "delta-rs",
    ("labeller", "dataset", "query_id", "product_id"),
    (
        *_PAIR,
        Column("fold", INT32, "part of the train queries that its labeller was tuned without; -1: not a train query"),
        _grade("human consensus"),
        *_PROBABILITIES,
        Column("labeller", STRING, "fingerprint of the labeller that was tuned on all train queries"),
        _RUN,
    ),
    checks=(_GRADE_CHECK,),
)

LABELLER_EVALUATION = TableSpec(
    "labeller_evaluation",
    "How judges of pairs agree with people on test queries, one row per judge, data set and slice.",
    "delta-rs",
    ("run_id", "dataset", "judge", "slice"),
    (
        _RUN,
        _DATASET,
        Column(
            "judge",
            STRING,
            "labeller by kind and fingerprint, votes of all, cosine of an encoder, or the commonest grade",
        ),
        Column("slice", STRING, "slice of the test pairs; empty for all; or 'injection: ' and the attack"),
        Column("num_pairs", INT64, "pairs measured", "pairs"),
        Column("num_queries", INT64, "their queries", "queries", nullable=True),
        Column("metrics", pa.map_(STRING, FLOAT64), "metric -> value"),
        Column("low", pa.map_(STRING, FLOAT64), "lower end of its 95 % bootstrap interval over queries"),
        Column("high", pa.map_(STRING, FLOAT64), "upper end"),
        Column("ece_floor", FLOAT64, "calibration error of a perfect judge on as many pairs", "0..1", nullable=True),
        Column(
            "confusion",
            pa.list_(INT64),
            "pairs by human grade, then by the judge's, nine numbers",
            "pairs",
            nullable=True,
        ),
        _CREATED,
    ),
)

RECIPE_COMPARISON = TableSpec(
    "recipe_comparison",
    "Training recipes at equal budget, one row per recipe and data set; values are means over seeds.",
    "delta-rs",
    ("run_id", "dataset", "recipe"),
    (
        _RUN,
        _DATASET,
        Column("recipe", STRING, "name of the recipe, or pretrained"),
        Column("rate_factor", FLOAT64, "of its learning rates, chosen on validation queries"),
        Column("seeds", pa.list_(INT64), "seeds of its trainings"),
        Column("texts", FLOAT64, "texts through the encoder per training, all stages", "texts"),
        Column("train_sec", FLOAT64, "per training, all stages", "s"),
        Column("validation_ndcg_10", FLOAT64, "of the chosen factor, first seed", "0..1", nullable=True),
        Column("num_queries", INT64, "test queries measured", "queries"),
        Column("metrics", pa.map_(STRING, FLOAT64), "metric -> value"),
        Column("gain_over_pretrained", pa.map_(STRING, FLOAT64), "metric -> mean paired difference to pretrained"),
        Column("gain_low", pa.map_(STRING, FLOAT64), "lower end of its 95 % bootstrap interval over queries"),
        Column("gain_high", pa.map_(STRING, FLOAT64), "upper end"),
        Column("reference_gain", pa.map_(STRING, FLOAT64), "metric -> what the reference recipe gains over this one"),
        Column("reference_low", pa.map_(STRING, FLOAT64), "lower end of its interval"),
        Column("reference_high", pa.map_(STRING, FLOAT64), "upper end"),
        _CREATED,
    ),
)

RUN_RECORD = TableSpec(
    "run_record",
    "What ran: inputs at their versions, outputs at theirs, counts and seconds.",
    "delta-rs",
    ("run_id",),
    (
        _RUN,
        Column("job", STRING, "the job"),
        Column("setting", STRING, "setting it ran with"),
        Column("fingerprint", STRING, "hash of recipe and inputs; equal prints are the same work", "hex"),
        Column("inputs", pa.map_(STRING, STRING), "table -> version, artifact -> fingerprint"),
        Column("outputs", pa.map_(STRING, STRING), "table -> version, artifact -> path in the lake"),
        Column("counts", pa.map_(STRING, INT64), "what was counted -> rows"),
        Column("metrics", pa.map_(STRING, FLOAT64), "what was measured -> value"),
        Column("recipe", STRING, "the recipe", "JSON"),
        Column("rows", INT64, "rows the run is about", "rows"),
        Column("seconds", FLOAT64, "wall time", "s"),
        Column("started_at", TIMESTAMP, "start", "UTC"),
        Column("code_version", STRING, "version of Assay"),
    ),
)

QUARANTINE = TableSpec(
    "quarantine",
    "Rows that could not be used, with the reason; nothing is dropped without a row here.",
    "delta-rs",
    ("run_id", "part", "row_number"),
    (
        _RUN,
        Column("part", STRING, "part of the run"),
        Column("row_number", INT64, "number of the row within the part, first is 0"),
        _DATASET,
        Column("table_name", STRING, "table the row was meant for"),
        Column("row", STRING, "the row as read", "JSON or raw text"),
        Column("reason", STRING, "why it was refused"),
        _CREATED,
    ),
)

TABLE_QUALITY = TableSpec(
    "table_quality",
    "What runs measured of their tables before they published them, and what was expected. Append-only.",
    "delta-rs",
    ("run_id", "table_name", "dataset", "metric"),
    (
        _RUN,
        Column("job", STRING, "the job"),
        Column("table_name", STRING, "table measured"),
        _DATASET,
        Column(
            "metric",
            STRING,
            "rows, null_rate/COLUMN, share/COLUMN/VALUE, median/COLUMN, or drift/COLUMN: Jensen-Shannon "
            "distance to the standard",
        ),
        Column("value", FLOAT64, "what was measured"),
        Column("at_least", FLOAT64, "smallest value expected", nullable=True),
        Column("at_most", FLOAT64, "largest value expected", nullable=True),
        Column("met", BOOL, "whether it was as expected"),
        Column(
            "published", BOOL, "whether the run published its tables; with a value not met it was told to accept it"
        ),
        Column("standard", STRING, "run whose rows it was compared with; the last that published", nullable=True),
        Column("quantiles", pa.list_(FLOAT64), "of a median: the column's 99 percentiles", nullable=True),
        _CREATED,
    ),
)

TABLES: dict[str, TableSpec] = {
    spec.name: spec
    for spec in (
        CATALOG_PRODUCT,
        QUERY,
        SEARCH_EVENT,
        HUMAN_ANNOTATION,
        ANNOTATION_CONSENSUS,
        CLICK_MODEL,
        CLICK_MODEL_ROUND,
        ENGAGEMENT,
        AUDIT_CONFLICT,
        AUDIT_VERDICT,
        CANDIDATE_PAIR,
        PAIR_GRADE,
        CLASS_RATE,
        CATALOG_CANDIDATE,
        TRAINING_INSTANCE,
        MINED_PAIR,
        EMBEDDING_MANIFEST,
        EVALUATION,
        EVALUATION_QUERY,
        EVALUATION_PAIR,
        LABELLER_OOF,
        LABELLER_EVALUATION,
        RECIPE_COMPARISON,
        RUN_RECORD,
        QUARANTINE,
        TABLE_QUALITY,
    )
}


def check_schema(spec: TableSpec, schema: pa.Schema, place: str = "") -> None:
    """Compares a schema with the specification, name by name; order does not matter, types do.

    Raises:
        ValueError: one sentence naming the column, what was expected and what came.
    """
    where = f"{place or spec.name}: "
    expected = {column.name: column for column in spec.columns}
    extra = [name for name in schema.names if name not in expected]
    if extra:
        raise ValueError(f"{where}column {extra[0]!r} is not in the table; drop it or add it to lake/schemas.py")
    for name, column in expected.items():
        index = schema.get_field_index(name)
        if index < 0:
            raise ValueError(f"{where}column {name!r} is missing; the job must give it")
        got = schema.field(index).type
        if _plain_type(got) != _plain_type(column.type):
            raise ValueError(f"{where}column {name!r} expected {column.type}, got {got}; cast it in the job")


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without what engines spell differently: large strings, names and nullability of list items."""
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return STRING
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    return kind
