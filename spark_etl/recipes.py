"""What the Spark jobs compute, as settings; free of Spark, so that a job's help needs no engine."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal

from conf.load import meaning, settings
from lake.schemas import TABLES, CandidateSource


@settings
class SplitRecipe:
    """Shares of the splits; test is what the other three leave."""

    train: Annotated[float, meaning("share of train queries", "0..1", gt=0, lt=1)] = 0.7
    validation: Annotated[float, meaning("share of validation queries", "0..1", gt=0, lt=1)] = 0.1
    calibration: Annotated[float, meaning("share of calibration queries", "0..1", gt=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        if self.train + self.validation + self.calibration > 1:
            raise ValueError("train + validation + calibration is above 1; the rest is the share of test")


@settings
class TableExpectations:
    """Bounds of one table that are not those of all; null takes those of all."""

    table: Annotated[str, meaning("the table")]
    min_rows: Annotated[int | None, meaning("fewest rows of a data set", "rows", ge=0)] = None
    max_row_drop: Annotated[float | None, meaning("largest loss of rows", "share", ge=0, le=1)] = None
    max_row_growth: Annotated[float | None, meaning("largest gain of rows", "share", ge=0)] = None
    max_null_rate_rise: Annotated[
        float | None, meaning("largest rise of a column's share of nulls", "0..1", ge=0, le=1)
    ] = None
    max_drift: Annotated[float | None, meaning("largest Jensen-Shannon distance of a column", "0..1", ge=0, le=1)] = (
        None
    )


@settings
class QualityRecipe:
    """When a run publishes nothing: its tables, data set by data set, against those last published by the same job.

    All bounds but `min_rows` leave room for chance beside them, the more the fewer rows there are.
    """

    BEARS_IDENTITY: ClassVar[bool] = False
    """A gate decides whether a result is published, not what it is."""

    min_rows: Annotated[int, meaning("fewest rows of a data set in each table", "rows", ge=0)] = 0
    max_row_drop: Annotated[float, meaning("largest loss of rows; 1: any", "share", ge=0, le=1)] = 0.2
    max_row_growth: Annotated[float, meaning("largest gain of rows; 1: they may double", "share", ge=0)] = 1.0
    max_null_rate_rise: Annotated[
        float, meaning("largest rise of a column's share of nulls; 1: any", "0..1", ge=0, le=1)
    ] = 0.1
    max_drift: Annotated[
        float,
        meaning(
            "largest Jensen-Shannon distance of a column's distribution, by values or tenths; 1: any",
            "0..1",
            ge=0,
            le=1,
        ),
    ] = 0.15
    tables: Annotated[tuple[TableExpectations, ...], meaning("tables with bounds of their own")] = ()
    accept: Annotated[
        str,
        meaning(
            "id of the run that was stopped: what it broke does not stop this run, once; "
            "all: nothing stops this run, for a single command"
        ),
    ] = ""

    def __post_init__(self) -> None:
        named = [own.table for own in self.tables]
        for table in named:
            if table not in TABLES or named.count(table) > 1:
                raise ValueError(f"quality.tables: {table!r} is no table, or named twice; docs/tables.md lists all")


@settings
class IngestRecipe:
    """What raw rows must look like, and how many may fail."""

    max_title_chars: Annotated[int, meaning("longest title; longer ones are quarantined", "characters", ge=1)] = 1000
    max_query_chars: Annotated[int, meaning("longest query; longer ones are quarantined", "characters", ge=1)] = 1000
    max_rejected_fraction: Annotated[
        float, meaning("share of a table's raw rows that may be quarantined before the run fails", "0..1", ge=0, le=1)
    ] = 0.1
    splits: SplitRecipe = SplitRecipe()
    quality: QualityRecipe = QualityRecipe()


EventSource = Literal["events", "ubi"]
LOG_COLUMNS = (
    "event_id",
    "session_id",
    "visitor_id",
    "query_id",
    "query",
    "locale",
    "product_id",
    "kind",
    "clicked",
    "position",
    "event_time",
    "sent_at",
    "received_at",
    "user_agent",
)
"""What a log of events may tell; see docs/operations.md for which of them a row needs."""


@settings
class EventLogRecipe:
    """How rows of a log are read as events."""

    source: Annotated[
        EventSource,
        meaning("events: a row per event; ubi: User Behavior Insights, as rows or in OpenSearch's bulk form"),
    ] = "events"
    columns: Annotated[dict[str, str], meaning("columns that the log names otherwise: our name -> the log's")] = field(
        default_factory=dict
    )
    first_position: Annotated[int, meaning("rank of the first product in the log", "rank", ge=0, le=1)] = 1
    locale: Annotated[str, meaning("language tag of queries that come without one; empty: none")] = ""
    day_of_delivery: Annotated[
        bool, meaning("rows without a time take the day in their folder's name, else they are refused")
    ] = False
    max_late_days: Annotated[
        int, meaning("rows older than this when they come are refused, where the time of coming is known", "days", ge=0)
    ] = 30
    max_skew_sec: Annotated[
        int, meaning("rows further ahead of the time of their coming are refused: a clock is wrong", "s", ge=0)
    ] = 300
    max_query_chars: Annotated[int, meaning("longest query", "characters", ge=1)] = 1000

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.columns) - set(LOG_COLUMNS)):
            raise ValueError(f"columns: {unknown[0]!r} is no column of an event; name some of {', '.join(LOG_COLUMNS)}")


@settings
class VisitRecipe:
    """How events become visits, and which of them are no shopper's."""

    inactivity_min: Annotated[
        float,
        meaning("a visitor without a session is on a new visit after so long a pause, and at midnight", "min", gt=0),
    ] = 30.0
    repeat_sec: Annotated[
        float, meaning("the same again so soon is the same event: a double click, a list drawn anew", "s", ge=0)
    ] = 1.0
    max_events_per_day: Annotated[int, meaning("a visitor with more is a bot", "events", ge=1)] = 3000
    max_clicks_per_min: Annotated[int, meaning("a visitor with more in any minute is a bot", "clicks", ge=1)] = 30
    bot_agents: Annotated[
        str, meaning("regular expression, without case, of user agents that are bots; empty: agents are not asked")
    ] = "bot|crawl|spider|slurp|headless|python-requests|curl/"
    keep_unseen: Annotated[
        bool, meaning("keep clicks on pairs that the log does not show in the visit; else they are refused")
    ] = False
    new_queries: Annotated[
        bool, meaning("keep events of queries that the table query lacks, and list them; else they are refused")
    ] = True


@settings
class EventsRecipe:
    """What a log must look like, and how many of its rows may fail."""

    log: EventLogRecipe = EventLogRecipe()
    visits: VisitRecipe = VisitRecipe()
    max_rejected_fraction: Annotated[
        float, meaning("share of the rows of a run that may be quarantined before it fails", "0..1", ge=0, le=1)
    ] = 0.1
    judge_again: Annotated[
        Literal["touched", "all"], meaning("all: every day, as after new products; else days with new rows alone")
    ] = "touched"
    quality: QualityRecipe = QualityRecipe(max_row_drop=1.0, max_row_growth=1e9, max_drift=0.1)
    """Batches of days have as many rows as they come with: what they consist of is compared, not how many they are."""


@settings
class DawidSkeneRecipe:
    """How annotators' confusion matrices are fitted."""

    prior_marks: Annotated[
        float,
        meaning("marks per true grade that the pooled matrix counts as in each annotator's", "marks", gt=0),
    ] = 8.0
    distance_factor: Annotated[
        float,
        meaning("what each step between true grade and mark multiplies the pooled matrix' own prior by", gt=0, lt=1),
    ] = 0.2
    tolerance: Annotated[float, meaning("largest change of a probability in the last round", gt=0)] = 1e-3
    max_rounds: Annotated[int, meaning("of expectation and maximisation, per stage", "rounds", ge=1)] = 200


@settings
class ConsensusRecipe:
    """When marks are a consensus."""

    method: Annotated[
        Literal["majority", "dawid_skene"],
        meaning("majority of the marks, or the most probable grade by how each annotator marks"),
    ] = "majority"
    min_agreement: Annotated[
        float,
        meaning(
            "share of a pair's marks that must give its grade, by majority; a tie never is a consensus",
            "0..1",
            ge=0,
            le=1,
        ),
    ] = 0.0
    min_probability: Annotated[
        float, meaning("probability that a pair's grade must have, by dawid_skene", "0..1", ge=0, le=1)
    ] = 0.0
    dawid_skene: DawidSkeneRecipe = DawidSkeneRecipe()

    quality: QualityRecipe = QualityRecipe()


@settings
class AnnotatorsRecipe:
    """How annotators are measured."""

    min_marks: Annotated[
        int, meaning("an annotator or slice with fewer compared marks has no kappa", "marks", ge=2)
    ] = 20
    category_levels: Annotated[
        int, meaning("levels of the product's category path that make a slice", "levels", ge=1)
    ] = 1


@settings
class ClickModelRecipe:
    """How the position-based click model is fitted."""

    first_positions: Annotated[
        tuple[int, ...],
        meaning("first place of each bin of places that shoppers look at alike; from 1, rising", "rank"),
    ] = (*range(1, 11), 11, 13, 16, 21, 31, 51)
    min_clicks: Annotated[
        int, meaning("a data set with fewer is not fitted: all places count as seen", "clicks", ge=1)
    ] = 100
    tolerance: Annotated[float, meaning("largest change of an examination in the last round", gt=0)] = 1e-5
    max_rounds: Annotated[int, meaning("of expectation and maximisation", "rounds", ge=1)] = 200

    def __post_init__(self) -> None:
        firsts = self.first_positions
        if not firsts or firsts[0] != 1 or list(firsts) != sorted(set(firsts)):
            raise ValueError(f"first_positions={list(firsts)}: expected rising places, the first of them 1")


@settings
class EngagementRecipe:
    """How behaviour is corrected for position."""

    prior_clicks: Annotated[
        float,
        meaning("clicks added to clicks and expected clicks; pulls what is rare to what is expected", "clicks", gt=0),
    ] = 1.0
    click_model: ClickModelRecipe = ClickModelRecipe()
    num_strata: Annotated[int, meaning("classes of queries by breadth, as many queries in each", ge=1)] = 3
    min_queries_per_class: Annotated[
        int, meaning("queries of a class with fewer have the prior of its data set", "queries", ge=1)
    ] = 30
    num_exposures: Annotated[
        int,
        meaning(
            "parts, as many pairs in each, by the share that a pair has of its query's looks; 1: not told apart", ge=1
        ),
    ] = 10
    quality: QualityRecipe = QualityRecipe()


@settings
class AuditRecipe:
    """When a human grade is in doubt."""

    min_impressions: Annotated[
        int, meaning("by the two rules on behaviour alone, pairs shown less often are not judged", "events", ge=1)
    ] = 20
    min_clicks: Annotated[int, meaning("fewest clicks of a loved pair", "events", ge=1)] = 3
    loved_quantile: Annotated[
        float, meaning("a pair is loved above this quantile of the click rates of its data set and stratum", gt=0, lt=1)
    ] = 0.8
    ignored_quantile: Annotated[
        float, meaning("a pair is ignored below this quantile of the same click rates", gt=0, lt=1)
    ] = 0.2
    min_wrong_probability: Annotated[
        float, meaning("a grade more probably wrong is doubtful, whatever rule it meets", "0..1", gt=0, le=1)
    ] = 0.1
    error_rate: Annotated[
        float, meaning("share of pairs whose raters are wrong by what they have in common", "0..1", gt=0, lt=1)
    ] = 0.05
    mark_error_rate: Annotated[
        float, meaning("share of single marks that are wrong beside it", "0..1", gt=0, lt=0.6)
    ] = 0.02
    look_levels: Annotated[
        tuple[float, ...], meaning("looks from which a click rate counts as better known", "looks", min_length=1)
    ] = (0.001, 3.0, 8.0, 20.0, 60.0)
    click_levels: Annotated[
        tuple[float, ...], meaning("clicks from which a cart rate counts as better known", "clicks", min_length=1)
    ] = (1.0, 3.0, 6.0, 15.0)
    prior_pairs: Annotated[
        float, meaning("average pairs added to what is known of each witness' finding", "pairs", gt=0)
    ] = 20.0
    traffic_exponent: Annotated[
        float, meaning("priority grows by this power of the impressions; 0: all pairs are worth the same", ge=0, le=1)
    ] = 0.0
    quality: QualityRecipe = QualityRecipe()

    def __post_init__(self) -> None:
        if self.ignored_quantile > self.loved_quantile:
            raise ValueError("ignored_quantile is above loved_quantile; no pair may be both loved and ignored")


@settings
class ReviewRecipe:
    """Which doubtful pairs are put before experts."""

    budget: Annotated[int, meaning("pairs of the batch", "pairs", ge=1)] = 500
    order: Annotated[
        Literal["priority", "random"],
        meaning("within a stratum the largest priority first, beside the random part; or all of it at random"),
    ] = "priority"
    random_share: Annotated[
        float,
        meaning(
            "with order=priority, share of the budget drawn at random, from which the report tells of all", ge=0, le=1
        ),
    ] = 0.3
    min_per_stratum: Annotated[
        int, meaning("fewest pairs of a stratum, at random first; fewer where the budget cannot", "pairs", ge=0)
    ] = 2
    head_share: Annotated[
        float, meaning("share of a data set's impressions that its head queries carry", "0..1", gt=0, lt=1)
    ] = 0.5
    torso_share: Annotated[
        float, meaning("share that its torso queries carry; the tail has the rest", "0..1", ge=0, lt=1)
    ] = 0.4
    abandoned: Annotated[tuple[str, ...], meaning("batches given up: pairs that wait in them may be queued again")] = ()
    seed: Annotated[int, meaning("seed of the draw", ge=0)] = 0

    def __post_init__(self) -> None:
        if self.head_share + self.torso_share > 1:
            raise ValueError("head_share + torso_share is above 1; the rest is the share of the tail")


@settings
class SamplePairsRecipe:
    """Which pairs are put before the labeller."""

    sources: Annotated[
        tuple[CandidateSource, ...], meaning("sources written; rows of other sources stay", min_length=1)
    ] = ("annotated", "sampled", "engagement")
    irrelevant_share: Annotated[
        float, meaning("share of grade 0 that an instance shall hold at least", "0..1", ge=0, lt=1)
    ] = 0.65
    slack: Annotated[
        float,
        meaning("products sampled beyond the need, since the labeller grades some of them above 0", "share", ge=0),
    ] = 0.2
    max_sampled_per_query: Annotated[int, meaning("most products sampled for a query", "products", ge=0)] = 100
    max_engagement_per_query: Annotated[
        int, meaning("most products taken for a query from what shoppers saw, by impressions", "products", ge=0)
    ] = 10
    seed: Annotated[int, meaning("seed of the sample", ge=0)] = 0


@settings
class InstancesRecipe:
    """Which graded pairs the encoder learns from."""

    stage: Annotated[Literal[1, 2], meaning("1: all but mined pairs; 2: all of stage 1 and the mined pairs kept")] = 1
    labeller: Annotated[str, meaning("fingerprint of the labeller whose grades count; empty: the newest grade")] = ""
    stronger: Annotated[
        str, meaning("fingerprint of the labeller that abstentions went to, whose grades go first; empty: none")
    ] = ""
    min_grade_probability: Annotated[
        float, meaning("labeller's grades less probable than this are left out", "0..1", ge=0, le=1)
    ] = 0.0
    keep_near_misses: Annotated[
        bool,
        meaning("stage 2 keeps mined pairs of grade 1 near the top too, where the paper keeps grade 0 alone"),
    ] = False
    keep_all_mined: Annotated[
        bool,
        meaning("stage 2 keeps every graded mined pair, for trainings that learn from their probabilities (soft)"),
    ] = False
    max_products_per_query: Annotated[
        int, meaning("most products of an instance; human grades first, then by hash", "products", ge=2)
    ] = 256
    seed: Annotated[int, meaning("seed of the choice above max_products_per_query", ge=0)] = 0
