"""Audio in: decode, check, mix down, resample. Audio is float32 mono (num_samples,) at 16 kHz."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE_HZ = 16_000
AUDIO_TOKENS_PER_S = 25  # AF-Next: 40 ms an embedding
SILENCE_PEAK = 1e-5


def load_audio(
    path: str | Path, *, max_duration_s: float | None = None, allow_silence: bool = False
) -> np.ndarray:
    """Reads one file as float32 mono (num_samples,) at 16 kHz.

    Several channels are averaged and other sample rates resampled (soxr, high quality). All else
    that is wrong is refused: transformers would truncate long audio with a mere warning.

    Args:
        max_duration_s: longest clip accepted, in seconds (the processor's `max_audio_len`).
        allow_silence: accept a clip whose peak is below 1e-5.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, undecodable, NaN, silent or too long; names the file and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"audio {path}: no such file; correct the row's `audio`")
    if path.stat().st_size == 0:
        raise ValueError(f"audio {path}: file of 0 bytes; fetch it again or drop the row")
    try:
        if max_duration_s is not None:
            check_duration(path, max_duration_s)
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"audio {path}: cannot be decoded ({error.error_string.strip()}); "
            "not an audio file, or corrupt: convert it to WAV, FLAC, OGG or MP3"
        ) from error
    waveform = samples.mean(axis=1)
    check_waveform(waveform, name=str(path), allow_silence=allow_silence)
    if rate_hz != SAMPLE_RATE_HZ:
        waveform = soxr.resample(waveform, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    return np.ascontiguousarray(waveform, dtype=np.float32)


def check_waveform(waveform: np.ndarray, *, name: str, allow_silence: bool = False) -> None:
    """Refuses what no reward could be true about: no samples, NaN, infinity, silence."""
    if waveform.size == 0:
        raise ValueError(f"audio {name}: no samples; drop the row")
    if not np.isfinite(waveform).all():
        bad = int(np.flatnonzero(~np.isfinite(waveform))[0])
        raise ValueError(f"audio {name}: sample {bad} is not finite; re-encode the file")
    if not allow_silence and float(np.abs(waveform).max()) < SILENCE_PEAK:
        raise ValueError(
            f"audio {name}: silent (peak below {SILENCE_PEAK:g}); check the decoder or drop the row"
        )


def check_duration(path: str | Path, limit_s: float) -> None:
    """Raises ValueError when the file lasts longer than `limit_s`; reads the header alone."""
    duration_s = audio_duration_s(path)
    if duration_s > limit_s + 1e-6:
        raise ValueError(
            f"audio {path}: {duration_s:.1f} s is longer than max_audio_len {limit_s:g} s; "
            "cut the clip or raise model.max_audio_len_s"
        )


def audio_duration_s(path: str | Path) -> float:
    """Length in seconds, read from the header alone."""
    try:
        return float(soundfile.info(path).duration)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"audio {path}: cannot be decoded; convert it to WAV or FLAC") from error


def write_audio(path: str | Path, waveform: np.ndarray) -> None:
    """Writes 16 kHz mono audio (16 bit) atomically; the suffix decides the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    soundfile.write(partial, waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
    partial.replace(path)
