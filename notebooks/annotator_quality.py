# Databricks notebook source
# MAGIC %md
# MAGIC # Annotators
# MAGIC How raters agree, and how each stands to the others and to gold. Intervals are 95 %.

# COMMAND ----------
import pandas as pd
from matplotlib import pyplot as plt

from jobs.notebook import open_lake

lake = open_lake(globals())
quality = lake.table("annotator_quality").orderBy("dataset", "slice", "kappa").toPandas()
agreement = lake.table("annotation_agreement").orderBy("dataset", "slice", "alpha_ordinal").toPandas()

# COMMAND ----------
# MAGIC %md ## How raters agree
# MAGIC Ordinal alpha of 0.8 and more is taken for reliable, below 0.67 for no ground to build on (Krippendorff).

# COMMAND ----------
ends = ["alpha_ordinal", "alpha_ordinal_low", "alpha_ordinal_high", "alpha_nominal", "kappa", "kappa_low", "kappa_high"]
agreement[agreement["slice"] != "annotator"][["dataset", "slice", "value", "num_pairs", "num_marks", *ends]]

# COMMAND ----------
# MAGIC %md ## Each annotator, the least agreeing first
# MAGIC `bias` above 0 marks too high. Kappa is missing where too few marks could be compared.

# COMMAND ----------
everyone = quality[quality["slice"] == "all"].drop(columns=["slice", "value"])
everyone

# COMMAND ----------
shown = everyone.dropna(subset="kappa").head(40)
names = shown["dataset"] + ": " + shown["annotator"]
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.5 + len(shown) / 4), sharey=True, layout="constrained")
left.hlines(names, shown["kappa_low"], shown["kappa_high"], color="tab:gray")
left.scatter(shown["kappa"], names)
left.set(xlabel="quadratic kappa with the majority of the others")
right.barh(names, shown["bias"])
right.set(xlabel="bias, steps")
plt.show()

# COMMAND ----------
# MAGIC %md ## Where: the slices in which annotators agree least with the others

# COMMAND ----------
slices = quality[quality["slice"] != "all"].dropna(subset="kappa").sort_values("kappa")
slices[["dataset", "annotator", "slice", "value", "num_marks", "kappa", "kappa_low", "kappa_high", "bias"]].head(20)

# COMMAND ----------
# MAGIC %md ## How each marks pairs of each grade (Dawid-Skene)

# COMMAND ----------
confusion = lake.table_if_there("annotator_confusion")
rates = pd.DataFrame() if confusion is None else confusion.toPandas().fillna({"annotator": "", "scale": ""})
rates if rates.empty else rates.pivot_table(
    "probability", ["dataset", "kind", "annotator", "scale", "num_marks"], ["true_grade", "grade"]
).round(3)
