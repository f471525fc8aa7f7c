# Databricks notebook source
# MAGIC %md
# MAGIC # One query
# MAGIC Its judged pairs with everything that speaks for or against their grades, and why each is in doubt or not.
# MAGIC The setting `query` takes an id or a text; without it: the query of the first conflict.

# COMMAND ----------
import pandas as pd
from matplotlib import pyplot as plt

from jobs.notebook import open_lake
from spark_etl import overview

pd.options.display.max_colwidth = 200
lake = open_lake(globals())
query = lake.find_query(lake.setting("query"))
query.toPandas()

# COMMAND ----------
judged, annotations = lake.judged_pairs(), lake.table("human_annotation")
explained = overview.explain_query(judged, annotations, query, lake.audit_recipe)
pairs = overview.with_texts(explained, lake.table("query"), lake.table("catalog_product")).toPandas()
pairs = pairs.sort_values("wrong_probability", ascending=False)
pairs[["title", "grade", "likely_grade", "kind", "wrong_probability", "why"]]

# COMMAND ----------
# MAGIC %md ## Evidence
# MAGIC Marks as given; behaviour per look with its 95 % interval; attraction, the clicks per look that clicks, carts
# MAGIC and purchases together let expect; the labeller (p); all together (posterior).

# COMMAND ----------
evidence = ["title", "grade", "marks", "impressions", "examinations", "clicks", "carts", "purchases"]
evidence += ["click_rate", "click_rate_low", "click_rate_high", "cart_rate", "purchase_rate", "attraction"]
pairs[[*evidence, "p0", "p1", "p2", "posterior_0", "posterior_1", "posterior_2"]]

# COMMAND ----------
# MAGIC %md ## The bounds of its stratum, and how sure the labeller usually is of grades 0, 1, 2

# COMMAND ----------
bounds = pairs[["dataset", "query_id", "query", "stratum", "breadth", "ignored_below", "loved_above", "sure_of"]]
bounds.dropna(subset="breadth").drop_duplicates(["dataset", "query_id"])

# COMMAND ----------
figure, axes = plt.subplots(figsize=(13, 1 + len(pairs) / 4), layout="constrained")
names = pairs["title"].fillna(pairs["product_id"]).str[:50] + ", grade " + pairs["grade"].astype(str)
places = range(len(pairs))
axes.hlines(places, pairs["click_rate_low"], pairs["click_rate_high"], color="tab:gray")
axes.scatter(pairs["click_rate"], places, c=pairs["kind"].notna().map({True: "tab:red", False: "tab:blue"}))
axes.set(yticks=places, yticklabels=names, xlabel="clicks per look; red: in doubt; lines: ignored below, loved above")
for bound in {*pairs["ignored_below"].dropna(), *pairs["loved_above"].dropna()}:
    axes.axvline(bound, color="black", linestyle=":")
plt.show()
