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
FLOAT64, TIMESTAMP, DATE, BOOL = pa.float64(), pa.timestamp("us", tz="UTC"), pa.date32(), pa.bool_()
SPLITS = ("train", "validation", "calibration", "test")
CandidateSource = Literal["annotated", "sampled", "mined", "engagement"]
SOURCES: tuple[CandidateSource, ...] = ("annotated", "sampled", "mined", "engagement")

JUDGES: tuple[str, ...] = ("expert", "human")
"""Sources of a training pair whose grade is no labeller's."""

CONSENSUS = "consensus"
"""Who judged in the ledger's human rows that are no expert's verdict."""

JUDGES_PREFIX = "judges:"
"""Begins the expert of a verdict that labellers gave together; no person's name does."""


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

_DAY = Column("event_day", DATE, "day on which it happened", "UTC", nullable=True)
_DELIVERY = Column("delivery", STRING, "folder of the log that brought it, below events/; a dot: none")
_FILE = Column("file", STRING, "file of the log, below events/")

LOGGED_EVENT = TableSpec(
    "logged_event",
    "Rows of shops' logs as they came, typed, each judged by itself; what days are made of, whenever rows come late.",
    "spark",
    ("dataset", "delivery", "file", "event_id"),
    (
        _DATASET,
        _DELIVERY,
        _FILE,
        Column("event_id", STRING, "as logged, else by content; rows that came twice share it"),
        Column("session_id", STRING, "visit, where the log tells", nullable=True),
        Column("visitor_id", STRING, "shopper or browser, where the log tells", nullable=True),
        Column("query_id", STRING, "query, where the log tells", nullable=True),
        Column("query", STRING, "text of the query, where the log tells", nullable=True),
        Column("normalised", STRING, "its normal form", nullable=True),
        Column("product_id", STRING, "product", nullable=True),
        Column("kind", STRING, "impression, click, cart or purchase", nullable=True),
        Column("position", INT32, "place in the result list, first is 1", "rank", nullable=True),
        Column("event_time", TIMESTAMP, "when it happened, freed of the skew of the shopper's clock", "UTC", True),
        Column("user_agent", STRING, "browser, where the log tells", nullable=True),
        Column("content", INT64, "hash of what the row tells", nullable=True),
        Column("reason", STRING, "why the row is no event; null where it is one", nullable=True),
        Column("row", STRING, "the row as read, where it is no event", "JSON or raw text", nullable=True),
        _DAY,
    ),
    partition_by=("dataset", "event_day", "delivery"),
)

SEARCH_EVENT = TableSpec(
    "search_event",
    "What shoppers saw and did, one row per event.",
    "spark",
    ("dataset", "event_day", "event_id"),
    (
        _DATASET,
        Column("event_id", STRING, "event, unique within data set and day"),
        Column("session_id", STRING, "visit in which it happened"),
        _QUERY_ID,
        _PRODUCT_ID,
        Column("kind", STRING, "impression, click, cart or purchase"),
        Column("position", INT32, "place in the result list, first is 1", "rank"),
        Column("event_time", TIMESTAMP, "when it happened", "UTC"),
        Column("visitor_id", STRING, "shopper or browser, where the log tells", nullable=True),
        _DAY,
    ),
    partition_by=("dataset", "event_day"),
    checks=(
        ("kind_is_known", "kind IN ('impression', 'click', 'cart', 'purchase')"),
        ("position_is_a_rank", "position >= 1"),
    ),
)

PLACE_COUNT = TableSpec(
    "place_count",
    "Events of a day by pair and place: all that click model and engagement need, and what adds up over days.",
    "spark",
    ("dataset", "event_day", "query_id", "product_id", "position"),
    (
        *_PAIR,
        Column("position", INT32, "place in the result list, first is 1", "rank"),
        Column("impressions", INT64, "times shown", "events"),
        Column("clicks", INT64, "clicks", "events"),
        Column("carts", INT64, "cart additions", "events"),
        Column("purchases", INT64, "purchases", "events"),
        _DAY,
    ),
    partition_by=("dataset", "event_day"),
)

LOGGED_QUERY = TableSpec(
    "logged_query",
    "Queries of a day's events that the table query lacks; their ids are made of their normal forms.",
    "spark",
    ("dataset", "event_day", "query_id"),
    (
        _DATASET,
        _QUERY_ID,
        Column("text", STRING, "the query as typed most often that day"),
        Column("normalised", STRING, "its normal form"),
        Column("num_visits", INT64, "visits in which it was asked", "visits"),
        Column("num_events", INT64, "its events", "events"),
        _DAY,
    ),
    partition_by=("dataset", "event_day"),
)

EVENT_QUARANTINE = TableSpec(
    "event_quarantine",
    "Rows of logs that count as no event, with the reason; replaced with the delivery or the day that they are of.",
    "spark",
    ("dataset", "part", "delivery", "file", "row"),
    (
        _DATASET,
        Column("part", STRING, "delivery=... of rows refused by themselves, day=... of those refused beside others"),
        _DELIVERY,
        _FILE,
        Column("row", STRING, "the row as read, or as typed", "JSON or raw text"),
        Column("reason", STRING, "why it was refused"),
    ),
    partition_by=("dataset", "part"),
)

EVENT_TALLY = TableSpec(
    "event_tally",
    "What became of every file of a log; rows = kept + quarantined + repeated + passed over, for each file.",
    "delta-rs",
    ("dataset", "delivery", "file", "event_day"),
    (
        _DATASET,
        _DELIVERY,
        _FILE,
        Column("event_day", STRING, "day of the rows; empty: those refused by themselves", "YYYY-MM-DD"),
        Column("num_rows", INT64, "rows read; one that shows a product and its click counts twice", "rows"),
        Column("num_kept", INT64, "rows in search_event", "rows"),
        Column("num_quarantined", INT64, "rows in event_quarantine", "rows"),
        Column("num_repeated", INT64, "rows equal to a kept one", "rows"),
        Column("num_passed_over", INT64, "rows about no product: searches, filters, lines of a bulk format", "rows"),
        Column("fingerprint", STRING, "size and time of the file, and how it was read", "hex"),
        Column("judged", STRING, "how the day was judged", "hex"),
        _RUN,
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
        Column("guideline", STRING, "version of the guideline it was given under, where known", nullable=True),
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
        *(
            Column(
                f"p{grade}",
                FLOAT64,
                f"probability of grade {grade} by all marks and by how each annotator marks; none by majority",
                "0..1",
                nullable=True,
            )
            for grade in Grade
        ),
        Column(
            "method",
            STRING,
            "majority, dawid_skene, gold (a known grade among the marks' pairs) or verdict",
            nullable=True,
        ),
    ),
    checks=(
        _GRADE_CHECK,
        ("marks_are_counted_from_1", "num_marks >= 1"),
        ("agreement_is_a_share", "agreement > 0 AND agreement <= 1"),
        ("shares_fall_with_the_grade", "at_least_2 >= 0 AND at_least_2 <= at_least_1 AND at_least_1 <= 1"),
    ),
)

GOLD_QUESTION = TableSpec(
    "gold_question",
    "Pairs whose grade is known, put among annotators' work to see how they mark.",
    "spark",
    ("dataset", "query_id", "product_id"),
    (
        *_PAIR,
        _grade("the known grade"),
        Column("source", STRING, "who or what set it, where told", nullable=True),
        Column("note", STRING, "why this grade, where told", nullable=True),
        Column("guideline", STRING, "version of the guideline it holds under, where told", nullable=True),
    ),
    checks=(_GRADE_CHECK,),
)

ANNOTATOR_CONFUSION = TableSpec(
    "annotator_confusion",
    "How each annotator marks pairs of each grade, by Dawid-Skene; nine rows per annotator.",
    "spark",
    ("dataset", "kind", "annotator", "scale", "true_grade", "grade"),
    (
        _DATASET,
        Column(
            "kind",
            STRING,
            "annotator (named), anonymous (all marks of a scale without a name) or pooled (all marks of the data set)",
        ),
        Column("annotator", STRING, "who, where kind is annotator", nullable=True),
        Column("scale", STRING, "scale of the marks, where kind is anonymous", nullable=True),
        Column("true_grade", INT8, "grade of the pair", "0 irrelevant, 1 partial, 2 exact"),
        Column("grade", INT8, "grade marked", "0 irrelevant, 1 partial, 2 exact"),
        Column("probability", FLOAT64, "of this mark for a pair of the true grade, drawn to the pooled one", "0..1"),
        Column("marks", FLOAT64, "marks expected here, since true grades are not known for sure", "marks"),
        Column("num_marks", FLOAT64, "all marks of the annotator; twice the same pair is one", "marks"),
        Column("true_share", FLOAT64, "pairs of the true grade in the data set", "0..1"),
    ),
)
DAWID_SKENE_ROUND = TableSpec(
    "dawid_skene_round",
    "Rounds of the fit of annotators and grades.",
    "spark",
    ("dataset", "stage", "round"),
    (
        _DATASET,
        Column("stage", STRING, "pooled (one matrix for all marks) or annotators (one each, drawn to the pooled one)"),
        Column("round", INT32, "running number within the stage, first is 1"),
        Column("log_likelihood", FLOAT64, "of all marks, and of the gold grades", "nats"),
        Column("log_posterior", FLOAT64, "the same with the priors, which no round lowers", "nats"),
        Column("change", FLOAT64, "largest change of a probability of the matrices or of a grade's share"),
    ),
)


def _with_interval(name: str, meaning: str, unit: str) -> tuple[Column, ...]:
    ends = ((f"{name}_low", "lower end of its 95 % interval"), (f"{name}_high", "upper end of its 95 % interval"))
    return tuple(Column(column, FLOAT64, told, unit, nullable=True) for column, told in ((name, meaning), *ends))


_SLICE_VALUE = Column("value", STRING, "the category, annotator or guideline version; empty for all")
_KAPPA = (
    "quadratic-weighted kappa of single marks with the majority of the pair's other raters, where these have one; "
    "null below min_marks"
)
ANNOTATOR_QUALITY = TableSpec(
    "annotator_quality",
    "How each named annotator marks beside the others and beside gold, one row per slice.",
    "spark",
    ("dataset", "annotator", "slice", "value"),
    (
        _DATASET,
        Column("annotator", STRING, "who gave the marks"),
        Column("slice", STRING, "all, category (of the product) or guideline (version)"),
        _SLICE_VALUE,
        Column("num_marks", INT64, "single marks; of several marks of one pair the first", "marks"),
        Column("num_compared", INT64, "those whose pair has a majority of other raters", "marks"),
        Column("agreement", FLOAT64, "share of the compared that equal it", "0..1", nullable=True),
        Column("bias", FLOAT64, "mean of mark less majority; above 0 marks too high", "steps", nullable=True),
        *_with_interval("kappa", _KAPPA, "-1..1"),
        Column("num_gold", INT64, "marks of pairs with a known grade: gold questions and experts' verdicts", "marks"),
        Column("num_verdicts", INT64, "those known by a verdict; the audit picks pairs in doubt, so these are hard"),
        *_with_interval("gold_accuracy", "share of the marks of known pairs that are right", "0..1"),
        Column("gold_bias", FLOAT64, "mean of mark less known grade", "steps", nullable=True),
    ),
)
ANNOTATION_AGREEMENT = TableSpec(
    "annotation_agreement",
    "How raters agree with each other, one row per slice; rows that hold a mean of raters are left out.",
    "spark",
    ("dataset", "slice", "value"),
    (
        _DATASET,
        Column("slice", STRING, "all, category (of the product), guideline (version) or annotator (pairs of one)"),
        _SLICE_VALUE,
        Column("num_pairs", INT64, "pairs with two marks or more", "pairs"),
        Column("num_marks", INT64, "their marks", "marks"),
        *_with_interval("alpha_ordinal", "Krippendorff's alpha, ordinal; null where all marks are one grade", "-1..1"),
        *_with_interval("alpha_interval", "the same, interval", "-1..1"),
        *_with_interval("alpha_nominal", "the same, nominal", "-1..1"),
        Column("num_compared", INT64, "marks whose pair has a majority of other raters", "marks"),
        *_with_interval("kappa", _KAPPA, "-1..1"),
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
        Column("log_likelihood", FLOAT64, "of the clicks of pairs shown at several places; no round lowers it", "nats"),
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
                (rate, "drawn to what the query and the pair's share of its looks let expect"),
                (f"{rate}_low", "lower end of the 95 % interval"),
                (f"{rate}_high", "upper end of the 95 % interval"),
            )
        ),
        Column(
            "attraction",
            FLOAT64,
            "clicks per look that the pair's clicks, carts and purchases together let expect",
            "0..1",
            nullable=True,
        ),
    ),
    checks=(
        ("counts_are_counts", "impressions >= 0 AND clicks >= 0 AND carts >= 0 AND purchases >= 0"),
        ("expectation_and_rate_are_positive", "expected_clicks >= 0 AND corrected_rate > 0"),
        *(
            (f"{rate}_is_a_rate", f"{rate} IS NULL OR ({rate} >= 0 AND {rate} <= 1)")
            for rate in ("click_rate", "cart_rate", "purchase_rate", "attraction")
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
        Column(
            "found_at",
            TIMESTAMP,
            "when the run began that found the pair in doubt; later runs keep it while the doubt lasts",
            "UTC",
            nullable=True,
        ),
    ),
    checks=(_GRADE_CHECK, ("counts_are_counts", "impressions >= 0 AND clicks >= 0 AND purchases >= 0")),
)
AUDIT_VERDICT = TableSpec(
    "audit_verdict",
    "What an expert decided of a doubtful pair; the newest row of a pair counts. Append-only.",
    "delta-rs",
    ("dataset", "query_id", "product_id", "expert", "decided_at"),
    (
        *_PAIR,
        _grade("the expert's grade"),
        Column("expert", STRING, "who decided; judges: and fingerprints where labellers did"),
        Column("decided_at", TIMESTAMP, "when", "UTC"),
        Column("note", STRING, "why", nullable=True),
        Column("guideline", STRING, "version of the guideline that was decided under", nullable=True),
        Column("batch", STRING, "batch of review_queue that asked for it", nullable=True),
    ),
    checks=(_GRADE_CHECK,),
)
_BATCH = Column("batch", STRING, "review- and the run of build_review that queued the pair")
REVIEW_QUEUE = TableSpec(
    "review_queue",
    "Doubtful pairs drawn for review, batch by batch, with the evidence as it was then.",
    "spark",
    ("batch", "dataset", "query_id", "product_id"),
    (
        _BATCH,
        *_PAIR,
        Column("rank", INT32, "place in the batch, first is 1; any beginning holds both parts in their shares", "rank"),
        Column("traffic", STRING, "head, torso or tail: which share of its data set's impressions the query carries"),
        Column("category", STRING, "first level of the product's category; empty where it has none"),
        Column("kind", STRING, "kind of the conflict; with data set, traffic and category it makes the stratum"),
        Column("stratum_size", INT64, "conflicts of the stratum that waited for review", "pairs"),
        Column(
            "inclusion_probability",
            FLOAT64,
            "chance with which the pair was drawn; null where it came by its priority",
            "0..1",
            nullable=True,
        ),
        *(
            column
            for column in AUDIT_CONFLICT.columns
            if column not in _PAIR and column.name not in ("kind", "stratum")
        ),
        _CREATED,
    ),
    partition_by=("batch",),
    checks=(
        _GRADE_CHECK,
        ("traffic_is_known", "traffic IN ('head', 'torso', 'tail')"),
        ("inclusion_is_a_chance", "inclusion_probability IS NULL OR inclusion_probability BETWEEN 0 AND 1"),
    ),
)
REVIEW_GRADE = TableSpec(
    "review_grade",
    "What labellers that were asked again say of queued pairs; the grades are rows of the ledger too.",
    "delta-rs",
    ("batch", "dataset", "query_id", "product_id", "labeller"),
    (
        _BATCH,
        *_PAIR,
        Column("labeller", STRING, "fingerprint of the labeller"),
        _grade("the labeller's grade"),
        *_PROBABILITIES,
        _RUN,
        _CREATED,
    ),
    partition_by=("batch",),
    checks=(_GRADE_CHECK,),
)
ROUTES = ("kept", "changed", "to_expert")
REVIEW_ROUTE = TableSpec(
    "review_route",
    "Where the labellers' agreement leads a queued pair.",
    "delta-rs",
    ("batch", "dataset", "query_id", "product_id"),
    (
        _BATCH,
        *_PAIR,
        Column(
            "route",
            STRING,
            "kept: all labellers give the human grade; changed: all give one other grade, surely enough, and that was "
            "accepted; to_expert: the rest",
        ),
        Column(
            "joint_grade",
            INT8,
            "most probable grade by the mean of their probabilities; null where one gave none",
            "0, 1, 2",
            nullable=True,
        ),
        Column("least_probability", FLOAT64, "that the least sure of them gives it", "0..1", nullable=True),
        Column("labellers", STRING, "their fingerprints, joined by blanks"),
        _RUN,
        _CREATED,
    ),
    partition_by=("batch",),
    checks=(("route_is_known", f"route IN {ROUTES}"),),
)
AUDIT_REPORT = TableSpec(
    "audit_report",
    "What the reviews found, one row per part of the queue and slice.",
    "delta-rs",
    ("run_id", "part", "slice", "name"),
    (
        _RUN,
        Column("part", STRING, "random: tells of all conflicts; priority: tells of itself; all: of both, where said"),
        Column(
            "slice",
            STRING,
            "all, dataset, traffic, category, kind, stratum, guideline, batch, or figure for those of the paper",
        ),
        Column("name", STRING, "value of the slice; empty for all"),
        Column("num_queued", INT64, "pairs asked", "pairs"),
        Column("num_judged", INT64, "pairs of these with a verdict, or kept by labellers", "pairs"),
        Column("num_changed", INT64, "pairs of these whose verdict is not the human grade", "pairs"),
        Column("num_up", INT64, "pairs of these whose verdict is above it", "pairs"),
        Column(
            "stands_for",
            FLOAT64,
            "conflicts of the strata with judged random pairs; null where nothing is drawn from",
            "pairs",
            nullable=True,
        ),
        Column("share", FLOAT64, "share changed, or the figure; of random pairs weighted", "0..1", nullable=True),
        Column(
            "low", FLOAT64, "lower end of its 95 % interval, Wilson's, over several strata Yan and Su's", nullable=True
        ),
        Column("high", FLOAT64, "upper end", nullable=True),
        Column("up_share", FLOAT64, "share of the changed that went up, weighted alike", "0..1", nullable=True),
        _CREATED,
    ),
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
        Column("shard", INT32, "file of vectors that held the product, as numbered in embedding_manifest"),
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
    "Files of product vectors that a catalogue uses, one row per file.",
    "delta-rs",
    ("model", "dataset", "catalog", "shard"),
    (
        _RUN,
        _DATASET,
        Column("model", STRING, "fingerprint of the encoder"),
        Column("catalog", STRING, "fingerprint of the catalogue"),
        Column("shard", INT32, "number of the file among the catalogue's, first is 0"),
        Column("path", STRING, "file, relative to the lake"),
        Column("num_rows", INT64, "vectors in the file", "rows"),
        Column("width", INT32, "length of a vector"),
        Column("sha256", STRING, "hash of the file", "hex"),
        Column("kind", STRING, "numbers that it holds: float32, float16 or int8", nullable=True),
        Column("num_used", INT64, "products of the catalogue whose vectors lie in it", "rows", nullable=True),
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
        LOGGED_EVENT,
        SEARCH_EVENT,
        PLACE_COUNT,
        LOGGED_QUERY,
        EVENT_QUARANTINE,
        EVENT_TALLY,
        HUMAN_ANNOTATION,
        ANNOTATION_CONSENSUS,
        GOLD_QUESTION,
        ANNOTATOR_CONFUSION,
        DAWID_SKENE_ROUND,
        ANNOTATOR_QUALITY,
        ANNOTATION_AGREEMENT,
        CLICK_MODEL,
        CLICK_MODEL_ROUND,
        ENGAGEMENT,
        AUDIT_CONFLICT,
        AUDIT_VERDICT,
        REVIEW_QUEUE,
        REVIEW_GRADE,
        REVIEW_ROUTE,
        AUDIT_REPORT,
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
