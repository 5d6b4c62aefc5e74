"""Every clip is encoded once: a store on disk that all processes of a machine share.

    clip --content hash--> key --> file there?  memory-mapped
                                   not there?   lock, encode, write, rename

What is stored follows from what trains:

    encoder frozen, projector frozen    embeddings            nothing is computed twice
    encoder frozen, projector trains    encoder outputs       the projector has its gradient
    encoder trains                      nothing               its outputs change with every step

Clips travel by path; no embedding passes through Ray.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.data.audio import check_duration, load_audio
from posttrain.model.audio_encoder import AudioEncoder
from posttrain.model.load import audio_limit_s, load_processor
from posttrain.model.partial_weights import AUDIO_TOWER, PROJECTOR, fingerprint, read_weights

log = logging.getLogger(__name__)

DEFAULT_FOLDER = "~/.cache/posttrain/audio_embeddings"
TENSOR = "audio"
ABANDONED_S = 3_600
WRITERS = 16  # processes of a machine that may fill the store at once
KEPT_SHARE = 0.95  # of the limit, once it was passed
LAYOUT = 1  # of what is stored; counts up when its meaning changes


class StoredAudio(StrEnum):
    """What of a clip is kept."""

    EMBEDDINGS = "embeddings"
    ENCODER_OUTPUTS = "encoder_outputs"


def stored_audio(*, train_encoder: bool, train_projector: bool) -> StoredAudio | None:
    """What may be kept when these train; None: nothing."""
    if train_encoder:
        return None
    return StoredAudio.ENCODER_OUTPUTS if train_projector else StoredAudio.EMBEDDINGS


@dataclass(frozen=True)
class AudioStoreSettings:
    """What a process needs to open the store; plain data.

    Attributes:
        checkpoint: whose encoder and projector.
        dtype: of the encoder and of what is stored.
        max_audio_len_s: longest clip, seconds; None: the processor's limit.
    """

    checkpoint: str
    kind: StoredAudio
    dtype: str = "bfloat16"
    folder: str | None = None
    max_gib: float = 50.0
    max_audio_len_s: float | None = None


class TensorStore:
    """Tensors in safetensors files, one a key; least recently used ones go first.

    Args:
        folder: on local disk; made if missing.
        max_bytes: files above this are removed, oldest use first, never the newest.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes
        self._room_bytes = (
            0.0  # to write before the folder, which may hold a million files, is read
        )
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    def get_or_make(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of `key`, memory-mapped; made by one process while others wait for it."""
        path = self.folder / f"{key}.safetensors"
        tensor = self._open(path)
        if tensor is not None:
            return tensor
        with FileLock(self.folder / "locks" / f"{key}.lock"):
            tensor = self._open(path)
            if tensor is None:
                self._write(path, make())
                tensor = self._open(path)
        if tensor is None:
            raise OSError(f"{path}: written and not readable; check the disk")
        self._room_bytes -= tensor.nbytes
        if self._room_bytes < 0:
            self._room_bytes = self._evict(keep=path) / WRITERS
        return tensor

    def _open(self, path: Path) -> Tensor | None:
        """None when there is no such file, or it is damaged: then it is made again."""
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(TENSOR)
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            log.warning("%s is damaged and made anew: %s", path, error)
            return None
        with suppress(OSError):  # evicted meanwhile, or another user's: the tensor is here
            os.utime(path)
        return tensor

    def _write(self, path: Path, tensor: Tensor) -> None:
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
        try:
            save_file({TENSOR: tensor.detach().cpu().contiguous()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"{path}: cannot be written ({error}); set audio_embeddings.dir to a "
                "folder with room, or lower audio_embeddings.max_gib"
            ) from error

    def _evict(self, keep: Path) -> int:
        """Bytes that are free now. Files that another process has open stay readable for it: only
        their name goes."""
        with FileLock(self.folder / "locks" / "evict.lock"):
            files = []
            self._remove_abandoned()
            for path in self.folder.glob("*.safetensors"):
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                files.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(size for _, size, _ in files)
            limit = self.max_bytes if total <= self.max_bytes else KEPT_SHARE * self.max_bytes
            for _, size, path in sorted(files):
                if total <= limit:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= size
        return max(0, self.max_bytes - total)

    def _remove_abandoned(self) -> None:
        """What a killed process was writing, an hour ago or more."""
        for path in (*self.folder.glob(".*.partial"), *self.folder.glob(".tmp*")):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    path.unlink()


class AudioEmbeddings:
    """The store of one checkpoint: path in, key and tensor out.

    The encoder is loaded when the first clip is missing, so a process that finds everything never
    holds one.
    """

    def __init__(self, settings: AudioStoreSettings, device: str | torch.device) -> None:
        self.settings = settings
        self.device = torch.device(device)
        self.processor = load_processor(settings.checkpoint)
        self.limit_s = audio_limit_s(self.processor, settings.max_audio_len_s)
        folder = settings.folder or DEFAULT_FOLDER
        self.store = TensorStore(folder, int(settings.max_gib * 2**30))
        self._keys: dict[tuple[str, int, int], str] = {}

    def __call__(self, path: str) -> tuple[str, Tensor]:
        """(key, (A, H) embeddings or (A, C) encoder outputs) of an audio file, on the CPU.

        Raises:
            FileNotFoundError, ValueError: as `load_audio`.
        """
        key = self.key(path)
        check_duration(path, self.limit_s)
        return key, self.store.get_or_make(key, lambda: self._encode(path))

    def key(self, path: str) -> str:
        """Of the file's content, the processor, and the weights that made the tensor."""
        try:
            stat = Path(path).stat()
        except FileNotFoundError as error:
            message = f"audio {path}: no such file; correct the row's `audio`"
            raise FileNotFoundError(message) from error
        known = (path, stat.st_size, stat.st_mtime_ns)
        if known not in self._keys:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            self._keys[known] = hashlib.sha256(f"{self._model_key}{content}".encode()).hexdigest()
        return self._keys[known]

    @cached_property
    def _model_key(self) -> str:
        """Everything but the clip that decides what is stored."""
        kind = self.settings.kind
        parts = (AUDIO_TOWER, PROJECTOR) if kind is StoredAudio.EMBEDDINGS else (AUDIO_TOWER,)
        weights = fingerprint(read_weights(self.settings.checkpoint, parts))
        extractor = self.processor.feature_extractor.to_dict()
        return json.dumps(
            [LAYOUT, kind, self.settings.dtype, weights, extractor, self.processor.max_audio_len],
            sort_keys=True,
        )

    @cached_property
    def _encoder(self) -> AudioEncoder:
        dtype = getattr(torch, self.settings.dtype)
        # new modules draw random weights: whether a clip was stored must not move the run's dropout
        with torch.random.fork_rng(devices=[]):
            return AudioEncoder(self.settings.checkpoint, self.device, dtype)

    def _encode(self, path: str) -> Tensor:
        waveform = load_audio(path, max_duration_s=self.limit_s)
        if self.settings.kind is StoredAudio.EMBEDDINGS:
            return self._encoder.embed(waveform)
        return self._encoder.encode(waveform)
