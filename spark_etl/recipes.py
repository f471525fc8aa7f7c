"""What the Spark jobs compute, as settings; free of Spark, so that a job's help needs no engine."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from conf.load import meaning, settings
from lake.schemas import TABLES, CandidateSource


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
class SplitRecipe:
    """Shares of the splits; test is what the other three leave."""

    train: Annotated[float, meaning("share of train queries", "0..1", gt=0, lt=1)] = 0.7
    validation: Annotated[float, meaning("share of validation queries", "0..1", gt=0, lt=1)] = 0.1
    calibration: Annotated[float, meaning("share of calibration queries", "0..1", gt=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        if self.train + self.validation + self.calibration > 1:
            raise ValueError("train + validation + calibration is above 1; the rest is the share of test")


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


@settings
class ConsensusRecipe:
    """When marks are a consensus."""

    min_agreement: Annotated[
        float,
        meaning("share of a pair's marks that must give its grade; a tie never is a consensus", "0..1", ge=0, le=1),
    ] = 0.0
    quality: QualityRecipe = QualityRecipe()


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
        float, meaning("clicks added to the clicks and the expected clicks; pulls rare pairs to 1", "clicks", gt=0)
    ] = 1.0
    click_model: ClickModelRecipe = ClickModelRecipe()
    num_strata: Annotated[int, meaning("classes of queries by breadth, as many queries in each", ge=1)] = 3
    min_pairs_per_class: Annotated[
        int, meaning("a class with fewer pairs takes the prior of its data set", "pairs", ge=1)
    ] = 200
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
    ] = 0.2
    error_rate: Annotated[
        float, meaning("share of pairs whose raters are wrong by what they have in common", "0..1", gt=0, lt=1)
    ] = 0.05
    mark_error_rate: Annotated[
        float, meaning("share of single marks that are wrong beside it", "0..1", gt=0, lt=0.6)
    ] = 0.1
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
    max_products_per_query: Annotated[
        int, meaning("most products of an instance; human grades first, then by hash", "products", ge=2)
    ] = 256
    seed: Annotated[int, meaning("seed of the choice above max_products_per_query", ge=0)] = 0
