"""Speech sets that hold a clip and its text a record, read through `datasets`.

A Hub id is streamed; a local folder in the Hub's layout (`CONFIG/SPLIT-*.parquet`) or in that of
the release (`SPLIT.tsv` with `clips/`) is read from disk. Audio is taken as its encoded bytes and
decoded here, so that no codec of `datasets` is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_recipes.streams import AUDIO_SUFFIXES, Skipped, read_table, stored_clip
from posttrain.data.rows import Row
from posttrain.types import Task

TRANSCRIBE = "Transcribe the input speech."
LANGUAGES = {
    "ar": "Arabic", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "de": "German", "en": "English",
    "es": "Spanish", "et": "Estonian", "fa": "Persian", "fr": "French", "hi": "Hindi",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "lv": "Latvian",
    "mn": "Mongolian", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ru": "Russian",
    "sl": "Slovenian", "sv": "Swedish", "ta": "Tamil", "tr": "Turkish", "uk": "Ukrainian",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def language_name(code: str) -> str:
    """English name of a code such as ar, ar_eg or zh-CN; the code itself where it is not known."""
    short = code.replace("-", "_").split("_")[0].lower()
    return LANGUAGES.get({"cmn": "zh"}.get(short, short), code)


def translate_prompt(source: str, target: str) -> str:
    return (
        f"Translate any speech you hear from {language_name(source)} into {language_name(target)}."
    )


def hub_records(source: str, config: str, split: str) -> Iterator[dict[str, Any]]:
    """Records of a Hub data set, or of a local folder in its layout; audio undecoded.

    Raises:
        FileNotFoundError: the folder has no parquet of that config and split.
    """
    from datasets import Audio, load_dataset

    folder = Path(source)
    if folder.is_dir():
        files = sorted(str(p) for p in (folder / config).glob(f"{split}-*.parquet"))
        if not files:
            raise FileNotFoundError(
                f"{folder / config}: no {split}-*.parquet; give a Hub id or a copy of its folder"
            )
        data = load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
    else:
        data = load_dataset(source, config, split=split, streaming=True)
    yield from data.cast_column("audio", Audio(decode=False))


def tsv_records(
    folder: Path, name: str, columns: Sequence[str], clips: str
) -> Iterator[dict[str, Any]]:
    """Records of `NAME.tsv`, `path` being below `CLIPS/`; audio as bytes, None if it is missing."""
    for record in read_table(folder / f"{name}.tsv", columns, "\t"):
        path = folder / clips / record["path"]
        found = next(
            (p for p in (path, *(path.with_suffix(s) for s in AUDIO_SUFFIXES)) if p.is_file()), None
        )
        content = found.read_bytes() if found else None
        yield {**record, "audio": {"bytes": content, "path": record["path"]}}


def speech_row(
    identity: str, audio: dict[str, Any] | None, text: str, *, task: Task, prompt: str,
    language: str, source: str, licence: str, split: str, audio_dir: Path,
) -> Row | Skipped:  # fmt: skip
    """One row, its audio written as 16 kHz FLAC; or why there is none."""
    if not text.strip():
        return Skipped(identity, "empty text")
    content = (audio or {}).get("bytes")
    if content is None and audio and audio.get("path") and Path(audio["path"]).is_file():
        content = Path(audio["path"]).read_bytes()
    if content is None:
        return Skipped(identity, "audio not in the folder")
    try:
        clip, duration_s = stored_clip(audio_dir / f"{identity.split('/', 1)[1]}.flac", content)
    except ValueError as error:
        return Skipped(identity, f"audio cannot be used: {error}")
    return Row(
        f"{identity}/{task.value}", ({"role": "user", "content": prompt},), clip, duration_s, task,
        answer=text.strip(), language=language, source=source, licence=licence,
        split="test" if split == "test" else "train",
    )  # fmt: skip
