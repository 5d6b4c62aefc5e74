"""What can be evaluated: how a suite's rows are read, what an answer is worth, how it is grouped.

    --data FOLDER (as its owners publish it) or ROWS.jsonl --> rows --> statistics of every answer

A suite is one entry in `SUITES`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_recipes import af_think, choice_benchmarks, common_voice, covost2, fleurs, librispeech
from data_recipes.streams import Skipped
from posttrain.data.rows import Row, read_rows
from posttrain.evaluate import row_statistics
from posttrain.evaluate.row_statistics import Statistic
from posttrain.types import Completion
from reward_models.text_normal import CHARACTER_LANGUAGES, language_code


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        data: a folder in its owners' layout, or a file of rows.
        layout: name of the layout; None: found out from the folder.
        language, target: codes as the set writes them (ar_eg, en), of speech and of translation.
        split: as the set names it.
        audio_dir: where clips are written that the set keeps inside tables.
    """

    data: Path
    layout: str | None
    language: str | None
    target: str | None
    split: str | None
    audio_dir: Path


@dataclass(frozen=True)
class Published:
    """A figure that others published for the same set, to be shown beside ours."""

    source: str
    language: str
    metric: str
    model: str
    value: float


@dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        about: one line for people.
        read: rows of a folder; None: rows come from a file alone.
        statistics: of one answer; raises `Unscorable` where there is nothing to compare with.
        max_tokens: longest answer unless asked otherwise.
        groups: keys of a row that scores are also shown by: fields, or keys of its metadata.
        main: the metric to look at first.
        needs_judge: without a judge there is no score.
    """

    about: str
    read: Callable[[Source], Iterable[Row | Skipped]] | None
    statistics: Callable[[Row, Completion], Mapping[str, Statistic]]
    max_tokens: int
    main: str
    groups: tuple[str, ...] = ()
    needs_judge: bool = False


def read_source(name: str, source: Source) -> tuple[list[Row], list[Skipped]]:
    """Rows of a suite, and what could not become one.

    Raises:
        FileNotFoundError, ValueError: what is missing, and where it was looked for.
    """
    suite = SUITES[name]
    if source.data.is_file() and source.data.suffix == ".jsonl":
        return _chosen_rows(source), []
    if suite.read is None:
        raise ValueError(f"--data {source.data}: suite {name} reads a file of rows (ROWS.jsonl)")
    if not source.data.exists():
        raise FileNotFoundError(f"--data {source.data}: no such file or folder")
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for item in suite.read(source):
        if isinstance(item, Row):
            rows.append(item)
        else:
            skipped.append(item)
    if not rows:
        reasons = sorted({item.reason for item in skipped})
        raise ValueError(
            f"--data {source.data}: not one row; {'; '.join(reasons) or 'it is empty'}"
        )
    identity, count = Counter(row.id for row in rows).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"--data {source.data}: id {identity!r} stands there {count} times; every question "
            "needs an id of its own"
        )
    return rows, skipped


def _chosen_rows(source: Source) -> list[Row]:
    """Rows of a file; `--language` and `--split` choose among them."""
    if source.layout or source.target:
        raise ValueError(
            f"--layout and --target belong to folders; {source.data} is a file of rows"
        )
    rows = [
        row for row in read_rows(source.data)
        if source.language in (None, row.language) and source.split in (None, row.split)
    ]  # fmt: skip
    if not rows:
        raise ValueError(
            f"--data {source.data}: no row of language {source.language} and split {source.split}"
        )
    return rows


def _choice_rows(source: Source) -> Iterable[Row | Skipped]:
    _refuse(source.split, "--split", "a choice benchmark's file is its split")
    return choice_benchmarks.rows(source.data, source.layout)


def _speech_rows(source: Source) -> Iterable[Row | Skipped]:
    layout = source.layout or _speech_layout(source)
    if layout == "librispeech":
        return librispeech.rows(source.data, source.split or "test-clean")
    language = _given(source.language, "--language", "fr, or ar_eg for FLEURS")
    if layout == "fleurs":
        split = source.split or "test"
        return fleurs.rows(str(source.data), language, split, None, source.audio_dir)
    if layout == "common_voice":
        return common_voice.rows(source.data, language, source.split or "test", source.audio_dir)
    raise ValueError(f"--layout {layout}: one of librispeech, fleurs, common_voice")


def _speech_layout(source: Source) -> str:
    if next(source.data.glob("*/*/*/*.trans.txt"), None):
        return "librispeech"
    if (source.data / "clips").is_dir():
        return "common_voice"
    if next(source.data.glob("*/*.parquet"), None):
        return "fleurs"
    raise FileNotFoundError(
        f"--data {source.data}: neither LibriSpeech (SPLIT/*/*/*.trans.txt), Common Voice (clips/) "
        "nor FLEURS (LANGUAGE/SPLIT-*.parquet)"
    )


def _translation_rows(source: Source) -> Iterable[Row | Skipped]:
    language = _given(source.language, "--language", "en, or en_us for FLEURS")
    target = _given(source.target, "--target", "ar, or ar_eg for FLEURS")
    layout = source.layout or ("covost2" if (source.data / "clips").is_dir() else "fleurs")
    split = source.split or "test"
    if layout == "covost2":
        return covost2.rows(source.data, (language, target), split, source.audio_dir)
    if layout == "fleurs":
        return fleurs.rows(str(source.data), language, split, target, source.audio_dir)
    raise ValueError(f"--layout {layout}: one of covost2, fleurs")


def _long_audio_rows(source: Source) -> Iterable[Row | Skipped]:
    """NVIDIA's JSON with the clips beside it."""
    _refuse(source.split, "--split", "all JSON files of the folder are read")
    files = sorted(source.data.glob("*.json*"))
    if not files:
        raise FileNotFoundError(f"--data {source.data}: no JSON of questions in the folder")
    for file in files:
        yield from af_think.rows(file, source.data)


def _refuse(value: str | None, flag: str, why: str) -> None:
    if value is not None:
        raise ValueError(f"{flag} {value}: {why}; leave it out")


def _given(value: str | None, flag: str, such_as: str) -> str:
    if value is None:
        raise ValueError(f"{flag} is missing; give a code such as {such_as}")
    return value


def group_values(row: Row, keys: Sequence[str]) -> dict[str, str]:
    """Key -> the row's value, of the keys that it has."""
    values = {}
    for key in keys:
        value = getattr(row, key, None) or row.metadata.get(key)
        if value:
            values[key] = str(value)
    return values


SUITES: dict[str, Suite] = {
    "grounding": Suite(
        "are the times true? labelled rows: grounding, dense, order, count, absent, points", None,
        row_statistics.of_grounding, 1024, "miou", ("task", "split"),
    ),
    "choice": Suite(
        "multiple choice: folders of MMAU, MMAU-Pro, MMAR, MMSU", _choice_rows,
        row_statistics.of_choice, 1024, "accuracy",
        ("source", "domain", "category", "difficulty", "language"),
    ),
    "speech": Suite(
        "speech recognition: folders of LibriSpeech, FLEURS, Common Voice", _speech_rows,
        row_statistics.of_speech, 512, "wer", ("language",),
    ),
    "translation": Suite(
        "speech translation: folders of CoVoST 2, FLEURS", _translation_rows,
        row_statistics.of_translation, 512, "chrf++", ("language",),
    ),
    "long_audio": Suite(
        "open questions about long recordings: LongAudioBench's JSON; needs a judge",
        _long_audio_rows, row_statistics.of_open, 1024, "judge_accuracy", ("source",),
        needs_judge=True,
    ),
    "refusal": Suite(
        "does it decline what is harmful, and only that? rows of data_recipes.refusals", None,
        row_statistics.of_refusal, 128, "refusal", ("task",),
    ),
    "robustness": Suite(
        "grounding over length, noise and music: rows of data_recipes.robustness", None,
        row_statistics.of_grounding, 1024, "miou", ("length", "noise", "music"),
    ),
}  # fmt: skip


def main_metric(name: str, rows: Sequence[Row]) -> str:
    """The suite's, but characters for languages that are written without spaces."""
    if name == "speech" and all(language_code(r.language) in CHARACTER_LANGUAGES for r in rows):
        return "cer"
    return SUITES[name].main


PUBLISHED = (
    Published("covost2", "ar", "bleu_13a", "AF-Next (card)", 21.9),
    Published("covost2", "ar", "bleu_13a", "Phi-4-multimodal (AF-Next's card)", 9.9),
    Published("librispeech", "en", "wer", "AF-Next (card), test-clean", 0.0154),
)
