"""The same questions in longer, noisier and musical recordings: a grid over all three.

    labelled rows --> every clip set into a recording of 30 s .. 30 min, at a random place
                  --> plus recorded noise at 20, 10, 0 dB --> plus a bed of music --> moved times

    python -m data_recipes.robustness --in test.jsonl --out grid.jsonl
    python -m data_recipes.robustness --in test.jsonl --lengths-s 30 120 --rows 24 --out grid.jsonl

A question keeps its words; its events move with the clip. Around the clip there is room noise of
-60 dB, the noise and the music. The signal-to-noise ratio is that of the clip's own RMS, and music
lies `MUSIC_DB` below it. Every cell holds the same questions, so cells can be compared pairwise.

Noise and music come from `--noise` and `--music` (a file or folder each, such as MUSAN's), from
the Debian package sonic-pi-samples (recorded; CC0), or are SIMULATED where there is neither (pink
noise, chords): `metadata.robustness` says which.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_recipes.streams import AUDIO_SUFFIXES, Skipped, write_stream
from posttrain.data.audio import SAMPLE_RATE_HZ, load_audio, write_audio
from posttrain.data.rows import Event, Row, read_rows

LENGTHS_S = (30.0, 120.0, 600.0, 1_800.0)
SNRS_DB = (float("inf"), 20.0, 10.0, 0.0)
MUSIC_DB = 10.0
ROOM_DB = -60.0
SAMPLES = Path("usr/share/sonic-pi/samples")
RECORDED = {
    "noise": ("ambi_sauna", "loop_3d_printer", "vinyl_hiss"),
    "music": ("guit_em9", "guit_e_fifths", "loop_garzul", "loop_mika", "loop_safari", "ambi_piano"),
}


@dataclass(frozen=True)
class Bed:
    """What lies under the clip: "recorded" or "simulated" pieces of float32 mono at 16 kHz."""

    kind: str
    provenance: str
    pieces: tuple[np.ndarray, ...]

    def cut(self, rng: random.Random, num_samples: int) -> np.ndarray:
        """One piece, repeated to the length from a random place on, with an RMS of 1."""
        piece = rng.choice(self.pieces)
        start = rng.randrange(len(piece))
        repeated = np.resize(np.roll(piece, -start), num_samples)
        return (repeated / max(_rms(repeated), 1e-9)).astype(np.float32)


def load_bed(kind: str, source: Path | None = None, root: Path = Path("/")) -> Bed:
    """Noise or music from `source`, from the Debian package, or simulated.

    Raises:
        FileNotFoundError: `source` holds no audio.
    """
    if source is not None:
        paths = [source] if source.is_file() else sorted(source.rglob("*"))
        files = [p for p in paths if p.suffix.lower() in AUDIO_SUFFIXES]
        if not files:
            raise FileNotFoundError(f"--{kind} {source}: no audio file there")
    else:
        named = [root / SAMPLES / f"{name}.flac" for name in RECORDED[kind]]
        files = [path for path in named if path.is_file()]
    if files:
        return Bed(kind, "recorded", tuple(load_audio(path) for path in files))
    simulated = _pink_noise if kind == "noise" else _chords
    return Bed(kind, "simulated", (simulated(np.random.default_rng(0)),))


def rows(
    source: Sequence[Row], lengths_s: Sequence[float], counts: Sequence[int], beds: dict[str, Bed],
    out_dir: Path, snrs_db: Sequence[float] = SNRS_DB,
) -> Iterator[Row | Skipped]:  # fmt: skip
    """Every question in every cell of length, noise and music."""
    for length_s, count in zip(lengths_s, counts, strict=True):
        for row in source[:count]:
            if row.audio is None or not row.events or (row.duration_s or 0.0) > length_s:
                yield Skipped(f"{row.id} in {length_s:g} s", "no labelled clip that fits")
                continue
            clip = load_audio(row.audio)
            for snr_db in snrs_db:
                for musical in (False, True):
                    yield _in_cell(row, clip, length_s, snr_db, musical, beds, out_dir)


def _in_cell(
    row: Row, clip: np.ndarray, length_s: float, snr_db: float, musical: bool,
    beds: dict[str, Bed], out_dir: Path,
) -> Row:  # fmt: skip
    rng = random.Random(f"posttrain/robustness/{row.id}/{length_s:g}")  # the same in all its cells
    num_samples = round(length_s * SAMPLE_RATE_HZ)
    start = rng.randint(0, num_samples - len(clip))
    loudness = max(_rms(clip), 1e-4)
    noise, music = (beds[kind].cut(rng, num_samples) for kind in ("noise", "music"))
    room = np.random.default_rng(rng.getrandbits(32)).standard_normal(num_samples, np.float32)
    mixed = 10 ** (ROOM_DB / 20) * room
    mixed[start : start + len(clip)] += clip
    if np.isfinite(snr_db):
        mixed += loudness * 10 ** (-snr_db / 20) * noise
    if musical:
        mixed += loudness * 10 ** (-MUSIC_DB / 20) * music
    cell = {"length": f"{length_s:g} s", "noise": noise_name(snr_db),
            "music": "music" if musical else "no music"}  # fmt: skip
    identity = f"{row.id}/{length_s:g}s/{cell['noise'].replace(' ', '')}/{int(musical)}"
    path = out_dir / f"{identity.replace('/', '-')}.flac"
    write_audio(path, mixed / max(1.0, float(np.abs(mixed).max())))
    offset_s = start / SAMPLE_RATE_HZ
    events = tuple(Event(e.start_s + offset_s, e.end_s + offset_s, e.label) for e in row.events)
    metadata = {
        **row.metadata,
        **cell,
        "question": row.id,
        "robustness": {kind: bed.provenance for kind, bed in beds.items()},
    }
    return replace(
        row, id=identity, audio=str(path), duration_s=length_s, events=events, metadata=metadata,
        answer="", split="test",
    )  # fmt: skip


def noise_name(snr_db: float) -> str:
    return f"{snr_db:g} dB" if np.isfinite(snr_db) else "clean"


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def _pink_noise(rng: np.random.Generator) -> np.ndarray:
    """10 s whose power falls by 3 dB an octave."""
    num_samples = 10 * SAMPLE_RATE_HZ
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    return np.fft.irfft(spectrum, num_samples).astype(np.float32)


def _chords(rng: np.random.Generator) -> np.ndarray:
    """16 s of four chords, two seconds each, with decaying partials."""
    time_s = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    chords = []
    for root_hz in (220.0, 174.6, 196.0, 164.8) * 2:
        notes = [root_hz * ratio * k for ratio in (1, 1.25, 1.5) for k in (1, 2, 3)]
        phases = rng.uniform(0, 2 * np.pi, len(notes))
        waves = [np.sin(2 * np.pi * f * time_s + p) / f for f, p in zip(notes, phases, strict=True)]
        chords.append(np.sum(waves, axis=0) * np.exp(-time_s))
    return np.concatenate(chords).astype(np.float32)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A robustness grid of labelled rows")
    parser.add_argument("--in", dest="source", type=Path, required=True, metavar="ROWS.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="GRID.jsonl")
    parser.add_argument("--lengths-s", type=float, nargs="+", default=list(LENGTHS_S))
    parser.add_argument("--rows", type=int, nargs="+", default=[32],
                        help="questions a cell: one number, or one for each length")  # fmt: skip
    parser.add_argument("--noise", type=Path, default=None, help="file or folder of recordings")
    parser.add_argument("--music", type=Path, default=None, help="file or folder of recordings")
    args = parser.parse_args(argv)
    counts = args.rows * len(args.lengths_s) if len(args.rows) == 1 else args.rows
    if len(counts) != len(args.lengths_s):
        parser.error(f"--rows: {len(counts)} numbers for {len(args.lengths_s)} lengths")
    beds = {kind: load_bed(kind, getattr(args, kind)) for kind in ("noise", "music")}
    source = [row for row in read_rows(args.source) if row.events]
    folder = args.out.parent / f"{args.out.stem}.audio"
    asked = f"{args.source} {args.lengths_s} {counts} {args.noise} {args.music}"
    written = write_stream(args.out, rows(source, args.lengths_s, counts, beds, folder), asked)
    kinds = ", ".join(f"{kind} {bed.provenance}" for kind, bed in beds.items())
    print(f"{args.out}: {written.rows} rows ({kinds}); left out: {dict(written.skipped) or 'none'}")


if __name__ == "__main__":
    main()
