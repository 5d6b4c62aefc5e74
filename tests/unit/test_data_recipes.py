"""Every data recipe on a small folder in its source's own format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from data_recipes import (
    af_think,
    ami,
    audioset_strong,
    clotho_moment,
    common_voice,
    covost2,
    czech_clips,
    fleurs,
    ladder,
    refusals,
    tacos,
)
from data_recipes.streams import Skipped, within, write_stream
from posttrain.data.audio import write_audio
from posttrain.data.pairs import read_pairs
from posttrain.data.rows import Event, Row, read_rows
from posttrain.types import Task


def clip(path: Path, duration_s: float) -> Path:
    rng = np.random.default_rng(0)
    write_audio(path, (0.1 * rng.standard_normal(round(16_000 * duration_s))).astype(np.float32))
    return path


def only_rows(items: object) -> list[Row]:
    return [item for item in items if isinstance(item, Row)]  # type: ignore[attr-defined]


def reasons(items: object) -> list[str]:
    return [item.reason for item in items if isinstance(item, Skipped)]  # type: ignore[attr-defined]


def test_af_think_reads_nvidias_json_and_repairs_packed_minutes(tmp_path: Path) -> None:
    clip(tmp_path / "audio" / "trailers" / "one.flac", 151.0)
    turns = [
        {"from": "human", "value": "<sound>\nWhen does the music stop?"},
        {"from": "gpt", "value": "<t>0.066-0.231</t> and <t>0.574-1.034</t>"},
    ]
    records = [
        {"id": "a", "sound": "trailers/one.wav", "duration": 151.2, "conversations": turns},
        {"id": "b", "sound": ["x.wav", "y.wav"], "duration": 3.0, "conversations": turns},
        {"id": "c", "sound": "gone.wav", "duration": 3.0, "conversations": turns},
        {"id": "d", "conversations": [{"from": "human", "value": "Why?"},
                                      {"from": "gpt", "value": "Because."}]},
    ]  # fmt: skip
    source = tmp_path / "af_think_time.json"
    source.write_text(json.dumps(records))
    found = list(af_think.rows(source, tmp_path / "audio"))
    first, text_only = only_rows(found)
    assert first.answer == "<t>6.6-23.1</t> and <t>57.4-63.4</t>"
    assert first.metadata["repaired_packed"] is True and first.duration_s == pytest.approx(151.0)
    assert first.prompt[0]["content"] == "When does the music stop?"
    assert (text_only.id, text_only.audio, text_only.answer) == ("d", None, "Because.")
    assert reasons(found) == ["several clips in one conversation", "audio not in the folder"]


def test_audioset_strong_names_its_labels(tmp_path: Path) -> None:
    clip(tmp_path / "audio" / "b0RF_30000.wav", 10.0)
    table = tmp_path / "strong.tsv"
    table.write_text(
        "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\n"
        "b0RF_30000\t0.000\t2.500\t/m/09x0r\nb0RF_30000\t1.0\t10.2\t/m/03k3r\n"
        "gone_0\t0.0\t1.0\t/m/09x0r\n"
    )
    (tmp_path / "names.tsv").write_text("/m/09x0r\tSpeech\n/m/03k3r\tHorse\n")
    labels = audioset_strong.read_labels(tmp_path / "names.tsv")
    found = list(audioset_strong.rows(table, labels, tmp_path / "audio"))
    dense, speech, _ = only_rows(found)
    assert dense.task is Task.DENSE and [e.label for e in dense.events] == ["speech", "horse"]
    assert dense.events[1].end_s == 10.0, "an end just behind the clip's is its end"
    assert (speech.query, speech.answer) == ("speech", "<t>0.0-2.5</t>")
    assert reasons(found) == ["audio not in the folder"]
    with pytest.raises(ValueError, match="label '/m/03k3r' has no name"):
        list(audioset_strong.rows(table, {"/m/09x0r": "speech"}, tmp_path / "audio"))
    table.write_text("segment_id\tlabel\n")
    with pytest.raises(ValueError, match="no column 'start_time_seconds'; it has"):
        list(audioset_strong.rows(table, labels, tmp_path / "audio"))


def test_tacos_keeps_its_captions(tmp_path: Path) -> None:
    clip(tmp_path / "12345.wav", 8.0)
    source = tmp_path / "annotations_strong.csv"
    source.write_text(
        'filename,text,onset,offset\n12345.mp3,"a dog barks, far away",1.25,2.0\n'
        "12345.mp3,rain,0.0,8.0\n12345.mp3,late,7.0,12.0\n"
    )
    found = list(tacos.rows(source, tmp_path))
    assert "annotation outside the clip: event 'late' 7-12 s in 8 s" in reasons(found)
    source.write_text("\n".join(source.read_text().splitlines()[:3]) + "\n")
    dense, *grounding = only_rows(tacos.rows(source, tmp_path))
    assert [e.label for e in dense.events] == ["rain", "a dog barks, far away"]
    assert {row.query for row in grounding} == {"rain", "a dog barks, far away"}
    source.write_text("filename,text,onset,offset\n12345.mp3,rain,early,8.0\n")
    with pytest.raises(ValueError, match="'early' is no number of seconds"):
        list(tacos.rows(source, tmp_path))


def test_clotho_moment_has_a_row_a_query(tmp_path: Path) -> None:
    clip(tmp_path / "v1.wav", 60.0)
    lines = [
        {"qid": 1, "query": "A bell rings", "duration": 60, "vid": "v1",
         "relevant_windows": [[30, 34], [2, 5.5]]},
        {"qid": 2, "query": "Nothing", "duration": 60, "vid": "v1", "relevant_windows": []},
    ]  # fmt: skip
    source = tmp_path / "recipe_test.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(clotho_moment.rows(source, tmp_path))
    (row,) = only_rows(found)
    assert row.target_spans == ((2.0, 5.5), (30.0, 34.0))
    assert row.answer == "<t>2.0-5.5</t> <t>30.0-34.0</t>" and reasons(found) == ["no window"]


def test_ami_cuts_at_pauses_and_times_its_words(tmp_path: Path) -> None:
    clip(tmp_path / "audio" / "ES2002a.wav", 40.0)
    rttm = tmp_path / "ami.rttm"
    rttm.write_text(
        "SPEAKER ES2002a 1 1.00 4.00 <NA> <NA> FEE005 <NA> <NA>\n"
        "SPEAKER ES2002a 1 4.50 3.00 <NA> <NA> MEE006 <NA> <NA>\n"
        "SPEAKER ES2002a 1 22.0 5.00 <NA> <NA> FEE005 <NA> <NA>\n"
    )
    words = tmp_path / "words"
    words.mkdir()
    name = "http://nite.sourceforge.net/"
    for speaker, said in (
        ("A", '<w nite:id="1" starttime="1.2" endtime="1.5">Hello</w>'
              '<w nite:id="2" starttime="1.5" endtime="1.5" punc="true">,</w>'
              '<w nite:id="3" starttime="1.6" endtime="2.0">all</w>'
              '<vocalsound nite:id="4" starttime="2" endtime="3" type="laugh"/>'
              '<w nite:id="5" starttime="22.5" endtime="23.0">Bye</w>'),
        ("B", '<w nite:id="1" starttime="5.0" endtime="5.4">Good</w>'),
    ):  # fmt: skip
        (words / f"ES2002a.{speaker}.words.xml").write_text(
            f'<?xml version="1.0"?><nite:root xmlns:nite="{name}">{said}</nite:root>'
        )
    made = only_rows(ami.rows(rttm, words, tmp_path / "audio", tmp_path / "out", 12.0))
    speakers, transcript, later, last = made
    assert [(e.label, e.start_s) for e in speakers.events] == [
        ("speaker 1", 0.0),
        ("speaker 2", 3.5),
    ]
    assert speakers.duration_s == pytest.approx(6.5)
    assert transcript.answer == "<t>0.2-1.0</t> Hello, all\n<t>4.0-4.4</t> Good"
    assert later.duration_s == pytest.approx(5.0) and last.answer == "<t>0.5-1.0</t> Bye"
    rttm.write_text("SPEAKER ES2002a 1 1.00\n")
    with pytest.raises(ValueError, match=r"ami.rttm:1: 4 fields"):
        ami.read_rttm(rttm)


def test_ami_windows_lose_no_speech() -> None:
    turns = [Event(0.0, 2.0), Event(3.0, 33.0), Event(34.0, 36.0), Event(35.0, 47.0)]
    assert list(ami.windows(turns, 12.0)) == [
        (0.0, 2.0), (3.0, 15.0), (15.0, 27.0), (27.0, 36.0), (36.0, 47.0),
    ]  # fmt: skip


def parquet(folder: Path, config: str, records: list[dict]) -> None:
    (folder / config).mkdir(parents=True, exist_ok=True)
    Dataset.from_list(records).to_parquet(folder / config / "test-00000-of-00001.parquet")


def test_fleurs_joins_speech_with_another_languages_text(tmp_path: Path) -> None:
    content = clip(tmp_path / "one.wav", 1.5).read_bytes()

    def record(sentence: int, text: str) -> dict:
        return {"id": sentence, "audio": {"bytes": content, "path": "one.wav"},
                "raw_transcription": text, "transcription": text.lower()}  # fmt: skip

    parquet(tmp_path / "fleurs", "en_us", [record(7, "Good morning."), record(8, "Good night.")])
    parquet(tmp_path / "fleurs", "ar_eg", [record(7, "صباح الخير")])
    source, audio = str(tmp_path / "fleurs"), tmp_path / "audio"
    speech = only_rows(fleurs.rows(source, "en_us", "test", None, audio))
    assert [(r.answer, r.language) for r in speech] == [
        ("Good morning.", "en"),
        ("Good night.", "en"),
    ]
    assert speech[0].duration_s == pytest.approx(1.5) and Path(str(speech[0].audio)).is_file()
    found = list(fleurs.rows(source, "en_us", "test", "ar_eg", audio))
    (joined,) = only_rows(found)
    assert (joined.answer, joined.language, joined.task) == ("صباح الخير", "ar", Task.TRANSLATION)
    assert "from English into Arabic" in joined.prompt[0]["content"]
    assert reasons(found) == ["no sentence of this id in ar_eg"]
    with pytest.raises(FileNotFoundError, match=r"no train-\*.parquet"):
        list(fleurs.rows(source, "en_us", "train", None, audio))


def test_common_voice_and_covost_read_their_releases(tmp_path: Path) -> None:
    clip(tmp_path / "clips" / "common_voice_en_1.wav", 1.0)
    (tmp_path / "test.tsv").write_text(
        'client_id\tpath\tsentence\tlocale\nx\tcommon_voice_en_1.mp3\tHe said "no".\ten\n'
        "x\tcommon_voice_en_2.mp3\tGone.\ten\n"
    )
    found = list(common_voice.rows(tmp_path, "en", "test", tmp_path / "out"))
    (row,) = only_rows(found)
    assert row.answer == 'He said "no".' and reasons(found) == ["audio not in the folder"]
    (tmp_path / "covost_v2.en_de.tsv").write_text(
        "path\tsentence\ttranslation\tclient_id\tsplit\n"
        "common_voice_en_1.mp3\tNo.\tNein.\tx\ttest\ncommon_voice_en_1.mp3\tNo.\tNein.\tx\ttrain\n"
    )
    (row,) = only_rows(covost2.rows(tmp_path, ("en", "de"), "test", tmp_path / "out"))
    assert (row.answer, row.language, row.split) == ("Nein.", "de", "test")
    assert "from English into German" in row.prompt[0]["content"]


def test_czech_clips_are_parallel(tmp_path: Path) -> None:
    game = tmp_path / czech_clips.GAME
    (game / "script" / "city").mkdir(parents=True)
    (game / "script" / "city" / "dialogs_cs.lua").write_text(
        'dialogId("a", "font_big", "He said \\"come\\".")\ndialogStr("Řekl „pojď“.")\n\n'
        'dialogId("b", "font_big", "No sound.")\ndialogStr("Beze zvuku.")\n'
        'dialogId("c", "font_big", "No text.")\n',
        encoding="utf-8",
    )
    sound = game / "sound" / "city" / "cs" / "a.ogg"
    sound.parent.mkdir(parents=True)
    clip(tmp_path / "a.wav", 1.2).rename(sound)
    found = list(czech_clips.rows(tmp_path, tmp_path / "out"))
    speech, translation = only_rows(found)
    assert (speech.answer, speech.language) == ("Řekl „pojď“.", "cs")
    assert (translation.answer, translation.language) == ('He said "come".', "en")
    assert speech.split == translation.split and reasons(found) == ["text without sound"]
    with pytest.raises(FileNotFoundError, match="install fillets-ng-data"):
        list(czech_clips.rows(tmp_path / "empty", tmp_path / "out"))


def test_ladder_data_is_finished_but_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"sft": 6, "think": 12, "grpo": 12, "test": 4}
    monkeypatch.setattr(ladder, "COUNTS", counts)
    paths = ladder.prepare(tmp_path)
    rows = {name: read_rows(path) for name, path in paths.items()}
    assert len(rows["grpo"]) == 12 and len(rows["test"]) == 4
    assert 0 < len(rows["think"]) <= 12 and len({row.audio for row in rows["sft"]}) <= 6
    most = {name: max(len(row.target_spans) for row in part) for name, part in rows.items()}
    assert max(most["sft"], most["think"]) <= ladder.MOST_EVENTS < most["grpo"]
    written = paths["think"].read_bytes()
    paths["think"].unlink()
    ladder.prepare(tmp_path)
    assert paths["think"].read_bytes() == written, "what is missing is made as before"
    monkeypatch.setattr(ladder, "COUNTS", counts | {"test": 5})
    with pytest.raises(SystemExit, match="made with other settings; remove it"):
        ladder.prepare(tmp_path)


def test_refusals_come_in_twins(tmp_path: Path) -> None:
    refusals.main(["--out", str(tmp_path / "r.jsonl"), "--pairs", str(tmp_path / "p.jsonl")])
    rows = read_rows(tmp_path / "r.jsonl")
    assert len(rows) >= 60 and sum(r.task is Task.REFUSAL for r in rows) == len(rows) // 2
    assert all("synthesised" in r.source for r in rows)
    pairs = read_pairs(tmp_path / "p.jsonl")
    over = [p for p in pairs if p.kind == "over_refusal"]
    assert len(pairs) == len(rows) and all(p.rejected == refusals.DECLINE for p in over)
    files = ["--out", str(tmp_path / "r.jsonl"), "--pairs", str(tmp_path / "p.jsonl")]
    refusals.main([*files, "--train", "24"])
    judged, trained = read_rows(tmp_path / "r.jsonl"), read_pairs(tmp_path / "p.jsonl")
    assert (len(judged), len(trained)) == (16, 48)
    assert not {row.audio for row in judged} & {pair.row.audio for pair in trained}


def row(number: int) -> Row:
    return Row(
        f"r{number}", ({"role": "user", "content": "Why?"},), None, None, Task.CHAT, answer="x"
    )


def test_an_interrupted_stream_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    write_stream(whole, [row(0), Skipped("x", "gone"), row(1), row(2)])

    def breaking(after: int):  # type: ignore[no-untyped-def]
        for number in range(3):
            if number == after:
                raise KeyboardInterrupt
            yield row(number)

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_stream(out, breaking(2))
    partial = tmp_path / ".out.jsonl.partial"
    with partial.open("a") as torn:
        torn.write('{"id": "r2", "pro')
    assert not out.exists(), "nobody takes a part for the whole"
    result = write_stream(out, [row(0), Skipped("x", "gone"), row(1), row(2)])
    assert out.read_bytes() == whole.read_bytes() and not partial.exists()
    assert (result.rows, dict(result.skipped)) == (3, {"gone": 1})
    assert json.loads((tmp_path / "out.skipped.jsonl").read_text())["what"] == "x"
    with pytest.raises(ValueError, match=r"not one row: gone \(1\)"):
        write_stream(tmp_path / "none.jsonl", [Skipped("x", "gone")])
    assert os.listdir(tmp_path).count(".none.jsonl.partial") == 0


def test_events_are_within_the_clip() -> None:
    assert within([Event(1.0, 5.3, "a")], 5.0) == (Event(1.0, 5.0, "a"),)
    for strange in (Event(5.1, 5.3, "a"), Event(3.0, 2.0, "a"), Event(-0.1, 2.0, "a")):
        with pytest.raises(ValueError, match="event 'a'"):
            within([strange], 5.0)
    with pytest.raises(ValueError, match="'a' 1-9 s in 5 s"):
        within([Event(1.0, 9.0, "a")], 5.0)
