"""Tables of earlier versions under Spark's pen."""

from dataclasses import replace

from lake import spark as lake_spark
from lake import tables
from lake.schemas import CLICK_MODEL_ROUND, FLOAT64, Column


def test_a_column_that_a_table_had_before_stays_without_values(spark, lake):
    column = Column("log_posterior", FLOAT64, "of an earlier version")
    earlier = replace(CLICK_MODEL_ROUND, columns=(*CLICK_MODEL_ROUND.columns, column))
    schema = "dataset string, round int, log_likelihood double, change double"
    rows = spark.createDataFrame([("d", 1, -2.0, 0.5)], schema)
    lake_spark.replace(spark, lake, earlier, rows.selectExpr("*", "-3D AS log_posterior"), run_id="one")
    lake_spark.replace(spark, lake, CLICK_MODEL_ROUND, rows, run_id="two")
    (found,) = tables.rows(lake, CLICK_MODEL_ROUND).to_pylist()
    assert found == {"dataset": "d", "round": 1, "log_likelihood": -2.0, "change": 0.5}
    (held,) = tables.open_table(lake, CLICK_MODEL_ROUND).to_pyarrow_table().to_pylist()
    assert held["log_posterior"] is None
