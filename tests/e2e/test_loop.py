"""The loop end to end on 200 products, with every engine real: Spark, Delta, Ray, vLLM, Ray Train, FAISS."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from embeddings.encoder import load_encoder
from embeddings.text import product_text
from jobs import cli, job, loop
from lake import runs, tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    CANDIDATE_PAIR,
    CATALOG_PRODUCT,
    EVALUATION,
    MINED_PAIR,
    PAIR_GRADE,
    QUERY,
    RUN_RECORD,
    TRAINING_INSTANCE,
)


def test_the_loop_ends_with_three_models_a_labeller_and_a_report(finished):
    _, _, found = finished
    assert [row["model"] for row in found["evaluation"]] == ["pretrained", "stage1", "stage2"]
    for row in found["evaluation"]:
        assert {"ndcg@10", "recall@100", "auc_2v1", "auc_1v0", "auc_2v0"} <= set(row["metrics"])
        assert row["num_queries"] > 0
    assert {"accuracy", "within_1", "quadratic_weighted_kappa", "majority_accuracy"} <= set(found["labeller"])
    page = Path(found["report"]).read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "http" not in page
    assert "Worst queries of stage2" in page


def test_a_second_run_finds_every_step_current_and_records_nothing(finished, capsys):
    lake, words, _ = finished
    before = tables.version(lake, RUN_RECORD)
    assert cli.main(["loop", *words, "--json"]) == job.DONE
    assert all(step["current"] for step in json.loads(capsys.readouterr().out)["steps"])
    assert tables.version(lake, RUN_RECORD) == before


def test_no_query_but_train_queries_reaches_an_instance(finished):
    lake, _, _ = finished
    split = {row["query_id"]: row["split"] for row in tables.rows(lake, QUERY).to_pylist()}
    trained = set(tables.rows(lake, TRAINING_INSTANCE).column("query_id").to_pylist())
    assert {split[query] for query in trained} == {"train"}
    mined = set(tables.rows(lake, MINED_PAIR).column("query_id").to_pylist())
    waiting = set(tables.rows(lake, CANDIDATE_PAIR).column("query_id").to_pylist())
    assert {split[query] for query in mined | waiting} == {"train"}


def test_every_candidate_has_one_ledger_row_by_its_texts(finished):
    lake, _, _ = finished
    ledger = tables.rows(lake, PAIR_GRADE).to_pylist()
    assert len({row["address"] for row in ledger}) == len(ledger)
    graded = {(row["query_hash"], row["product_hash"]) for row in ledger}
    query = {row["query_id"]: row["query_hash"] for row in tables.rows(lake, QUERY).to_pylist()}
    product = {row["product_id"]: row["product_hash"] for row in tables.rows(lake, CATALOG_PRODUCT).to_pylist()}
    for row in tables.rows(lake, CANDIDATE_PAIR).to_pylist():
        assert (query[row["query_id"]], product[row["product_id"]]) in graded
    for row in ledger:
        assert row["p0"] + row["p1"] + row["p2"] == pytest.approx(1, abs=1e-6)


def test_a_human_grade_is_never_overruled_by_the_labeller(finished):
    lake, _, _ = finished
    consensus = {
        (row["query_id"], row["product_id"]): row["grade"]
        for row in tables.rows(lake, ANNOTATION_CONSENSUS).to_pylist()
    }
    checked = 0
    for row in tables.rows(lake, TRAINING_INSTANCE).to_pylist():
        for product, grade in zip(row["product_ids"], row["grades"], strict=True):
            human = consensus.get((row["query_id"], product))
            checked += human is not None
            assert human in (None, grade)
    assert checked > 100


def test_stage_2_holds_every_pair_of_stage_1(finished):
    lake, _, _ = finished
    stages = {1: set(), 2: set()}
    for row in tables.rows(lake, TRAINING_INSTANCE).to_pylist():
        stages[row["stage"]] |= {(row["query_id"], product) for product in row["product_ids"]}
    assert stages[1]
    assert stages[1] <= stages[2]


def test_a_changed_setting_repeats_what_depends_on_it_and_nothing_else(finished):
    lake, words, _ = finished
    config = loop.load_config(words[0], [*words[1:], "steps.report.recipe.num_worst_queries=3"])
    results = loop.run(config)
    assert [result.step for result in results if not result.was_current] == ["report"]
    assert runs.newest(lake, "report") == results[-1].record


def test_an_exported_encoder_gives_the_scores_of_search(finished, tmp_path, capsys):
    lake, _, _ = finished
    assert cli.main(["export", "encoder", f"out={tmp_path}/encoder", f"lake={lake.root}"]) == job.DONE
    capsys.readouterr()
    assert cli.main(["search", "red", "running", "shoes", f"lake={lake.root}", "--json"]) == job.DONE
    hits = json.loads(capsys.readouterr().out)
    assert hits == sorted(hits, key=lambda hit: (-hit["score"], hit["product_id"]))
    assert {hit["grade"] for hit in hits} <= {0, 1, 2}
    model = SentenceTransformer(f"{tmp_path}/encoder")
    query = model.encode_query(["red running shoes"], normalize_embeddings=True)
    assert query.shape[1] == model.get_embedding_dimension()
    recipe = load_encoder(f"{tmp_path}/encoder")[1]
    products = {row["product_id"]: row for row in tables.rows(lake, CATALOG_PRODUCT).to_pylist()}
    texts = [
        product_text(
            *(products[hit["product_id"]][name] for name in ("title", "brand", "category", "description")), recipe
        )
        for hit in hits
    ]
    scores = model.encode_document(texts, normalize_embeddings=True) @ query[0]
    # the catalogue is encoded in bfloat16 where the processor has it
    np.testing.assert_allclose(scores, [hit["score"] for hit in hits], atol=0.01)


def test_the_labeller_grades_a_file_and_keeps_its_columns(finished, tmp_path, capsys):
    lake, _, _ = finished
    source, target = tmp_path / "pairs.csv", tmp_path / "graded.csv"
    with source.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["own_key", "query", "title"])
        writer.writerows([["k1", "red shoes", "Red running shoe"], ["k2", "red shoes", "Garden hose 15 m"]])
    assert cli.main(["label", str(source), f"out={target}", f"lake={lake.root}", "--json"]) == job.DONE
    with target.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["own_key"] for row in rows] == ["k1", "k2"]
    for row in rows:
        shares = [float(row[name]) for name in ("p0", "p1", "p2")]
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert int(row["grade"]) == int(np.argmax(shares))


def test_runs_explain_and_plan_speak_of_the_lake(finished, capsys):
    lake, _, _ = finished
    assert cli.main(["runs", f"lake={lake.root}", "--json"]) == job.DONE
    listed = json.loads(capsys.readouterr().out)
    assert {"ingest", "tune_labeller", "train_encoder", "evaluate_retrieval"} <= {row["job"] for row in listed}
    row = tables.rows(lake, ANNOTATION_CONSENSUS).to_pylist()[0]
    assert cli.main(["explain", row["query_id"], row["product_id"], f"lake={lake.root}", "--json"]) == job.DONE
    facts = json.loads(capsys.readouterr().out)
    assert facts["annotation_consensus"][0]["grade"] == row["grade"]
    assert len(facts["human_annotation"]) >= 1
    assert cli.main(["plan", "build_consensus", "dev", f"lake={lake.root}", "--json"]) == job.DONE
    assert json.loads(capsys.readouterr().out)["inputs"]["human_annotation"].isdigit()


def test_evaluation_rows_name_the_versions_they_stand_on(finished):
    lake, _, found = finished
    record = runs.newest(lake, "evaluate_retrieval")
    assert {"query", "catalog_product", "annotation_consensus", "pretrained", "stage1", "stage2"} <= set(record.inputs)
    kept = tables.rows(lake, EVALUATION).to_pylist()
    assert {row["fingerprint"] for row in kept} == {row["fingerprint"] for row in found["evaluation"]}


def test_a_report_shows_the_labeller_it_is_given_and_refuses_one_of_elsewhere(finished, capsys):
    lake, _, _ = finished
    own = runs.newest(lake, "tune_labeller").outputs["labeller"]
    assert cli.main(["run", "report", "dev", f"lake={lake.root}", f"inputs.labeller={own}"]) == job.DONE
    assert (
        cli.main(["run", "report", "dev", f"lake={lake.root}", "inputs.labeller=models/labeller/none"]) == job.BAD_USAGE
    )
    assert "no tune_labeller" in capsys.readouterr().err
