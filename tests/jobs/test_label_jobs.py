import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

import ray_apps.label
from conf.load import ConfigError, load_job
from embeddings.anchors import ANCHOR_TEXTS, choose_anchors, read_anchors
from embeddings.calibration import Calibration
from embeddings.evidence import ENCODER_FOLDER, Evidence, EvidenceHead, GradedNumbers, GradeRegression
from embeddings.evidence_encoder import TITLES_FILE
from embeddings.evidence_words import WordNumbers
from embeddings.injections import ATTACKS
from embeddings.labeller import LabellerRecipe, export_labeller, load_labeller_card, save_labeller
from embeddings.labeller_evaluation import JudgeRecipe
from embeddings.labeller_model import load_labeller, plain_probabilities
from jobs import (
    correct_class_rates,
    cost,
    evaluate_labeller,
    explain,
    job,
    label_file,
    label_pairs,
    labelling,
    record_human_grades,
    tune_labeller,
    vote_grades,
)
from jobs.job import GateError
from lake import tables
from lake.schemas import (
    ANNOTATION_CONSENSUS,
    AUDIT_VERDICT,
    CANDIDATE_PAIR,
    CATALOG_PRODUCT,
    CLASS_RATE,
    LABELLER_EVALUATION,
    LABELLER_OOF,
    PAIR_GRADE,
    QUARANTINE,
    QUERY,
)
from lake.storage import Lake, LakeError
from ray_apps.cluster import RayPlacement
from ray_apps.placements import LabelPlacement, TunePlacement
from tests.fakes import SHOP_SPLITS, hash_of, put
from tests.tiny_models import tiny_bert_folder

TORCH = LabelPlacement(engine="torch", part_rows=10)


def answers(blocks, values):
    """What an engine answers, the same for each grade."""
    names = pa.concat_tables(blocks)["address"]
    return pa.table(
        {"address": names, "tokens": [9] * len(names), "cached_tokens": [0] * len(names)}
        | {f"p{grade}": values for grade in range(3)}
    )


def config_of(lake, labeller, **inputs):
    return label_pairs.Config(lake=lake.root, inputs=label_pairs.Inputs(labeller=labeller, **inputs), placement=TORCH)


def ledger(lake):
    return tables.rows(lake, PAIR_GRADE).sort_by("address")


def test_candidates_are_graded_once_per_text_and_a_second_run_starts_no_engine(shop, labeller, monkeypatch):
    config = dataclasses.replace(config_of(shop, labeller), recipe=label_pairs.LabelRecipe(abstain_risk=0.1))
    record = label_pairs.run(config)

    abstained = record.counts.pop("abstained")
    assert record.counts == {
        "candidates": 60,
        "without_text": 0,
        "reused": 0,
        "asked": 54,
        "labelled": 54,
        "rejected": 0,
        "written_meanwhile": 0,
    }
    rows = ledger(shop)
    assert len(set(rows["address"].to_pylist())) == len(rows) == 54
    total = sum(rows[name].to_numpy() for name in ("p0", "p1", "p2"))
    np.testing.assert_allclose(total, 1, atol=1e-9)
    risk = sum(rows[f"p{g}"].to_numpy() * (rows["grade"].to_numpy() - g) ** 2 for g in range(3))
    assert abstained == (risk > 0.1).sum() > 0
    assert record.metrics["pairs_per_sec"] > 0
    assert record.metrics["tokens_per_pair"] > 4

    def never(*_, **__):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(ray_apps.label, "label_pairs", never)
    again = label_pairs.run(config_of(shop, labeller))
    assert again.counts["labelled"] == 0
    assert again.counts["reused"] == 60
    assert ledger(shop).equals(rows)


def test_a_run_killed_between_parts_leaves_whole_parts_and_the_next_one_asks_for_the_rest_only(
    shop, labeller, monkeypatch, tmp_path
):
    real, asked = ray_apps.label.label_pairs, []

    def dying(pairs, folder, placement, num_pairs):
        for number, part in enumerate(real(pairs, folder, placement, num_pairs=num_pairs)):
            if number == 2:
                raise KeyboardInterrupt
            yield part

    def counting(pairs, folder, placement, num_pairs):
        asked.append(num_pairs)
        return real(pairs, folder, placement, num_pairs=num_pairs)

    monkeypatch.setattr(ray_apps.label, "label_pairs", dying)
    with pytest.raises(KeyboardInterrupt):
        label_pairs.run(config_of(shop, labeller))
    assert len(ledger(shop)) == 20
    monkeypatch.setattr(ray_apps.label, "label_pairs", counting)
    label_pairs.run(config_of(shop, labeller))
    assert asked == [34]

    unbroken = Lake(str(tmp_path / "unbroken"))
    for spec in (QUERY, CATALOG_PRODUCT, CANDIDATE_PAIR):
        put(unbroken, spec, tables.rows(shop, spec).to_pylist())
    label_pairs.run(config_of(unbroken, labeller))
    whole, broken = ledger(unbroken), ledger(shop)
    assert whole["address"].equals(broken["address"])
    for name in ("p0", "p1", "p2"):
        np.testing.assert_allclose(whole[name].to_numpy(), broken[name].to_numpy(), atol=1e-5)


def test_answers_that_are_no_distribution_are_quarantined_and_too_many_fail_the_run(shop, labeller, monkeypatch):
    def broken(pairs, folder, placement, num_pairs):
        yield answers(pairs, [1 / 3 if row % 9 > 0 else float("nan") for row in range(num_pairs)])

    monkeypatch.setattr(ray_apps.label, "label_pairs", broken)
    with pytest.raises(ValueError, match="6 of 54 answers were no distribution"):
        label_pairs.run(config_of(shop, labeller))

    refused = tables.rows(shop, QUARANTINE)
    assert len(refused) == 6
    assert {"query_id", "product_id", "address"} <= set(json.loads(refused["row"][0].as_py()))
    assert len(ledger(shop)) == 48


def test_a_run_that_goes_on_meets_no_stricter_gate(shop, labeller, monkeypatch):
    def broken(pairs, folder, placement, num_pairs):
        yield answers(pairs, [float("nan")] + [1 / 3] * (num_pairs - 1))

    monkeypatch.setattr(ray_apps.label, "label_pairs", broken)
    config = dataclasses.replace(config_of(shop, labeller), recipe=label_pairs.LabelRecipe(max_rejected_fraction=0.05))
    for _ in range(2):  # 1 of 54, and then again that one, which alone is asked
        assert label_pairs.run(config).counts["rejected"] == 1


def with_anchors(shop, tmp_path, turn):
    """A labeller whose anchors hold its own answers, turned by some grades."""
    recipe = LabellerRecipe(model=str(tmp_path / "model"), max_tokens=32)
    titles = [f"{colour} {kind} x" for colour in ("red", "blue", "green") for kind in ("shoe", "lamp", "knife", "hat")]
    texts = {name: pa.nulls(len(titles), pa.string()) for name in ANCHOR_TEXTS} | {"query": pa.array(titles[::-1])}
    texts |= {"title": pa.array(titles), "grade": pa.array([0, 1, 2] * 4, pa.int8())}
    hashes = {name: pa.array([hash_of(title) for title in titles]) for name in ("query_hash", "product_hash")}
    pairs = pa.table(texts | hashes)
    answer_N3 = plain_probabilities(*as_labelled(str(tmp_path / "labeller"), pairs))
    folder = str(tmp_path / f"turned-{turn}")
    anchors = choose_anchors(pairs, np.roll(answer_N3, turn, axis=1))
    save_labeller(
        tmp_path / "weights", folder, recipe, grade_token_ids=(), calibrations={}, metrics={}, anchors=anchors
    )
    return folder


def as_labelled(folder, pairs):
    model, encoder = load_labeller(folder)
    return model, encoder.encode_rows(pairs)


def test_anchors_are_graded_first_and_a_labeller_that_answers_otherwise_writes_nothing(shop, labeller, tmp_path):
    with pytest.raises(GateError, match=r"on its 12 anchors .* a grade's share moved by"):
        label_pairs.run(config_of(shop, with_anchors(shop, tmp_path, 1)))
    assert len(ledger(shop)) == 0

    record = label_pairs.run(config_of(shop, with_anchors(shop, tmp_path, 0)))

    assert record.counts["labelled"] == 54
    assert len(ledger(shop)) == 54


def test_without_answers_to_the_anchors_nothing_is_written(shop, labeller, tmp_path, monkeypatch):
    real = ray_apps.label.label_pairs
    monkeypatch.setattr(
        ray_apps.label, "label_pairs", lambda blocks, *how, **more: real(list(blocks)[1:], *how, **more)
    )
    with pytest.raises(ValueError, match="12 of 12 anchors got no answer"):
        label_pairs.run(config_of(shop, with_anchors(shop, tmp_path, 0)))
    assert len(ledger(shop)) == 0


def test_only_candidates_of_the_sources_are_graded(shop, labeller):
    config = dataclasses.replace(config_of(shop, labeller), recipe=label_pairs.LabelRecipe(sources=("mined",)))
    assert label_pairs.run(config).counts["candidates"] == 1


def test_without_a_labeller_the_newest_is_taken_or_missed_by_name(shop):
    with pytest.raises(LakeError, match="holds no labeller"):
        label_pairs.run(config_of(shop, ""))


def test_a_labeller_that_is_not_there_is_named(shop):
    with pytest.raises(ConfigError, match=r"inputs.labeller='none': no such folder"):
        label_pairs.run(config_of(shop, "none"))


@pytest.mark.usefixtures("ray_cluster")
def test_the_labeller_is_tuned_measured_and_kept(shop, tmp_path, monkeypatch):
    monkeypatch.setattr("embeddings.evidence.PAIRS_FOR_OPINION", 1)
    monkeypatch.setattr("embeddings.evidence.PAIRS_FOR_HEAD", 1)
    recipe = LabellerRecipe(
        model=str(tiny_bert_folder(tmp_path / "model")),
        baseline_model=str(tiny_bert_folder(tmp_path / "encoder")),
        max_tokens=32,
        epochs=1,
        random_irrelevant_per_query=2,
        evidence="encoder",
        folds=2,
    )
    placement = TunePlacement(ray=RayPlacement(address="local", num_cpus=2), threads_per_worker=1)

    record = tune_labeller.run(tune_labeller.Config(lake=shop.root, recipe=recipe, placement=placement))

    assert record.counts["human_pairs"] == 48
    num_drawn = 2 * sum(SHOP_SPLITS[number % 6] in ("train", "validation") for number in range(12))
    assert 0 < record.counts["random_pairs"] <= num_drawn
    for prefix in ("", "majority_", "cosine_"):
        for name in ("accuracy", "within_1", "quadratic_weighted_kappa"):
            assert -1 <= record.metrics[f"{prefix}{name}"] <= 1
    folder = shop.path(record.outputs["labeller"])
    assert len(read_anchors(folder)) == 8
    assert EvidenceHead.load(folder).evidence.encoder == str(Path(folder, ENCODER_FOLDER))
    assert {"modules.json", TITLES_FILE} <= {path.name for path in Path(folder, ENCODER_FOLDER).iterdir()}
    assert label_pairs.run(config_of(shop, folder)).counts["labelled"] == 54
    export_labeller(folder, str(tmp_path / "exported"))
    assert read_anchors(tmp_path / "exported") is None
    rows = tables.rows(shop, LABELLER_OOF).to_pylist()
    assert len(rows) == 48
    assert {row["labeller"] for row in rows} == {load_labeller_card(folder).fingerprint}
    folds = {row["query_id"]: row["fold"] for row in rows}
    assert {fold for query, fold in folds.items() if SHOP_SPLITS[int(query[1:]) % 6] == "train"} == {0, 1}
    assert {fold for query, fold in folds.items() if SHOP_SPLITS[int(query[1:]) % 6] != "train"} == {-1}
    assert all(row["p0"] + row["p1"] + row["p2"] == pytest.approx(1) for row in rows)
    assert not [path for path in Path(shop.path("runs")).iterdir() if "fold" in path.name or "encoder" in path.name]


def test_random_pairs_follow_the_splits_of_the_pairs_that_they_are_drawn_for(shop):
    config = tune_labeller.Config(lake=shop.root, recipe=LabellerRecipe(evidence="words"))
    current = job.begin(config, "tune_labeller")
    consensus = labelling.read(current, ANNOTATION_CONSENSUS, [*labelling.PAIR, *labelling.GRADED])
    human = labelling.with_texts(current, consensus)
    # as a benchmark does, another part of the queries stands for validation than in the lake
    turned = {"calibration": "validation", "validation": "test", "test": "calibration", "train": "train"}
    splits = pa.array([turned[split] for split in human["split"].to_pylist()])
    human = human.set_column(human.schema.get_field_index("split"), "split", splits)

    pairs = tune_labeller.with_random(current, human, config.recipe)

    drawn = pairs.slice(len(human))
    assert set(drawn["split"].to_pylist()) == {"train", tune_labeller.FOR_EVIDENCE}
    split_of = dict(zip(human["query_id"].to_pylist(), human["split"].to_pylist(), strict=True))
    for query, split in zip(drawn["query_id"].to_pylist(), drawn["split"].to_pylist(), strict=True):
        assert split_of[query] == {"train": "train", tune_labeller.FOR_EVIDENCE: "validation"}[split]


def test_a_fold_s_opinion_has_not_learned_its_pairs():
    rng = np.random.default_rng(0)
    number_NE, share_N2 = rng.normal(size=(40, 2)), np.sort(rng.random((40, 2)))[:, ::-1]
    graded = GradedNumbers(number_NE, share_N2, np.ones(40))
    is_learned_N, fold_N = np.arange(40) < 30, np.arange(40) % 3
    gathered = tune_labeller.GatheredEvidence(Evidence(WordNumbers(1, {})), graded, is_learned_N, ~is_learned_N)
    head = EvidenceHead(gathered.evidence, GradeRegression.fit(graded), GradeRegression.fit(graded))

    weighed = tune_labeller.WeighedEvidence(gathered, head)
    found = weighed.without_fold(fold_N == 1).head

    share_N2[fold_N == 1] = 0.5
    assert found.opinion == GradeRegression.fit(graded.take(np.flatnonzero(is_learned_N & (fold_N != 1))))
    assert found.opinion == weighed.without_fold(fold_N == 1).head.opinion
    assert found.weighing == head.weighing


def test_a_fold_s_labeller_sees_none_of_its_queries():
    splits = ["train"] * 6 + ["validation", "calibration", "test"]
    digests = [f"{value:08x}" for value in (0, 0, 1, 2, 3, 1, 4, 5, 6)]
    pairs = pa.table({"split": splits, "query_hash": digests, "row": range(9)})

    fold_N = tune_labeller.folds_of(pairs, 2)
    parted, rows = tune_labeller.hold_out(pairs, fold_N == 1)

    assert fold_N.tolist() == [0, 0, 1, 0, 1, 1, -1, -1, -1]
    assert rows.tolist() == parted["row"].to_pylist() == [0, 1, 2, 3, 4, 5, 6]
    assert parted["split"].to_pylist() == ["train", "train", "test", "train", "test", "test", "validation"]


def read_back(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    names = path.read_text(encoding="utf-8").splitlines()[0].replace('"', "").split(",")
    options = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True)
    return csv.read_csv(path, convert_options=options).to_pylist()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_keeps_its_columns_and_gets_grades_and_reasons(lake, labeller, tmp_path, kind):
    source, out = tmp_path / f"pairs.{kind}", tmp_path / f"out.{kind}"
    rows = {
        "sku": ["007", "008", "009"],
        "query": ["red shoe", "", "x" * 10_000],
        "title": ["red shoe, size 9", "lamp", "lamp"],
        "brand": ["acme", None, None],
    }
    if kind == "csv":
        csv.write_csv(pa.table(rows), source)
    elif kind == "parquet":
        parquet.write_table(pa.table(rows), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in pa.table(rows).to_pylist()), encoding="utf-8")
    config = load_job(
        label_file.Config,
        "label_file",
        "dev",
        [f"lake={lake.root}", f"inputs.file={source}", f"inputs.labeller={labeller}", f"out={out}"],
    )

    record = label_file.run(config)

    written = read_back(out)
    assert record.counts == {"rows": 3, "labelled": 1, "rejected": 2}
    assert [row["sku"] for row in written] == ["007", "008", "009"]
    assert [row["grade"] is None for row in written] == [False, True, True]
    assert sum(float(written[0][name]) for name in ("p0", "p1", "p2")) == pytest.approx(1)
    assert [row["reason"] for row in written] == [None, "query is empty", "query is longer than 1000 characters"]


def test_judges_are_measured_side_by_side_on_test_queries(shop, labeller, tmp_path):
    encoder = str(tiny_bert_folder(tmp_path / "encoder"))
    inputs = evaluate_labeller.Inputs(labellers=(labeller,), encoders=(encoder,))
    recipe = evaluate_labeller.EvaluateRecipe(judges=JudgeRecipe(resamples=20, min_slice_pairs=4), injection_pairs=6)
    config = evaluate_labeller.Config(
        lake=shop.root, inputs=inputs, recipe=recipe, placement=evaluate_labeller.Placement(label=TORCH)
    )

    record = evaluate_labeller.run(config)

    rows = tables.rows(shop, LABELLER_EVALUATION).to_pylist()
    whole = {row["judge"]: row for row in rows if row["slice"] == ""}
    name = f"classifier {load_labeller_card(labeller).fingerprint}"
    assert set(whole) == {name, "cosine of encoder", "commonest grade"}
    num_tests = SHOP_SPLITS.count("test") * 2 * 4
    assert {row["num_pairs"] for row in whole.values()} == {num_tests} == {record.counts["test_pairs/s"]}
    assert sum(whole[name]["confusion"]) == num_tests
    assert {row["slice"] for row in rows} > {""}
    tried = {row["slice"]: dict(row["metrics"]) for row in rows if row["slice"].startswith("injection: ")}
    assert set(tried) == {f"injection: {attack}" for attack in ATTACKS}
    assert all(-2 <= metrics["shift"] <= 2 for metrics in tried.values())
    metrics = dict(whole[name]["metrics"])
    assert metrics["accuracy"] == record.metrics[f"s/{name}/accuracy"]
    assert dict(whole[name]["low"])["accuracy"] <= metrics["accuracy"] <= dict(whole[name]["high"])["accuracy"]
    html = Path(shop.path(record.outputs["report"])).read_text(encoding="utf-8")
    assert name in html
    assert "ece of a perfect judge" in html
    assert "http" not in html.replace("http://www.w3.org", "")


def test_of_several_labellers_the_votes_are_a_judge_too(shop, labeller, tmp_path):
    other, measured = with_other_calibration(tmp_path, Calibration(bias=(3.0, 0.0, 0.0))), {}

    for folders in ((labeller, other), (labeller,), (other,)):
        config = evaluate_labeller.Config(
            lake=shop.root,
            inputs=evaluate_labeller.Inputs(labellers=folders),
            recipe=evaluate_labeller.EvaluateRecipe(judges=JudgeRecipe(resamples=20)),
            placement=evaluate_labeller.Placement(label=TORCH),
        )
        run_id = evaluate_labeller.run(config).run_id
        rows = [row for row in tables.rows(shop, LABELLER_EVALUATION).to_pylist() if row["run_id"] == run_id]
        measured |= {row["judge"]: dict(row["metrics"]) for row in rows if row["slice"] == ""}

    names = {f"classifier {load_labeller_card(folder).fingerprint}" for folder in (labeller, other)}
    assert set(measured) == names | {evaluate_labeller.VOTES, "commonest grade"}
    # the log loss of a mean lies below the mean of the log losses
    alone = sum(measured[name]["nll"] for name in names) / 2
    assert measured[evaluate_labeller.VOTES]["nll"] < alone - 0.01


def test_a_data_set_s_own_calibration_is_that_of_its_judged_pairs_and_of_files_that_name_it(shop, labeller, tmp_path):
    recipe = LabellerRecipe(model=str(tmp_path / "model"), max_tokens=32)
    judged, folder = Calibration(bias=(9.0, 0.0, 0.0), cuts=(0.0, 0.0)), str(tmp_path / "own")
    own = {"": Calibration(), "s": judged}
    save_labeller(tmp_path / "weights", folder, recipe, grade_token_ids=(), calibrations=own, metrics={})
    csv.write_csv(pa.table({"query": ["red shoe"], "title": ["red shoe x"]}), tmp_path / "pairs.csv")

    label_pairs.run(config_of(shop, folder))
    files = {}
    for dataset in ("", "s"):
        inputs = label_file.Inputs(file=str(tmp_path / "pairs.csv"), labeller=folder, dataset=dataset)
        out = str(tmp_path / "out.jsonl")
        label_file.run(label_file.Config(lake=shop.root, out=out, inputs=inputs))
        files[dataset] = read_back(tmp_path / "out.jsonl")[0]

    rows = ledger(shop).to_pylist()
    assert max(row["p0"] for row in rows) < 0.9 < files["s"]["p0"]
    assert files[""]["p0"] < 0.9
    # cuts at 0 make every judged pair a 2, however irrelevant; other pairs get the most probable grade
    assert files["s"]["grade"] == 2
    assert [row["grade"] for row in rows] == [np.argmax([row["p0"], row["p1"], row["p2"]]) for row in rows]


def test_json_values_are_kept_as_they_came(tmp_path):
    rows = [
        {"query": "2024-01-01", "title": "calendar", "day": "2024-01-01", "sku": "1", "big": 2**70, "tags": ["a"]},
        {"query": "lamp", "title": "lamp", "day": None, "sku": 2, "big": 1, "tags": []},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    table, unread = label_file.read_pairs(str(tmp_path / "pairs.jsonl"))

    assert unread == []

    assert table["day"].to_pylist() == ["2024-01-01", None]
    assert table["query"].to_pylist() == ["2024-01-01", "lamp"]
    assert table["sku"].to_pylist() == ["1", "2"]
    assert table["big"].to_pylist() == [str(2**70), "1"]
    assert table["tags"].to_pylist() == [["a"], []]
    with pytest.raises(ConfigError, match="CSV cannot hold column 'tags'"):
        label_file.check_columns("out.csv", table)


def test_rows_that_cannot_be_read_cost_themselves_alone_and_are_told_of(lake, labeller, tmp_path):
    texts = {
        "csv": [
            "query,title,sku",
            "red shoe,red shoe,1",
            'lamp,"broken quote,2',
            'sofa,"two\nlines",3',
            "knife,one,too,many",
            'pipe,5" pipe,4',
            f"cup,{'x' * 100_000},5",
            "hat,hat,6",
        ],
        "jsonl": [
            '{"query": "red shoe", "title": "red shoe", "sku": "1"}',
            '{"query": "lamp", "title": "broken',
            "[1, 2]",
            json.dumps({"query": "cup", "title": "x" * 100_000, "sku": "5"}),
            '{"query": "hat", "title": "hat", "sku": "6"}',
        ],
    }
    for kind, lines in texts.items():
        source, out = tmp_path / f"pairs.{kind}", tmp_path / f"out.{kind}"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        inputs = label_file.Inputs(file=str(source), labeller=labeller)

        record = label_file.run(label_file.Config(lake=lake.root, out=str(out), inputs=inputs))

        rows = read_back(out)
        graded = [row["sku"] for row in rows if row["grade"] is not None]
        assert graded == (["1", "3", "4", "6"] if kind == "csv" else ["1", "6"])
        reasons = [row["reason"] for row in rows if row["grade"] is None]
        assert len(reasons) == 3
        assert "longer than 50000 characters" in reasons[0]
        told = (
            ("line 3 is no row", "line 6 is no row (4 fields") if kind == "csv" else ("line 2 is no JSON", "line 3 is")
        )
        assert all(start in reason for start, reason in zip(told, reasons[1:], strict=True))
        assert record.counts == {"rows": len(rows), "labelled": len(graded), "rejected": 3}


def test_a_file_without_a_title_ends_in_one_sentence(lake, labeller, tmp_path):
    source = tmp_path / "pairs.csv"
    source.write_text("query,name\nshoe,red shoe\n", encoding="utf-8")
    inputs = label_file.Inputs(file=str(source), labeller=labeller)

    with pytest.raises(ConfigError, match="column 'title' is missing; columns are query, name"):
        label_file.run(label_file.Config(lake=lake.root, out=str(tmp_path / "out.csv"), inputs=inputs))
    with pytest.raises(ConfigError, match="expected a name that ends in"):
        label_file.run(label_file.Config(lake=lake.root, out="out.xls", inputs=inputs))


def test_a_stronger_labeller_is_asked_where_the_first_abstains_and_its_rows_name_the_first_s(shop, labeller, tmp_path):
    stronger = with_other_calibration(tmp_path, Calibration(temperature=0.7))
    recipe = label_pairs.LabelRecipe(abstain_risk=0.12)
    config = dataclasses.replace(config_of(shop, labeller, stronger=stronger), recipe=recipe)

    counts = label_pairs.run(config).counts

    first, second = (load_labeller_card(folder).fingerprint for folder in (labeller, stronger))
    rows = {row["address"]: row for row in ledger(shop).to_pylist()}
    superseded = {row["supersedes"] for row in rows.values() if row["labeller"] == second}
    risk = {
        address: sum(row[f"p{grade}"] * (row["grade"] - grade) ** 2 for grade in range(3))
        for address, row in rows.items()
        if row["labeller"] == first
    }
    doubtful = {address for address, value in risk.items() if value > 0.12}
    assert 0 < len(doubtful) < 54
    assert superseded == doubtful
    assert counts["stronger/labelled"] == counts["abstained"] == len(doubtful)
    again = label_pairs.run(config).counts
    assert (again["asked"], again["stronger/asked"]) == (0, 0)


def test_a_plan_counts_what_will_go_to_the_stronger_labeller(shop, labeller, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "LEAST_ASKED", 10)
    stronger = with_other_calibration(tmp_path, Calibration(temperature=0.7))
    placement = dataclasses.replace(TORCH, price_per_hour=2.0)
    config = dataclasses.replace(
        config_of(shop, labeller, stronger=stronger),
        recipe=label_pairs.LabelRecipe(abstain_risk=0.12),
        placement=placement,
    )
    planned = label_pairs.plan(config)
    alone = label_pairs.plan(dataclasses.replace(config, inputs=config_of(shop, labeller).inputs))
    assert (alone.stronger, alone.abstaining) == (None, 0.0)
    assert alone.pairs == planned.pairs
    assert {planned.measured_by, planned.stronger.measured_by} == {cost.SAMPLE}
    assert planned.cost == pytest.approx(2.0 * planned.engine_hours)
    assert planned.engine_hours > planned.stronger.engine_hours > 0
    assert "stronger" in planned.render()

    record = label_pairs.run(config)

    # all pairs were in the sample
    assert planned.stronger.pairs == record.counts["stronger/asked"] > 0
    assert record.metrics["cost"] == pytest.approx(2.0 * record.metrics["engine_hours"])
    own = [record.metrics[f"{prefix}start_sec"] for prefix in ("", "stronger/")]
    assert record.metrics["engine_hours"] * 3600 >= sum(own)
    # a budget of half the hours allows about half of the pairs
    half = {"max_pairs": 0, "max_hours": planned.engine_hours / 2, "max_cost": 0.0}
    assert cost.affordable(planned, placement, **half) == pytest.approx(planned.pairs / 2, abs=1)
    fewer = cost.scaled(planned, 10, placement)
    assert fewer.engine_hours == pytest.approx(planned.engine_hours * 10 / planned.pairs, rel=0.2)
    assert fewer.stronger.pairs == round(10 * planned.abstaining)
    # the next plan takes both rates from that run
    put(shop, CATALOG_PRODUCT, [{"dataset": "s", "product_id": "new", "title": "lamp", "product_hash": "new"}])
    put(shop, CANDIDATE_PAIR, [{"dataset": "s", "query_id": "q1", "product_id": "new", "source": "sampled"}])
    next_plan = label_pairs.plan(config)
    assert next_plan.measured_by == next_plan.stronger.measured_by == f"run {record.run_id}"
    assert next_plan.stronger.tokens_per_sec == pytest.approx(record.metrics["stronger/tokens_per_sec"])


def test_votes_are_the_mean_of_what_all_labellers_say_of_a_pair(shop, labeller, tmp_path):
    other = with_other_calibration(tmp_path, Calibration(temperature=0.7))
    label_pairs.run(config_of(shop, labeller))
    few = label_pairs.LabelRecipe(sources=("mined",))
    label_pairs.run(dataclasses.replace(config_of(shop, other), recipe=few))
    config = vote_grades.Config(lake=shop.root, inputs=vote_grades.Inputs(labellers=(other, labeller)))

    record = vote_grades.run(config)

    assert (record.counts["labelled"], record.counts["not_graded_by_all"]) == (1, 53)
    facts = explain.explain(shop, "q0", "p0")["pair_grade"]
    *members, votes = [row for row in facts if row["product_id"] == "p0"]
    assert [row["judge"] for row in (*members, votes)] == ["labeller", "labeller", "votes"]
    for name in ("p0", "p1", "p2"):
        assert votes[name] == pytest.approx(sum(row[name] for row in members) / 2)
    assert votes["supersedes"] == members[1]["address"]
    assert vote_grades.run(config).counts["reused"] == 1
    assert vote_grades.electorate_of(["b", "a"]) == vote_grades.electorate_of(["a", "b"])
    with pytest.raises(ConfigError, match="votes need two labellers"):
        vote_grades.run(dataclasses.replace(config, inputs=vote_grades.Inputs(labellers=(labeller,))))


def with_other_calibration(tmp_path, calibration):
    """A labeller that differs from another by its calibration."""
    recipe, target = LabellerRecipe(model=str(tmp_path / "model"), max_tokens=32), str(tmp_path / "stronger")
    calibrations = {"": calibration}
    save_labeller(tmp_path / "weights", target, recipe, grade_token_ids=(), calibrations=calibrations, metrics={})
    return target


def test_people_s_grades_stand_in_the_ledger_once_and_name_what_they_supersede(shop, labeller):
    put(shop, CANDIDATE_PAIR, [{"dataset": "s", "query_id": "q1", "product_id": "p1", "source": "annotated"}])
    label_pairs.run(config_of(shop, labeller))
    verdict = {"dataset": "s", "query_id": "q1", "product_id": "p1", "grade": 0, "expert": "eva"}
    put(shop, AUDIT_VERDICT, [verdict | {"decided_at": datetime(2026, 1, 1, tzinfo=UTC)}])
    config = record_human_grades.Config(lake=shop.root, inputs=record_human_grades.Inputs(audit_verdict="newest"))

    record = record_human_grades.run(config)

    # 12 queries of 4 products, of which two share their texts and here their marks, and one verdict
    assert record.counts == {"grades": 37, "reused": 0, "written": 37}
    facts = explain.explain(shop, "q1", "p1")["pair_grade"]
    by_who = {row["labeller"]: row for row in facts}
    first = by_who[load_labeller_card(labeller).fingerprint]
    assert first["judge"] == "labeller"
    assert by_who["eva"]["grade"] == 0
    assert (by_who["eva"]["p0"], by_who["eva"]["judge"]) == (1.0, "human")
    assert by_who["consensus"]["supersedes"] == first["address"]
    assert by_who["eva"]["supersedes"] == by_who["consensus"]["address"]
    assert [row["is_newest"] for row in facts] == [False, False, True]
    assert record_human_grades.run(config).counts == {"grades": 37, "reused": 37, "written": 0}


def test_verdicts_supersede_each_other_in_the_order_in_which_they_were_given(shop):
    pair = {"dataset": "s", "query_id": "q1", "product_id": "p1"}
    told = [("eva", 0, 2), ("ulf", 1, 3), ("ada", 2, 3), ("eva", 2, 4), ("eva", 0, 5), ("judges:one", 1, 6)]
    put(
        shop,
        AUDIT_VERDICT,
        [
            pair | {"expert": who, "grade": grade, "decided_at": datetime(2026, 1, day, tzinfo=UTC)}
            for who, grade, day in reversed(told)
        ],
    )
    config = record_human_grades.Config(lake=shop.root, inputs=record_human_grades.Inputs(audit_verdict="newest"))

    record_human_grades.run(config)

    rows = explain.explain(shop, "q1", "p1")["pair_grade"]
    # of two at the same time the first by name counts, so it comes last
    assert [(row["labeller"], row["grade"]) for row in rows[1:]] == [
        ("eva", 0),
        ("ulf", 1),
        ("ada", 2),
        ("eva", 2),
        ("eva", 0),
    ]
    assert [row["supersedes"] for row in rows[1:]] == [row["address"] for row in rows[:-1]]
    assert rows[-1]["is_newest"]
    assert record_human_grades.run(config).counts["written"] == 0


def test_a_drawn_sample_that_people_have_graded_gives_the_population_its_rates(shop, labeller, tmp_path):
    label_pairs.run(config_of(shop, labeller))
    inputs, recipe = correct_class_rates.Inputs(labeller=labeller), correct_class_rates.RatesRecipe(source="sampled")
    config = correct_class_rates.Config(lake=shop.root, inputs=inputs, recipe=recipe)

    drawn = correct_class_rates.run(config)
    assert (drawn.rows, drawn.counts["population"]) == (60, 60)
    sample = Path(shop.path(drawn.outputs["sample"])).read_text()
    rows = sample.splitlines()
    assert rows[0] == "dataset,query_id,product_id,query,title,grade"
    graded = tmp_path / "graded.csv"
    # of 60 pairs one stays without a grade, the others are irrelevant
    graded.write_text("\n".join([rows[0], rows[1], *(f"{row}0" for row in rows[2:])]))

    filled = dataclasses.replace(config, inputs=dataclasses.replace(inputs, file=str(graded)))
    record = correct_class_rates.run(filled)
    assert record.counts == {"graded": 59, "graded/s": 59}
    assert record.metrics["s/accuracy_after"] == 1 > record.metrics["s/accuracy_before"]
    (rate,) = tables.rows(shop, CLASS_RATE).to_pylist()
    assert (rate["labeller"], rate["source"]) == (load_labeller_card(labeller).fingerprint, "sampled")
    assert rate["bias_0"] > rate["bias_1"] == 0

    graded.write_text("\n".join([rows[0], f"{rows[1]}3"]))
    with pytest.raises(ConfigError, match=r"expected grades 0, 1, 2 or nothing, got row 1: grade '3'"):
        correct_class_rates.run(filled)
    graded.write_text("\n".join([rows[0], f"{rows[1]}1"]))
    with pytest.raises(ConfigError, match=r"the sample grades 1 pairs .* a data set needs 30"):
        correct_class_rates.run(filled)
    other = dataclasses.replace(config, recipe=correct_class_rates.RatesRecipe(source="engagement"))
    with pytest.raises(ConfigError, match="no pair of source engagement has a grade by this labeller"):
        correct_class_rates.run(other)
