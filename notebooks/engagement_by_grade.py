# Databricks notebook source
# MAGIC %md
# MAGIC # What shoppers do with pairs of each grade
# MAGIC Clicks, carts and purchases per look, freed of places, by human grade and stratum of the query. If behaviour
# MAGIC tells of relevance, rates rise with the grade within every stratum; else the audit has little to go by.

# COMMAND ----------
from matplotlib import pyplot as plt

from jobs.notebook import open_lake
from spark_etl import overview

lake = open_lake(globals())
rates = overview.rates_by_grade(lake.table("engagement"), lake.table("annotation_consensus")).toPandas()

# COMMAND ----------
# MAGIC %md ## Rates with 95 % intervals over pairs
# MAGIC Stratum 1 holds the narrowest queries; 0 those with fewer than two clicks.

# COMMAND ----------
for (dataset, name), rows in rates.groupby(["dataset", "name"]):
    figure, axes = plt.subplots(figsize=(13, 3.5), layout="constrained")
    for grade, own in rows.groupby("grade"):
        errors = [own["rate"] - own["low"], own["high"] - own["rate"]]
        axes.errorbar(own["stratum"] + (grade - 1) / 8, own["rate"], errors, fmt="o", capsize=4, label=f"grade {grade}")
    axes.set(title=f"{dataset}: {name}", xlabel="stratum", ylabel="per look", xticks=sorted(set(rows["stratum"])))
    axes.legend()
    plt.show()

# COMMAND ----------
# MAGIC %md ## How single pairs spread
# MAGIC Quartiles of the pairs' own rates, drawn to their class. Where grades overlap, clicks cannot tell them apart.

# COMMAND ----------
columns = ["num_pairs", "looks", "num_events", "rate", "low", "high", "quartile_1", "quartile_2", "quartile_3"]
rates.set_index(["dataset", "name", "stratum", "grade"])[columns]

# COMMAND ----------
# MAGIC %md ## By grade alone, all strata together

# COMMAND ----------
whole = rates.groupby(["dataset", "name", "grade"])[["num_pairs", "looks", "num_events"]].sum()
whole.assign(rate=whole["num_events"] / whole["looks"])["rate"].unstack("grade")
