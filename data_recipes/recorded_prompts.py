"""Recorded voice prompts: real studio speech from Debian packages, with transcripts.

    installed package -> else unpacked into a cache folder (no root) -> else synthesised speech

Packages `asterisk-core-sounds-{en,es,fr,it,ru}[-wav]`, CC BY-SA 3.0, 8 kHz mono, one speaker a
language. File names match across languages, so the texts are parallel. Every `Recordings` says
where its audio came from; reports must repeat it.

    python -m data_recipes.recorded_prompts --languages en fr --out rows.jsonl
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio, write_audio
from posttrain.data.rows import Event, Row, write_rows
from posttrain.types import Task

log = logging.getLogger(__name__)

VOICES = {
    "en": "en_US_f_Allison",
    "es": "es_MX_f_Allison",
    "fr": "fr_CA_f_June",
    "it": "it_IT_m_Carlo",
    "ru": "ru_RU_f_IvrvoiceRU",
}
LICENCE = "CC-BY-SA-3.0"
SOUNDS_DIR = "usr/share/asterisk/sounds"
UNHEARD_PERCENT = 12


@dataclass(frozen=True)
class Clip:
    """One recording.

    Attributes:
        name: path below the voice's folder without suffix, the same in every language.
        path: the file.
        text: transcript; for tones the bracketed description.
        is_tone: True when there is no speech in it.
    """

    name: str
    path: Path
    text: str
    language: str
    is_tone: bool = False

    @property
    def unheard(self) -> bool:
        """Kept out of all training: decided by the file name, so in every language at once."""
        return clip_is_unheard(self.name)


@dataclass(frozen=True)
class Recordings:
    """Clips of one language and where they came from: "recorded" or "synthesised"."""

    language: str
    provenance: str
    clips: tuple[Clip, ...]


def clip_is_unheard(name: str) -> bool:
    digest = hashlib.sha256(f"posttrain/clip/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < UNHEARD_PERCENT


def cache_dir() -> Path:
    base = os.environ.get("POSTTRAIN_CACHE") or Path.home() / ".cache" / "posttrain"
    return Path(base) / "recordings"


def load_recordings(language: str = "en", allow_synthesis: bool = True) -> Recordings:
    """Clips with transcripts of one language, from the best source at hand.

    Raises:
        ValueError: unknown language.
        FileNotFoundError: nothing installed, nothing downloadable and synthesis not allowed.
    """
    if language not in VOICES:
        raise ValueError(f"recorded_prompts: language {language!r}; known: {sorted(VOICES)}")
    if clips := find_recordings(language):
        return Recordings(language, "recorded", clips)
    if _unpack_without_root(language) and (clips := _read_package_tree(cache_dir(), language)):
        return Recordings(language, "recorded", clips)
    if allow_synthesis:
        log.warning("no recorded %s prompts could be had; speech is SYNTHESISED", language)
        return Recordings(language, "synthesised", _synthesise(language))
    raise FileNotFoundError(
        f"recorded prompts for {language!r}: install asterisk-core-sounds-{language}-wav and "
        f"asterisk-core-sounds-{language}, or unpack both below {cache_dir()}"
    )


def find_recordings(language: str) -> tuple[Clip, ...]:
    """Clips that are on this machine already: installed, or unpacked into the cache."""
    for root in (Path("/"), cache_dir()):
        if clips := _read_package_tree(root, language):
            return clips
    return ()


def _read_package_tree(root: Path, language: str) -> tuple[Clip, ...]:
    voice_dir = root / SOUNDS_DIR / VOICES[language]
    doc_dir = root / "usr/share/doc" / f"asterisk-core-sounds-{language}"
    texts = _read_transcripts(doc_dir, language)
    if not voice_dir.is_dir() or not texts:
        return ()
    clips = []
    for path in sorted(voice_dir.rglob("*.wav")):
        name = path.relative_to(voice_dir).with_suffix("").as_posix()
        text = texts.get(name)
        if text:
            clips.append(Clip(name, path, text.strip("[]<> "), language, text[0] in "[<"))
    return tuple(clips)


def _read_transcripts(doc_dir: Path, language: str) -> dict[str, str]:
    path = doc_dir / f"core-sounds-{language}.txt.gz"
    if not path.exists():
        return {}
    lines = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith(";"))
    return {name.strip(): text.strip() for name, text in pairs if text.strip()}


def _unpack_without_root(language: str) -> bool:
    """`apt-get download` + `dpkg-deb -x` into the cache. False, with a warning, when it fails."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return False
    packages = [f"asterisk-core-sounds-{language}-wav", f"asterisk-core-sounds-{language}"]
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
        got = subprocess.run(
            ["apt-get", "download", *packages],
            cwd=work,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if got.returncode != 0:
            log.warning("apt-get download failed: %s", got.stderr.strip().splitlines()[-1:])
            return False
        for deb in sorted(Path(work).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(deb), str(cache_dir())], check=True, timeout=300)
    return True


# fmt: off
SYNTHETIC_TEXTS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty",
    "ninety", "a", "e", "f", "h", "i", "k", "l", "m", "o", "q", "r", "s", "w", "x", "y", "z",
    "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "january",
    "february", "march", "april", "may", "june", "july", "august", "september", "october",
    "november", "december", "hello", "goodbye", "today", "tomorrow", "yesterday", "pound",
    "star", "number", "location", "minutes", "activated", "cancelled",
)
# fmt: on


def _synthesise(language: str) -> tuple[Clip, ...]:
    """Speaks a closed English word list, for machines with no recordings at all."""
    if language != "en":
        raise FileNotFoundError(
            f"recorded prompts for {language!r} are missing and only English is synthesised"
        )
    from data_recipes.speech_synthesis import speak

    out = cache_dir() / "synthesised" / language
    clips = []
    for text in SYNTHETIC_TEXTS:
        path = out / f"{text}.wav"
        if not path.exists():
            write_audio(path, speak(text))
        clips.append(Clip(f"synthesised/{text}", path, text, language))
    return tuple(clips)


def trim_to_energy(
    waveform: np.ndarray, sample_rate_hz: int = SAMPLE_RATE_HZ, threshold: float = 0.03
) -> np.ndarray:
    """Cuts leading and trailing parts whose 10 ms RMS is below `threshold` of the loudest.

    Args:
        waveform: float32 (num_samples,).
        threshold: share of the largest RMS.

    Returns:
        float32 (num_kept,), at least one sample.
    """
    hop = sample_rate_hz // 100
    num_frames = max(1, len(waveform) // hop)
    frames = waveform[: num_frames * hop].reshape(num_frames, -1)
    rms = np.sqrt(np.mean(frames.astype(np.float64) ** 2, axis=1))
    loud = np.flatnonzero(rms > threshold * rms.max())
    if len(loud) == 0:
        return waveform
    return waveform[loud[0] * hop : (loud[-1] + 1) * hop]


def label_of(clip: Clip) -> str:
    """Normalised text used as an event label: lower case, words only."""
    text = clip.text.lower().replace("this is a simple", "").replace("this is an", "")
    text = re.sub(r"\btone\b", "", text) if "beep" in text else text
    return " ".join(re.findall(r"[\w']+", text))


def transcript_rows(recordings: Recordings, out_dir: Path) -> Iterable[Row]:
    """One `transcript` row a spoken clip; audio is resampled to 16 kHz below `out_dir`."""
    for clip in recordings.clips:
        if clip.is_tone:
            continue
        waveform = load_audio(clip.path)
        duration_s = len(waveform) / SAMPLE_RATE_HZ
        audio = out_dir / recordings.language / f"{clip.name}.flac"
        if not audio.exists():
            write_audio(audio, waveform)
        yield Row(
            id=f"recorded-prompts/{clip.language}/{clip.name}",
            prompt=({"role": "user", "content": "Transcribe the input speech."},),
            audio=str(audio),
            duration_s=duration_s,
            events=(Event(0.0, duration_s, clip.text),),
            answer=clip.text,
            task=Task.TRANSCRIPT,
            language=clip.language,
            source=f"asterisk-core-sounds-{clip.language} ({recordings.provenance})",
            licence=LICENCE,
            split="unheard" if clip.unheard else "train",
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Recorded voice prompts -> transcript rows")
    parser.add_argument("--languages", nargs="+", default=["en"], choices=sorted(VOICES))
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write; audio beside it")
    args = parser.parse_args(argv)
    rows = [
        row
        for language in args.languages
        for row in transcript_rows(load_recordings(language), args.out.parent / "audio")
    ]
    write_rows(args.out, rows)
    print(f"{len(rows)} rows, {sum(r.duration_s or 0 for r in rows) / 3600:.2f} h -> {args.out}")


if __name__ == "__main__":
    main()
