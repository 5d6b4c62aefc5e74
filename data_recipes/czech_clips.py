"""Acted Czech speech with Czech text and English translation: a real test of speech translation.

From the Debian packages `fillets-ng-data-cs` (sound) and `fillets-ng-data` (texts), GPL-2;
installed, or unpacked below a folder that is given.

    apt-get install fillets-ng-data-cs fillets-ng-data      (or dpkg-deb -x of both into a folder)
    python -m data_recipes.czech_clips --out rows.jsonl

Each clip gives a `transcript` and a `translation` row; which tenth of the clips is the test is
decided by their names.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_recipes.streams import Skipped, run, stored_clip
from posttrain.data.rows import Row
from posttrain.types import Task

LICENCE = "GPL-2"
GAME = Path("usr/share/games/fillets-ng")
TEST_PERCENT = 10
TRANSLATE = "Translate any speech you hear from Czech into English."
TRANSCRIBE = "Transcribe the input speech."
_STRING = r'"((?:[^"\\]|\\.)*)"'
DIALOG_ID = re.compile(rf"^dialogId\({_STRING},\s*{_STRING},\s*{_STRING}\)")
DIALOG_STR = re.compile(rf"^dialogStr\({_STRING}\)")


def read_dialogs(path: Path) -> dict[str, tuple[str, str]]:
    """Clip name -> (Czech, English) of a `dialogs_cs.lua`; entries without Czech are left out."""
    texts: dict[str, tuple[str, str]] = {}
    name = english = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := DIALOG_ID.match(line.strip()):
            name, english = match[1], _unescaped(match[3])
        elif (match := DIALOG_STR.match(line.strip())) and name:
            texts[name] = (_unescaped(match[1]), english)
    return texts


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text).strip()


def split_of(name: str) -> str:
    digest = hashlib.sha256(f"posttrain/czech/{name}".encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % 100 < TEST_PERCENT else "train"


def rows(source: Path, audio_dir: Path) -> Iterator[Row | Skipped]:
    """Two rows a clip; audio is resampled to 16 kHz below `audio_dir`.

    Args:
        source: `/`, or the folder into which both packages were unpacked.
    """
    scripts = sorted((source / GAME / "script").glob("*/dialogs_cs.lua"))
    if not scripts:
        raise FileNotFoundError(
            f"{source / GAME}: no texts; install fillets-ng-data and fillets-ng-data-cs, or give "
            "--source, the folder that both were unpacked into"
        )
    for script in scripts:
        level = script.parent.name
        for name, (czech, english) in read_dialogs(script).items():
            sound = source / GAME / "sound" / level / "cs" / f"{name}.ogg"
            if not sound.is_file():
                yield Skipped(f"{level}/{name}", "text without sound")
                continue
            if not czech or not english:
                yield Skipped(f"{level}/{name}", "no text")
                continue
            stored = audio_dir / level / f"{name}.flac"
            try:
                audio, duration_s = stored_clip(stored, sound.read_bytes())
            except ValueError as error:
                yield Skipped(f"{level}/{name}", f"audio cannot be used: {error}")
                continue
            for task, question, answer in (
                (Task.TRANSCRIPT, TRANSCRIBE, czech), (Task.TRANSLATION, TRANSLATE, english),
            ):  # fmt: skip
                yield Row(
                    f"czech-clips/{level}/{name}/{task.value}",
                    ({"role": "user", "content": question},), audio, duration_s, task,
                    answer=answer, language="cs" if task is Task.TRANSCRIPT else "en",
                    source="fillets-ng-data-cs", licence=LICENCE, split=split_of(f"{level}/{name}"),
                )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--source", type=Path, default=Path("/"))

    run(
        "Czech clips -> rows", lambda args: rows(args.source, args.out.parent / "audio"), argv,
        arguments,
    )  # fmt: skip


if __name__ == "__main__":
    main()
