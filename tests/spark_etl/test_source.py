"""The Spark code itself: only what Spark Connect offers."""

import ast
from pathlib import Path

import pytest

import spark_etl

FORBIDDEN = {
    "sparkContext",
    "rdd",
    "_jvm",
    "_jdf",
    "_jsparkSession",
    "udf",
    "pandas_udf",
    "mapInPandas",
    "foreachPartition",
}
SOURCES = sorted(Path(spark_etl.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_source_uses_only_what_spark_connect_offers(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & FORBIDDEN


def test_recipes_need_no_spark():
    tree = ast.parse((Path(spark_etl.__file__).parent / "recipes.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "dataclasses", "typing", "conf.load", "lake.schemas"}
