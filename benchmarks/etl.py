"""A shop's log into counts per pair and place: Spark, as `ingest_events` judges days, beside DuckDB and Polars.

    python -m benchmarks.etl [--quick]

The same Parquet goes in and the same counts come out (compared): events that came twice or are done again within a
second are found, bots taken out by their day and their minute, visits parted by pauses, carts and purchases traced back
to their searches, clicks on what was not shown refused, the rest counted. Each engine runs in a process of its own with
two threads, in turns; its start (the JVM's among it) is told apart. Peak memory is that of the process and its JVM.

Sizes: the 1,775,000 rows of retrotech where ASSAY_DATA names the folder with data, and generated events, a million a
day. --quick: 1 M generated, one round; else 1, 10 and 50 M. `growth`: 50 x seconds at 1 M over seconds at 50 M.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from lake.schemas import LOGGED_EVENT

ENGINES = ("spark", "duckdb", "polars")
QUICK_SIZES, SIZES = (1_000_000,), (1_000_000, 10_000_000, 50_000_000)
DAY_ROWS = 1_000_000
NUM_QUERIES, NUM_PRODUCTS, LIST = 20_000, 50_000, 20
FIRST_DAY = np.datetime64("2026-01-01", "D")
BATCH_ROWS = 5_000_000
KINDS = np.array(["impression", "click", "cart", "purchase"])


def generate(folder: Path, num_rows: int) -> None:
    """Days of a log, a Parquet file each, and the tables of queries and products."""
    for day in range(num_rows // DAY_ROWS):
        place = folder / "events" / f"event_day={FIRST_DAY + day}"
        place.mkdir(parents=True)
        pq.write_table(generated_day(day), place / "part.parquet")
    write_known(folder, [f"q{n}" for n in range(NUM_QUERIES)], [f"p{n}" for n in range(NUM_PRODUCTS)])


def generated_day(day: int) -> pa.Table:
    """A million events of a day: lists of 20 products, clicks, carts, purchases; a bot, and rows that came twice."""
    generator = np.random.default_rng(day)
    num_lists = int(DAY_ROWS / (LIST * 1.14))
    visitor = generator.integers(0, num_lists // 4, num_lists)
    visitor[: num_lists // 100] = 0  # a bot
    query = np.minimum(generator.zipf(1.3, num_lists), NUM_QUERIES) - 1
    start = np.sort(generator.uniform(3600, 86_000, num_lists))
    place = np.tile(np.arange(1, LIST + 1), num_lists)
    shown = {
        "visitor": np.repeat(visitor, LIST),
        "query": np.repeat(query, LIST),
        "product": (np.repeat(query, LIST) * 37 + place * 11) % NUM_PRODUCTS,
        "position": place,
        "seconds": np.repeat(start, LIST),
        "kind": np.zeros(len(place), np.int8),
    }
    clicked = generator.random(len(place)) < 0.6 / place
    parts = [shown]
    for kind, rows, share in ((1, clicked, 1.0), (2, clicked, 0.15), (3, clicked, 0.05)):
        taken = rows & (generator.random(len(place)) < share)
        part = {name: values[taken] for name, values in shown.items()}
        part["seconds"] = part["seconds"] + part["position"] * 2.0 + kind * 7
        parts.append(part | {"kind": np.full(taken.sum(), kind, np.int8)})
    columns = {name: np.concatenate([part[name] for part in parts])[:DAY_ROWS] for name in shown}
    lacking = DAY_ROWS - len(columns["kind"])
    again = generator.integers(0, len(columns["kind"]), max(lacking, 0))  # sent twice
    number = np.concatenate([np.arange(len(columns["kind"])), again])
    columns = {name: values[number] for name, values in columns.items()}
    return logged(day, number, columns)


def logged(day: int, number: np.ndarray[Any, Any], columns: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
    """Rows of logged_event without their day, which is the folder's name."""
    later = columns["kind"] >= 2
    midnight = (FIRST_DAY + day).astype("datetime64[us]").astype(np.int64)
    time_us = midnight + (columns["seconds"] * 1e6).astype(np.int64)

    def text(prefix: str, values: np.ndarray[Any, Any]) -> pa.Array:
        return pc.binary_join_element_wise(prefix, pc.cast(pa.array(values), pa.string()), "")

    query = pc.if_else(pa.array(later), None, text("q", columns["query"]))
    found = {
        "dataset": pa.array(["shop"] * len(number)),
        "delivery": pa.array([str(FIRST_DAY + day)] * len(number)),
        "file": pa.array(["part"] * len(number)),
        "event_id": text("e", number),
        "visitor_id": text("v", columns["visitor"]),
        "query_id": query,
        "product_id": text("p", columns["product"]),
        "kind": pa.array(KINDS[columns["kind"]]),
        "position": pc.if_else(pa.array(later), None, pa.array(columns["position"], pa.int32())),
        "event_time": pa.array(time_us, pa.timestamp("us", tz="UTC")),
        "content": pa.array(number, pa.int64()),
    }
    schema = [field for field in LOGGED_EVENT.schema if field.name != "event_day"]
    arrays = [found.get(field.name, pa.nulls(len(number), field.type)) for field in schema]
    return pa.table(arrays, schema=pa.schema([field.with_nullable(True) for field in schema]))


def from_retrotech(folder: Path, data: Path) -> None:
    """The impressions of retrotech as a day's log; a row that was clicked is an impression and a click."""
    read = pq.read_table(data / "retrotech" / "sessions.parquet")
    position = pc.add(pc.cast(read["rank"], pa.int32()), 1)
    session = pc.binary_join_element_wise(read["query"].cast(pa.string()), read["sess_id"].cast(pa.string()), "/")
    shown = {"session_id": session, "query_id": read["query"].cast(pa.string()), "position": position}
    shown["product_id"] = read["doc_id"].cast(pa.string())
    rows = pa.table(shown | {"kind": pa.array(["impression"] * len(read))})
    clicks = rows.filter(read["clicked"])
    clicks = clicks.set_column(clicks.schema.get_field_index("kind"), "kind", pa.array(["click"] * len(clicks)))
    rows = pa.concat_tables([rows, clicks])
    number = pa.array(np.arange(len(rows)))
    midnight = pa.array(np.full(len(rows), FIRST_DAY.astype("datetime64[us]")), pa.timestamp("us")).cast(
        pa.timestamp("us", tz="UTC")
    )
    found = {name: rows[name].combine_chunks() for name in rows.column_names} | {
        "dataset": pa.array(["shop"] * len(rows)),
        "delivery": pa.array([""] * len(rows)),
        "file": pa.array(["sessions.parquet"] * len(rows)),
        "event_id": number.cast(pa.string()),
        "event_time": midnight,
        "content": number,
    }
    schema = [field for field in LOGGED_EVENT.schema if field.name != "event_day"]
    arrays = [found.get(field.name, pa.nulls(len(rows), field.type)) for field in schema]
    place = folder / "events" / f"event_day={FIRST_DAY}"
    place.mkdir(parents=True)
    pq.write_table(pa.table(arrays, schema=pa.schema([f.with_nullable(True) for f in schema])), place / "part.parquet")
    write_known(folder, rows["query_id"].unique().to_pylist(), rows["product_id"].unique().to_pylist())


def write_known(folder: Path, queries: list[str], products: list[str]) -> None:
    """Tables of all queries and products that the log names."""
    known = pa.table({"dataset": ["shop"] * len(queries), "query_id": queries, "normalised": queries})
    pq.write_table(known, folder / "queries.parquet")
    pq.write_table(pa.table({"dataset": ["shop"] * len(products), "product_id": products}), folder / "products.parquet")


def by_spark(folder: Path, out: Path) -> Callable[[], None]:
    """Ours: what a night of `ingest_events` computes, without its tables."""
    from lake.spark import SparkPlacement, session
    from spark_etl.recipes import VisitRecipe
    from spark_etl.visits import count_places, judge_days

    spark = session(SparkPlacement(num_cores=2, driver_memory_gib=6, num_shuffle_partitions=8))
    spark.range(1000).selectExpr("sum(id)").collect()
    days = sorted(item.name.split("=")[1] for item in (folder / "events").iterdir())
    step = max(1, BATCH_ROWS // DAY_ROWS)

    def work() -> None:
        events = spark.read.parquet(str(folder / "events"))
        queries, products = (spark.read.parquet(str(folder / f"{name}.parquet")) for name in ("queries", "products"))
        for first in range(0, len(days), step):
            listed = ", ".join(f"DATE '{day}'" for day in days[first : first + step])
            batch = events.where(f"event_day IN ({listed})")
            judged = judge_days(batch, queries, products, VisitRecipe())
            counted = count_places(judged.where("reason IS NULL"))
            counted.write.mode("overwrite").parquet(str(out / f"{first:05d}.parquet"))

    return work


DUCKDB = """
COPY (
  WITH named AS (
    SELECT event_day, event_id, e.query_id, e.product_id, kind, position, delivery, file, content,
      coalesce(visitor_id, session_id) AS visitor, session_id, epoch_us(event_time) / 1e6 AS seconds
    FROM read_parquet('{folder}/events/*/*.parquet', hive_partitioning = true) e
      SEMI JOIN read_parquet('{folder}/products.parquet') p ON p.product_id = e.product_id
      LEFT JOIN read_parquet('{folder}/queries.parquet') q ON q.query_id = e.query_id
    WHERE e.query_id IS NULL OR q.query_id IS NOT NULL
  ), once AS (
    SELECT * FROM named
    QUALIFY row_number() OVER (PARTITION BY event_day, event_id ORDER BY delivery, file, content) = 1
  ), timed AS (
    SELECT *, count(*) OVER (PARTITION BY event_day, visitor) AS num_events,
      sum((kind = 'click')::INT) OVER (PARTITION BY event_day, visitor ORDER BY seconds
        RANGE BETWEEN 60 PRECEDING AND CURRENT ROW) AS clicks_in_minute,
      coalesce(seconds - lag(seconds) OVER w > 1800, true)::INT AS is_new
    FROM once WINDOW w AS (PARTITION BY event_day, visitor ORDER BY seconds, event_id)
  ), visited AS (
    SELECT * EXCLUDE (session_id), coalesce(session_id, concat(visitor, '/', sum(is_new) OVER (
        PARTITION BY event_day, visitor ORDER BY seconds, event_id ROWS UNBOUNDED PRECEDING))) AS session_id,
      max(clicks_in_minute) OVER (PARTITION BY event_day, visitor) AS most_clicks
    FROM timed
  ), human AS (
    SELECT * FROM visited WHERE num_events <= 3000 AND most_clicks <= 30
  ), new AS (
    SELECT * FROM human
    WINDOW w AS (PARTITION BY event_day, session_id, product_id ORDER BY kind, query_id, position, seconds, event_id)
    QUALIFY NOT coalesce(kind = lag(kind) OVER w AND query_id IS NOT DISTINCT FROM lag(query_id) OVER w
      AND position IS NOT DISTINCT FROM lag(position) OVER w AND seconds - lag(seconds) OVER w <= 1, false)
  ), traced AS (
    SELECT event_day, product_id, kind, seconds, query_id AS told, position AS told_position,
      last_value(CASE WHEN kind IN ('impression', 'click') THEN struct_pack(q := query_id, p := position) END
        IGNORE NULLS) OVER (PARTITION BY event_day, session_id, product_id ORDER BY seconds, event_id
        ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS look,
      bool_or(kind = 'impression') OVER (PARTITION BY event_day, session_id, product_id, query_id) AS is_shown
    FROM new
  ), kept AS (
    SELECT event_day, coalesce(told, look.q) AS query_id, product_id, coalesce(told_position, look.p) AS position, kind
    FROM traced
    WHERE coalesce(told, look.q) IS NOT NULL AND coalesce(told_position, look.p) IS NOT NULL
      AND (kind <> 'click' OR is_shown OR seconds % 86400 < 1800)
  )
  SELECT event_day, query_id, product_id, position, count(*) FILTER (kind = 'impression') AS impressions,
    count(*) FILTER (kind = 'click') AS clicks, count(*) FILTER (kind = 'cart') AS carts,
    count(*) FILTER (kind = 'purchase') AS purchases
  FROM kept GROUP BY ALL
) TO '{out}/part.parquet'
"""


def by_duckdb(folder: Path, out: Path) -> Callable[[], None]:
    """The peer's SQL, as its users would write it."""
    import duckdb

    base = duckdb.connect()
    base.execute(f"SET threads = 2; SET temp_directory = '{out}/spill'; SET memory_limit = '16GB'")
    out.mkdir(parents=True, exist_ok=True)

    def work() -> None:
        base.execute(DUCKDB.format(folder=folder, out=out))

    return work


def by_polars(folder: Path, out: Path) -> Callable[[], None]:
    """The peer's lazy frames, as its users would write them."""
    import polars as pl

    day, visit = ["event_day", "visitor"], ["event_day", "session_id", "product_id"]
    out.mkdir(parents=True, exist_ok=True)

    def work() -> None:
        products, queries = (pl.scan_parquet(folder / f"{name}.parquet") for name in ("products", "queries"))
        events = pl.scan_parquet(folder / "events" / "*" / "*.parquet", hive_partitioning=True)
        named = events.join(products, on="product_id", how="semi")
        known = named.join(queries.select("query_id"), on="query_id", how="semi")
        once = (
            pl.concat([known, named.filter(pl.col("query_id").is_null())])
            .select(
                "event_day", "event_id", "query_id", "product_id", "kind", "position", "delivery", "file", "content",
                "session_id", pl.coalesce("visitor_id", "session_id").alias("visitor"),
                (pl.col("event_time").dt.epoch("us") / 1e6).alias("seconds"), "event_time",
            )
            .sort("delivery", "file", "content")
            .unique(["event_day", "event_id"], keep="first", maintain_order=True)
            .sort(*day, "seconds", "event_id")
            .collect()
        )  # fmt: skip
        clicks = once.lazy().filter(pl.col("kind") == "click")
        minutes = clicks.rolling("event_time", period="60s", group_by=day, closed="both").agg(pl.len())
        fast = minutes.group_by(day).agg(pl.col("len").max()).filter(pl.col("len") > 30)
        busy = once.lazy().group_by(day).len().filter(pl.col("len") > 3000)
        pause = (pl.col("seconds") - pl.col("seconds").shift()).over(day)
        number = (pause > 1800).fill_null(True).cast(pl.Int32).cum_sum().over(day)
        kind, same = pl.col("kind"), ("kind", "query_id", "position")
        again = (pl.col("seconds") - pl.col("seconds").shift() <= 1).over(visit)
        for name in same:
            again &= pl.col(name).eq_missing(pl.col(name).shift().over(visit))
        is_look = kind.is_in(["impression", "click"])
        seen = pl.when(is_look)
        traced = (
            once.lazy()
            .with_columns(pl.coalesce("session_id", pl.concat_str("visitor", pl.lit("/"), number)))
            .join(busy, on=day, how="anti")
            .join(fast, on=day, how="anti")
            .sort(*visit, *same, "seconds", "event_id")
            .filter(~again.fill_null(False))
            .sort(*visit, "seconds", "event_id")
            .with_columns(
                seen.then(pl.col("query_id")).forward_fill().over(visit).alias("look_query"),
                seen.then(pl.col("position")).forward_fill().over(visit).alias("look_position"),
                (kind == "impression").any().over([*visit, "query_id"]).alias("is_shown"),
            )
        )
        is_kept = (kind != "click") | pl.col("is_shown") | (pl.col("seconds") % 86400 < 1800)
        kept = traced.filter(is_kept).select(
            "event_day",
            pl.coalesce("query_id", "look_query").alias("query_id"),
            "product_id",
            pl.coalesce("position", "look_position").alias("position"),
            "kind",
        )
        names = {"impression": "impressions", "click": "clicks", "cart": "carts", "purchase": "purchases"}
        counted = kept.drop_nulls().group_by("event_day", "query_id", "product_id", "position")
        found = counted.agg(*((kind == one).sum().alias(name) for one, name in names.items()))
        found.collect().write_parquet(out / "part.parquet")

    return work


def checksum(out: Path) -> list[int]:
    """Rows and sums of the counts, plain and by place: equal for equal results, whatever the order."""
    found = pads.dataset(str(out), format="parquet", exclude_invalid_files=True).to_table()
    sums = [len(found)]
    for name in ("impressions", "clicks", "carts", "purchases"):
        counts = pc.cast(found[name], pa.int64())
        sums += [pc.sum(counts).as_py() or 0, pc.sum(pc.multiply(counts, found["position"])).as_py() or 0]
        sums.append(pc.sum(pc.multiply(counts, pc.binary_length(found["query_id"]))).as_py() or 0)
    return sums


def peak_bytes() -> int:
    """Most memory that this process held, and its children (Spark's JVM)."""
    here = psutil.Process()
    held = 0
    for process in (here, *here.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        held += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    return held


def run_engine(engine: str, folder: Path, out: Path) -> dict[str, Any]:
    """One measured run of an engine in this process."""
    started = time.perf_counter()
    work = {"spark": by_spark, "duckdb": by_duckdb, "polars": by_polars}[engine](folder, out)
    ready = time.perf_counter()
    work()
    seconds = time.perf_counter() - ready
    return {"seconds": seconds, "start_sec": ready - started, "peak_bytes": peak_bytes(), "checksum": checksum(out)}


def measure(engine: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """The same in a process of its own."""
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, "-m", "benchmarks.etl", "--engine", engine, "--folder", str(folder), "--out", str(out)]
    environment = os.environ | {"POLARS_MAX_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def inputs(scratch: Path, sizes: tuple[int, ...]) -> Iterator[tuple[str, int, Path]]:
    """Name, rows and folder of each input, one on disk at a time."""
    data = os.environ.get("ASSAY_DATA", "")
    if data and Path(data, "retrotech").is_dir():
        from_retrotech(scratch / "retrotech", Path(data))
        rows = pads.dataset(str(scratch / "retrotech" / "events"), format="parquet").count_rows()
        yield "retrotech", rows, scratch / "retrotech"
        shutil.rmtree(scratch / "retrotech")
    for size in sizes:
        folder = scratch / str(size)
        generate(folder, size)
        yield str(size), size, folder
        shutil.rmtree(folder)


def report(name: str, size: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Prints a table of an input; the least seconds of each engine that ended."""
    best: dict[str, float] = {}
    print(f"\n{name}: {size:,} events")
    for engine, runs in found.items():
        errors = [run["error"] for run in runs if "error" in run]
        if errors:
            print(f"  {engine:7} did not end: {errors[0]}")
            continue
        least = min(runs, key=lambda run: run["seconds"])
        best[engine] = least["seconds"]
        rate, peak = size / least["seconds"], max(run["peak_bytes"] for run in runs) / 2**30
        print(
            f"  {engine:7} {least['seconds']:8.1f} s  {rate:12,.0f} events/s  peak {peak:5.2f} GiB  "
            f"start {least['start_sec']:.1f} s"
        )
    sums = {engine: runs[0]["checksum"] for engine, runs in found.items() if engine in best}
    differing = [engine for engine, value in sums.items() if value != sums["spark"]]
    if differing:
        raise SystemExit(f"{name}: {', '.join(differing)} counted otherwise: {sums}")
    return best


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.engine:
        print(json.dumps(run_engine(given.engine, given.folder, given.out)), flush=True)
        return
    seconds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, size, folder in inputs(Path(scratch), QUICK_SIZES if given.quick else SIZES):
            rounds = 1 if given.quick or size > 10_000_000 else 2
            found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
            for _ in range(rounds):
                for engine in ENGINES:
                    found[engine].append(measure(engine, folder, Path(scratch)))
            seconds[name] = report(name, size, found)
    ratios = {
        f"{peer}_{name}": best[peer] / best["spark"]
        for name, best in seconds.items()
        for peer in ENGINES[1:]
        if peer in best
    }
    for peer in ENGINES[1:]:
        told = [value for name, value in ratios.items() if name.startswith(peer)]
        if told:
            ratios[peer] = min(told)
    if len(SIZES) == sum(name.isdigit() for name in seconds):
        ratios["growth"] = 50 * seconds["1000000"]["spark"] / seconds["50000000"]["spark"]
    print(json.dumps({"benchmark": "etl", "quick": given.quick, "ratios": ratios}))


if __name__ == "__main__":
    main()
