"""
Embedding a table with pandas
=============================

A table goes in, and its rows come out as points of a plane, as a table again. Along the way there is a score for every
row, which finds those that are unlike the rest.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from sklearn.datasets import load_breast_cancer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PowerTransformer

from ddvi.sklearn import DDVI

# %%
# The table
# ---------
#
# Measurements of the nuclei of cells from tumours, which come with scikit-learn. The diagnosis is kept aside.

cells = load_breast_cancer(as_frame=True)
table, diagnosis = cells.data, cells.target.map(dict(enumerate(cells.target_names)))
print(f"{table.shape[0]} tumours, {table.shape[1]} measurements")
print(table.iloc[:3, :4].to_string())
print(diagnosis.value_counts().to_string())

# %%
# The embedding
# -------------
#
# Most columns are skewed, which a power transform takes out. ``DDVI`` is an estimator as any other: it stands at
# the end of a pipeline, and gives tables where it is asked to.

pipeline = make_pipeline(PowerTransformer(), DDVI(prior="gaussian", epochs=30, lr=4e-3, hidden_size=64, random_state=0))
embedding = pipeline.set_output(transform="pandas").fit_transform(table)
embedding["diagnosis"] = diagnosis
print(embedding.head().round(2).to_string())

# %%
# It has the index of the table, so the two can be put together as pandas does:

print(embedding.groupby("diagnosis").mean().round(2).to_string())
radius = table["mean radius"]
print(table.join(embedding)[["mean radius", "ddvi0", "ddvi1"]].corr().round(2)["mean radius"].to_string())

# %%
# Rows unlike the others
# ----------------------
#
# ``score_samples`` is a lower bound on log p(x) of each row. The lowest are rows that the model finds hard to explain;
# which columns are to blame shows beside it, in standard deviations of the transformed columns.

scaler, estimator = pipeline[0], pipeline[-1]
scaled = scaler.transform(table)
score = embedding["ddvi0"].copy()
score[:] = estimator.score_samples(scaled)
strange = score.nsmallest(5).index
for row in strange:
    column = scaled.loc[row].abs().idxmax()
    print(f"row {row}: log p(x) at least {score[row]:6.1f} nats, {column} {scaled.loc[row, column]:+.1f}")

# %%
# In a picture
# ------------
#
# The diagnosis wasn't shown to the estimator. Rings are the rows from above.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained", sharex=True, sharey=True)
for name, colour, marker in (("benign", "#0072B2", "o"), ("malignant", "#D55E00", "^")):
    rows = embedding[embedding["diagnosis"] == name]
    left.scatter(rows["ddvi0"], rows["ddvi1"], s=18, color=colour, marker=marker, alpha=0.7, linewidths=0, label=name)
odd = embedding.loc[strange]
left.scatter(odd["ddvi0"], odd["ddvi1"], s=110, facecolors="none", edgecolors="#333333", label="lowest score")
left.legend(frameon=False)
left.set(title="by diagnosis", xlabel="ddvi0", ylabel="ddvi1", aspect="equal")
points = right.scatter(embedding["ddvi0"], embedding["ddvi1"], s=18, c=radius, cmap="viridis", linewidths=0)
right.set(title="by mean radius of the nuclei", xlabel="ddvi0", aspect="equal")
figure.colorbar(points, ax=right, shrink=0.8)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
