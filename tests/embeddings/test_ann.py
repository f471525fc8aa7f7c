"""FAISS indexes of parts: in a process of their own, since FAISS and torch do not go together."""

import os
import subprocess
import sys

import pytest

from embeddings.index_recipe import IndexRecipe

CODE = """
import sys
import faiss
import numpy as np
import pyarrow as pa
from embeddings.ann import IndexPart, nearest_rows, train_index
from embeddings.index_recipe import IndexRecipe
from embeddings.topk import merge_topk
from embeddings.vectors import VectorStore, inner_products, write_vectors

folder, kind = sys.argv[1:]
faiss.omp_set_num_threads(1)
generator = np.random.default_rng(0)
centres = generator.normal(size=(40, 32))
vectors = (centres[generator.integers(40, size=6000)] + .6 * generator.normal(size=(6000, 32))).astype(np.float32)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
store, hashes = VectorStore(folder + "/v"), [str(row) for row in range(6000)]
write_vectors(store.path_of(hashes), vectors, hashes, kind="float16")
catalog, queries = store.vectors(pa.array(hashes)), vectors[::100] + np.float32(.01)
recipe = IndexRecipe(kind=kind, lists=32, probes=12, code_bytes=8, links_looked_at=200, spare=200, train_rows=1300)
rows = catalog.in_file_order(np.arange(6000)[1::2])
train_index(folder + "/trained.faiss", catalog, rows, recipe, 1500)
parts = np.array_split(rows, 2)
found = [IndexPart(folder, number, catalog, part, recipe).search(queries, 20) for number, part in enumerate(parts)]
scores, near = merge_topk([score for score, _ in found], [row for _, row in found], 20)
assert np.array_equal(scores[:, 3], inner_products(queries, catalog.take(near[:, 3])))
assert (near % 2 == 1).all()
exact_scores, exact = nearest_rows(catalog, rows, queries, 20)
recall = np.mean([np.intersect1d(a, b).size for a, b in zip(near, exact)]) / 20
# files that are there are read, not built: the same answer without the trained index
import os
os.unlink(folder + "/trained.faiss")
again = IndexPart(folder, 0, catalog, parts[0], recipe).search(queries, 20)
assert all(np.array_equal(a, b) for a, b in zip(again, found[0]))
narrow = IndexRecipe(kind=kind, probes=1, links_looked_at=1, spare=0)
few = IndexPart(folder, 1, catalog, parts[1], narrow).search(queries, 1400)
assert np.isneginf(few[0][few[1] == np.iinfo(np.int64).max]).all()
assert "torch" not in sys.modules
print(recall)
"""


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq", "hnsw"])
def test_an_index_names_most_of_the_nearest_and_scores_are_exact(tmp_path, kind):
    # threads of the matrix library too: beside other work they wait for each other far longer than they compute
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(tmp_path), kind]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) <= 1


def test_settings_that_fit_no_index_are_refused():
    with pytest.raises(ValueError, match="expected a divisor of the width 100"):
        IndexRecipe(kind="ivf_pq", code_bytes=48).factory(10, 100)
    with pytest.raises(ValueError, match="has no index"):
        IndexRecipe().factory(10, 100)


def test_memory_grows_with_rows_and_by_kind():
    sizes = {kind: IndexRecipe(kind=kind).num_bytes(1000, 384) for kind in ("exact", "ivf_pq", "ivf_flat", "hnsw")}
    assert list(sizes.values()) == sorted(sizes.values())
    assert sizes["exact"] == 0
    assert IndexRecipe(kind="hnsw").num_bytes(2000, 384) == 2 * sizes["hnsw"]
