"""How raters agree, and how each annotator marks beside the others and beside gold."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

from conf.load import meaning, settings
from jobs import job
from lake.runs import RunRecord
from lake.schemas import ANNOTATION_AGREEMENT, ANNOTATOR_QUALITY
from lake.spark import SparkPlacement
from spark_etl.recipes import AnnotatorsRecipe


@settings
class Inputs:
    """Tables read."""

    human_annotation: job.TableVersion = "newest"
    catalog_product: job.TableVersion = "newest"
    gold_question: Annotated[job.TableVersion, meaning("pairs of known grade; empty: none")] = ""
    audit_verdict: Annotated[job.TableVersion, meaning("experts' verdicts, which count as known; empty: none")] = ""


@settings
class Placement:
    """Where Spark runs."""

    spark: SparkPlacement = SparkPlacement()


@settings
class Config:
    """Settings of measure_annotators."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: AnnotatorsRecipe = AnnotatorsRecipe()
    placement: Placement = Placement()


def run(config: Config) -> RunRecord:
    """Replaces both tables; without single marks they have no row."""
    from lake import spark as lake_spark
    from spark_etl import agreement, gold

    current = job.begin(config, "measure_annotators")
    spark = lake_spark.session(config.placement.spark)
    tables = lake_spark.pinned_rows(spark, current.lake, current.inputs)
    known = gold.known_grades(tables.get("gold_question"), tables.get("audit_verdict"))
    with lake_spark.keeping() as keep:
        context = agreement.with_context(tables["human_annotation"], tables["catalog_product"], config.recipe, known)
        marks = keep(context)
        frames = {
            ANNOTATOR_QUALITY: agreement.measure_annotators(marks, config.recipe),
            ANNOTATION_AGREEMENT: agreement.measure_agreement(marks, config.recipe),
        }
        whole = frames[ANNOTATION_AGREEMENT].where("slice = 'all'").collect()
        counts = {spec.name: frame.count() for spec, frame in frames.items()}
        outputs = {
            spec.name: lake_spark.replace(spark, current.lake, spec, frame, run_id=current.run_id)
            for spec, frame in frames.items()
        }
    metrics = {
        f"{name}/{row['dataset']}": row[name]
        for row in whole
        for name in ("alpha_ordinal", "kappa")
        if row[name] is not None
    }
    return current.finish(rows=sum(counts.values()), outputs=outputs, counts=counts, metrics=metrics)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("measure_annotators", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
