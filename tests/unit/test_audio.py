from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from posttrain.data.audio import audio_duration_s, check_waveform, load_audio, write_audio


def tone(seconds: float, rate_hz: int, hertz: float = 440.0) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate_hz)) / rate_hz)


def test_stereo_and_other_rates_are_mixed_and_resampled(tmp_path: Path) -> None:
    path = tmp_path / "s.wav"
    left = tone(1.0, 44_100)
    soundfile.write(path, np.stack([left, np.zeros_like(left)], axis=1), 44_100)
    waveform = load_audio(path)
    assert waveform.dtype == np.float32 and waveform.shape == (16_000,)
    expected = 0.5 * tone(1.0, 16_000)
    assert np.abs(waveform[200:-200] - expected[200:-200]).max() < 2e-3


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.wav"):
        load_audio(tmp_path / "gone.wav")
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.wav: file of 0 bytes"):
        load_audio(empty)
    text = tmp_path / "text.wav"
    text.write_text("this is not audio")
    with pytest.raises(ValueError, match=r"text.wav: cannot be decoded"):
        load_audio(text)
    whole = tmp_path / "whole.flac"
    write_audio(whole, tone(1.0, 16_000).astype(np.float32))
    broken = tmp_path / "broken.flac"
    broken.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken.flac"):
        load_audio(broken)


def test_nan_silent_and_empty_waveforms_are_refused(tmp_path: Path) -> None:
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(1_000), 16_000)
    with pytest.raises(ValueError, match="silent"):
        load_audio(silent)
    assert load_audio(silent, allow_silence=True).shape == (1_000,)
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.array([0.1, np.nan, 0.2]), 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match="sample 1 is not finite"):
        load_audio(nan)
    with pytest.raises(ValueError, match="no samples"):
        check_waveform(np.zeros(0), name="x")


def test_too_long_audio_is_refused_with_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    write_audio(path, tone(3.0, 16_000).astype(np.float32))
    with pytest.raises(ValueError, match=r"3.0 s is longer than max_audio_len 2 s"):
        load_audio(path, max_duration_s=2.0)
    assert audio_duration_s(path) == 3.0
