# Databricks notebook source
# MAGIC %md # Grades in doubt
# MAGIC What the newest `build_audit` put in doubt by its recipe (below): how much, how surely, and what reviews found.

# COMMAND ----------
import pandas as pd
from matplotlib import pyplot as plt

from embeddings.audit_report import MEANT, PAPER
from jobs.notebook import open_lake
from spark_etl import overview

pd.options.display.max_colwidth = 80
lake = open_lake(globals())
conflicts = lake.table("audit_conflict")
lake.audit_recipe

# COMMAND ----------
# MAGIC %md ## How many: by kind, grade and stratum (1: the narrowest queries; 0: too few clicks to tell)
# MAGIC Below, `expected_wrong` is the sum of the probabilities that the human grade is wrong.

# COMMAND ----------
counts = overview.count_conflicts(conflicts).toPandas()
counts.pivot_table("num_pairs", ["dataset", "kind", "grade"], "stratum", "sum", fill_value=0, margins=True)

# COMMAND ----------
shares = overview.conflict_shares(conflicts, lake.table("annotation_consensus")).toPandas()
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
counts.pivot_table("num_pairs", "kind", "grade", "sum").plot.barh(stacked=True, ax=left, xlabel="conflicts")
shares.pivot_table("share", "grade", "dataset").plot.bar(ax=right, ylabel="share of human grades in doubt", rot=0)
plt.show()
shares.join(counts.groupby(["dataset", "grade"])["expected_wrong"].sum(), on=["dataset", "grade"])

# COMMAND ----------
# MAGIC %md ## How sure: the probability that the human grade is wrong

# COMMAND ----------
parts = overview.doubt_histogram(conflicts).toPandas()
drawn = parts.pivot_table("num_pairs", "from_probability", "kind", "sum", fill_value=0)
drawn.plot.bar(stacked=True, figsize=(13, 4), width=0.9, xlabel="wrong_probability, from", ylabel="conflicts")
plt.show()

# COMMAND ----------
# MAGIC %md ## The twenty first

# COMMAND ----------
overview.first_conflicts(conflicts, lake.table("query"), lake.table("catalog_product"), num=20).toPandas()

# COMMAND ----------
# MAGIC %md ## What reviews found, beside the paper's figures

# COMMAND ----------
report = lake.table_if_there("audit_report")
found = None if report is None else overview.newest_report(report).toPandas()
found if found is None else found[found["slice"].isin(["all", "kind", "dataset", "traffic"])].drop(columns="run_id")

# COMMAND ----------
figures = pd.DataFrame() if found is None else found[found["slice"] == "figure"].set_index("name")
figures if figures.empty else figures[["share", "low", "high"]].assign(paper=pd.Series(PAPER), meaning=pd.Series(MEANT))
