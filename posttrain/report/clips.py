"""Clips inside the page: compressed, with the shape of their waveform; links beyond the cap."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio

NUM_PEAKS = 600
LONGEST_EMBEDDED_S = 120.0


class Clips:
    """Takes clips as they are needed and gives each a number; equal paths are one clip.

    Args:
        cap_bytes: of all embedded audio, as it stands in the page (base64).
        page_dir: folder of the page; audio beyond the cap is linked relative to it.
    """

    def __init__(self, cap_bytes: int, page_dir: Path) -> None:
        self.left, self.page_dir = cap_bytes, page_dir
        self.records: list[dict[str, Any]] = []
        self._numbers: dict[str, int | None] = {}
        self.linked = 0

    def number(self, audio: str | None) -> int | None:
        """None without audio, and for a file that is not there or cannot be read."""
        if not audio:
            return None
        if audio not in self._numbers:
            record = self._record(Path(audio))
            self._numbers[audio] = None if record is None else len(self.records)
            self.records += [record] if record else []
        return self._numbers[audio]

    def _record(self, path: Path) -> dict[str, Any] | None:
        try:
            samples = load_audio(path)
        except (ValueError, OSError):
            return None
        duration_s = len(samples) / SAMPLE_RATE_HZ
        record: dict[str, Any] = {
            "name": path.name, "duration_s": round(duration_s, 3), "peaks": peaks(samples),
        }  # fmt: skip
        if duration_s <= LONGEST_EMBEDDED_S and self.left > 0:
            encoded = base64.b64encode(as_mp3(samples)).decode()
            if len(encoded) <= self.left:
                self.left -= len(encoded)
                return record | {"mp3": encoded}
        self.linked += 1
        return record | {"href": Path(os.path.relpath(path, self.page_dir)).as_posix()}


def as_mp3(samples: np.ndarray) -> bytes:
    """MP3, about 23 kbit/s for speech: every browser plays it, and it is encoded fast."""
    out = io.BytesIO()
    clipped = np.clip(samples, -1.0, 1.0)
    soundfile.write(
        out, clipped, SAMPLE_RATE_HZ, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.9
    )
    return out.getvalue()


def peaks(samples: np.ndarray) -> str:
    """Largest magnitude in each of at most `NUM_PEAKS` stretches, as base64 of bytes.

    The loudest is 255.
    """
    count = min(NUM_PEAKS, len(samples))
    largest = np.array([np.abs(part).max() for part in np.array_split(samples, count)])
    scaled = np.rint(255 * largest / max(float(largest.max()), 1e-9)).astype(np.uint8)
    return base64.b64encode(scaled.tobytes()).decode()
