"""Writes the raw files of a seeded marketplace with known truth."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conf.load import settings
from embeddings.marketplace_recipe import MarketplaceRecipe
from jobs import job
from lake.runs import RunRecord

DATASET = "market"


@settings
class Inputs:
    """A simulation reads nothing."""


@settings
class Config:
    """Settings of simulate."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: MarketplaceRecipe = MarketplaceRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """Raw files to raw/market; the truth, which only evaluation reads, to truth/market."""
    from embeddings.marketplace import write_marketplace

    current = job.begin(config, "simulate")
    raw, truth = f"raw/{DATASET}", f"truth/{DATASET}"
    counts = write_marketplace(config.recipe, Path(current.lake.path(raw)), Path(current.lake.path(truth)))
    current.claim(raw)
    return current.finish(rows=counts["products"], outputs={raw: raw, truth: truth}, counts=counts)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("simulate", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
