# Databricks notebook source
# MAGIC %md
# MAGIC # What a place is worth
# MAGIC The click model's looks per place beside the raw click rate, both with the first place as 1. The raw rate falls
# MAGIC for two reasons, fewer looks and worse products; the looks fall for the first alone.

# COMMAND ----------
from matplotlib import pyplot as plt

from jobs.notebook import open_lake
from spark_etl import overview

lake = open_lake(globals())
places = overview.click_rates_by_place(lake.table("place_count"), lake.table("click_model")).toPandas()
places

# COMMAND ----------
for dataset, rows in places.groupby("dataset"):
    scale = rows["relative_rate"].iloc[0] / rows["click_rate"].iloc[0]
    figure, axes = plt.subplots(figsize=(13, 4), layout="constrained")
    axes.plot(rows["position"], rows["relative_rate"], marker="o", label="raw click rate, first place 1")
    axes.fill_between(
        rows["position"], scale * rows["click_rate_low"], scale * rows["click_rate_high"], alpha=0.2, label="its 95 %"
    )
    axes.step(rows["position"], rows["examination"], where="mid", label="looks per impression (fitted)")
    axes.set(title=dataset, xlabel="place in the result list", ylim=(0, None))
    axes.legend()
    plt.show()

# COMMAND ----------
# MAGIC %md ## Whether the fit came to rest
# MAGIC No round may lower the likelihood. `change` is the largest of a place's looks in the round.
# MAGIC `converged` is false where the log had too few clicks for a fit: then the looks are 1 everywhere.

# COMMAND ----------
rounds = lake.table("click_model_round").orderBy("dataset", "round").toPandas()
last = rounds.groupby("dataset").tail(1).set_index("dataset")
places.groupby("dataset")[["converged", "impressions", "clicks"]].agg(
    {"converged": "min"} | dict.fromkeys(["impressions", "clicks"], "sum")
).join(last)

# COMMAND ----------
for dataset, rows in rounds.groupby("dataset"):
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.5), layout="constrained")
    left.plot(rows["round"], rows["log_likelihood"], marker="o")
    left.set(title=dataset, xlabel="round", ylabel="log likelihood, nats")
    right.plot(rows["round"], rows["change"], marker="o")
    right.set(title=dataset, xlabel="round", ylabel="largest change of looks", yscale="log")
    plt.show()
