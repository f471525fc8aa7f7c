"""The encoder in eight bits on a processor: weights and activations int8, by OpenVINO, calibrated once by NNCF.

A placement of a trained encoder, not another model: it is made from the encoder's folder, kept in a cache under the
fingerprint of that folder and of the texts that set the ranges of its activations, and compared with the float32
vectors by `parity.compare_vectors`. The ranges are fixed, so that a text's vector does not depend on its neighbours,
as it would where each batch set its own (ONNX Runtime's dynamic quantisation).

Calibrating takes the extra `int8`, half a minute and a few hundred texts; encoding from the cache takes openvino alone.

N texts, L tokens, D width of a vector.

Cites: Jacob et al. 2018 (arXiv 1712.05877); Xiao et al. 2023 (SmoothQuant, arXiv 2211.10438).
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from conf.load import ConfigError, fingerprint
from embeddings.encoder import Side, distinct, forward, length_batches, load_encoder, tokenize
from embeddings.lanes import run_in_lanes

log = logging.getLogger(__name__)

NUM_CALIBRATION_TEXTS: Final = 300
"""NNCF's own default."""
_MODEL_FILE = "int8.xml"
_FORMAT = 1


class QuantisedEncoder:
    """One side of an encoder in int8, with `encode` of the same meaning as `encoder.encode`.

    Attributes:
        model: the float32 encoder, whose tokenizer, prefix and token limit count.
        side: query or document.
    """

    def __init__(self, model: SentenceTransformer, side: Side, file: str | Path) -> None:
        """Compiles the file of `build_quantised` for as many threads as torch has now.

        Raises:
            ConfigError: openvino is not installed.
        """
        self.model, self.side = model, side
        self._num_lanes = torch.get_num_threads()
        threads = {"INFERENCE_NUM_THREADS": self._num_lanes, "NUM_STREAMS": self._num_lanes}
        # what is left in floating point stays float32: on processors with bfloat16 the default would be that
        settings = threads | {"INFERENCE_PRECISION_HINT": "f32"}
        with _without_telemetry():
            self._compiled = _openvino().Core().compile_model(str(file), "CPU", settings)
        self._names = [next(iter(port.names)) for port in self._compiled.inputs]

    def encode(self, texts: Sequence[str], *, batch_tokens: int = 4096) -> NDArray[np.float32]:
        """Normalised vectors [N, D], float32, in the order of the texts; equal texts are encoded once.

        Args:
            texts: without prefixes.
            batch_tokens: padded tokens of one batch; each thread computes one of its own.
        """
        order, row_N = distinct(texts)
        vectors = np.empty((len(order), self.model.get_embedding_dimension()), dtype=np.float32)

        def work(batches: Iterator[tuple[NDArray[np.intp], dict[str, Any]]]) -> None:
            request = self._compiled.create_infer_request()
            for rows, features in batches:
                given = {name: np.ascontiguousarray(features[name].numpy()) for name in self._names}
                vectors[rows] = request.infer(given)[0]

        batches = length_batches(self.model, order, self.side, batch_tokens=batch_tokens)
        run_in_lanes(batches, work, self._num_lanes)
        # the norm that was traced saw quantised components
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
        return vectors[row_N]


def load_quantised(
    folder: str | Path, side: Side, *, cache: str | Path, calibration: Sequence[str] = ()
) -> QuantisedEncoder:
    """The int8 encoder of a folder's side, calibrated and cached where the cache lacks it.

    Args:
        folder: of an encoder, see `encoder.load_encoder`.
        side: each has a file of its own in the cache, heads and token limits included.
        cache: folder for the files, any number of encoders; safe to delete.
        calibration: texts like those to encode, of which at most 300 are used, spread over their alphabet; part of
            the fingerprint, so give the same ones to get the cached file.

    Raises:
        ConfigError: no such folder, the extra `int8` is not installed, or there is nothing to calibrate with.
    """
    model, _ = load_encoder(folder)
    return QuantisedEncoder(model, side, build_quantised(model, folder, side, cache=cache, calibration=calibration))


def build_quantised(
    model: SentenceTransformer, folder: str | Path, side: Side, *, cache: str | Path, calibration: Sequence[str]
) -> Path:
    """The file of the int8 encoder, made where the cache lacks it; whoever comes second finds it whole or not at all.

    Args:
        model: what the folder holds, on the CPU.
        folder: whose files, by content, name the result.
        side: whose head, prefix and token limit are part of it.
        cache: see `load_quantised`.
        calibration: likewise.

    Raises:
        ConfigError: the extra `int8` is not installed, or there is nothing to calibrate with.
    """
    known = sorted(set(calibration))
    chosen = known[:: max(1, -(-len(known) // NUM_CALIBRATION_TEXTS))]
    name = fingerprint(_FORMAT, _folder_print(folder), side, chosen)
    target = Path(cache, f"{name}-{side}")
    if (target / _MODEL_FILE).is_file():
        return target / _MODEL_FILE
    if not chosen:
        raise ConfigError(f"int8: expected texts to calibrate the {side} side of {folder} with, got none; give some")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as place:
        fresh = Path(place, "fresh")
        fresh.mkdir()
        _quantise(model, side, chosen, fresh / _MODEL_FILE)
        try:
            os.replace(fresh, target)
        except OSError:
            # another process was first; its file is as good
            if not (target / _MODEL_FILE).is_file():
                raise
    log.info("int8: %s side of %s calibrated with %d texts in %s", side, folder, len(chosen), target)
    return target / _MODEL_FILE


def _quantise(model: SentenceTransformer, side: Side, texts: Sequence[str], file: Path) -> None:
    """Traces tokens to vectors of one side, sets the ranges by the texts and writes the graph."""
    with _without_telemetry(), warnings.catch_warnings():
        # 2026-11: OpenVINO traces, which torch 2.13 calls deprecated; what the trace holds for constants is the model's
        warnings.simplefilter("ignore")
        openvino, nncf = _openvino(), _nncf()
        model.eval()
        features = tokenize(model, texts[:2], side, device="cpu")
        example = {name: value for name, value in features.items() if isinstance(value, Tensor) and value.ndim == 2}
        rest = {name: value for name, value in features.items() if name not in example}
        with torch.inference_mode():
            graph = openvino.convert_model(
                _Side(model, side, tuple(example), rest), example_input=tuple(example.values())
            )
        for port, name in zip(graph.inputs, example, strict=True):
            port.get_tensor().set_names({name})

        def tensors(text: str) -> dict[str, NDArray[np.int64]]:
            found = tokenize(model, [text], side, device="cpu")
            return {name: found[name].numpy() for name in example}

        quantised = nncf.quantize(
            graph,
            nncf.Dataset(list(texts), tensors),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(texts),
        )
        openvino.save_model(quantised, str(file), compress_to_fp16=False)


class _Side(nn.Module):
    """Token tensors to normalised vectors, with positional arguments, as tracing wants them."""

    def __init__(self, model: SentenceTransformer, side: Side, names: tuple[str, ...], rest: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.side, self.names, self.rest = model, side, names, rest

    def forward(self, *tensors: Tensor) -> Tensor:
        return forward(self.model, {**self.rest, **dict(zip(self.names, tensors, strict=True))}, self.side)


def _folder_print(folder: str | Path) -> str:
    """Hash of the names and contents of a folder's files."""
    found = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _openvino() -> Any:
    return _import("openvino")


def _nncf() -> Any:
    return _import("nncf")


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ConfigError(
            f"int8: expected the package {name}, found none; pip install 'assay[int8]' where vectors are made, "
            "or encode in bfloat16 or float32"
        ) from error


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Keeps both packages from reporting their use; they ask these variables alone."""
    wanted = {"CI": "true", "NNCF_CI": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
