"""Brings a judged data set into the raw layout that `ingest` reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from conf.load import ConfigError, meaning, read_yaml_file, settings, validate
from jobs import job
from lake.runs import RunRecord

if TYPE_CHECKING:
    from embeddings.datasets import DatasetMapping


@settings
class Inputs:
    """Where the data set lies."""

    root: Annotated[str, meaning("folder with the data set's files")] = ""
    mapping: Annotated[str, meaning("YAML file that describes the data set, for kind=mapped")] = ""


@settings
class ImportRecipe:
    """Which reader, and what it keeps."""

    kind: Annotated[Literal["esci", "home_depot", "mapped"], meaning("schema of the files")] = "mapped"
    max_rejected_fraction: Annotated[
        float, meaning("share of all rows that may be rejected before the import fails", "0..1", ge=0, le=1)
    ] = 0.5
    locales: Annotated[tuple[str, ...], meaning("locales kept, for kind=esci", min_length=1)] = ("us",)


@settings
class Config:
    """Settings of import_dataset."""

    lake: job.LakeRoot = job.DEFAULT_LAKE
    setting: job.SettingName = "dev"
    inputs: Inputs = Inputs()
    recipe: ImportRecipe = ImportRecipe()
    placement: job.InProcess = job.InProcess()


def run(config: Config) -> RunRecord:
    """Files of the data set to raw/<dataset>; rows that cannot be used to its rejected/ folder, with reasons."""
    from embeddings import datasets

    if not config.inputs.root or not Path(config.inputs.root).is_dir():
        raise ConfigError(f"inputs.root={config.inputs.root!r}: no such folder; give inputs.root=DIR with the data set")
    current = job.begin(config, "import_dataset")
    root, kind = Path(config.inputs.root), config.recipe.kind
    if kind == "mapped":
        mapping = read_mapping(config.inputs.mapping)
        raw = f"raw/{mapping.dataset}"
        counts = datasets.import_mapped(root, mapping, Path(current.lake.path(raw)))
    elif kind == "esci":
        raw = "raw/esci"
        counts = datasets.import_esci(root, Path(current.lake.path(raw)), locales=config.recipe.locales)
    else:
        raw = "raw/home_depot"
        counts = datasets.import_home_depot(root, Path(current.lake.path(raw)))
    total = sum(counts[name] for name in ("products", "queries", "marks", "rejected"))
    if counts["rejected"] > config.recipe.max_rejected_fraction * total:
        raise ValueError(
            f"import_dataset: {counts['rejected']} of {total} rows cannot be used; see the reasons in "
            f"{current.lake.path(raw, 'rejected')}, then mend the mapping or raise recipe.max_rejected_fraction"
        )
    current.claim(raw)
    return current.finish(rows=counts["marks"], outputs={raw: raw}, counts=counts)


def read_mapping(path: str) -> DatasetMapping:
    """The mapping of a YAML file.

    Raises:
        ConfigError: no file is named, or it is not a mapping of a data set.
    """
    from embeddings import datasets

    if not path:
        raise ConfigError("inputs.mapping is empty; give inputs.mapping=FILE.yaml, which describes the data set")
    return validate(datasets.DatasetMapping, read_yaml_file(path), source=path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the job."""
    return job.main("import_dataset", Config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
