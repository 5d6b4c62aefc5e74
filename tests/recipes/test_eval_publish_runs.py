"""Evaluating and publishing on the real engines: killed and resumed, proven, served."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.cli import main
from posttrain.data.rows import read_rows
from posttrain.publish import publish as publishing
from posttrain.publish.publish import PublishOptions, publish
from posttrain.publish.push import check_whole
from posttrain.rollout.rendezvous import free_port

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def evaluate(nano: str, rows: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "posttrain.cli", "eval", "grounding", "--model", nano, "--data",
        str(rows), "--out", str(out), "--max-tokens", "64", "--chunk-rows", "4",
        "model.dtype=float32", "rollout.max_model_len=1024",
    ]  # fmt: skip


def test_a_killed_evaluation_ends_with_the_same_scores(
    timelines: Path, nano: str, tmp_path: Path
) -> None:
    rows = timelines / "train.jsonl"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(evaluate(nano, rows, whole), check=True, timeout=300, capture_output=True)
    process = subprocess.Popen(
        evaluate(nano, rows, killed), start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    answers = killed / "answers.jsonl"
    deadline = time.monotonic() + 240
    while not (answers.exists() and answers.read_text().count("\n") >= 8):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = answers.read_text()
    assert 8 <= kept.count("\n") < len(read_rows(rows)) and not (killed / "scores.json").exists()
    subprocess.run(evaluate(nano, rows, killed), check=True, timeout=300, capture_output=True)
    assert answers.read_text().startswith(kept[: kept.rfind("\n")])
    for name in ("answers.jsonl", "scored.jsonl", "scores.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["n"] == len(read_rows(rows)) and 0 < scores["metrics"]["miou"]["value"] < 1
    assert {"r1@0.5", "event_f1", "onset_error_median_s", "prior_adjusted"} <= set(
        scores["metrics"]
    )
    assert main(["compare", str(whole), str(killed)]) == 0
    changed = [*evaluate(nano, rows, killed)[3:], "seed=1"]
    assert main(changed) == 2, "another evaluation needs another folder"
    assert main(["report", str(whole)]) == 0 and (whole / "report.html").exists()


@pytest.fixture(scope="module")
def published(grpo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published") / "nano-grpo"
    return publish(str(grpo_run), out, PublishOptions(clips_s=(3.0, 41.0)))


def test_a_published_run_is_the_trained_model(published: Path, grpo_run: Path) -> None:
    """`publish` itself has compared logits, run parity (1e-5) and had an answer."""
    trained = load_file(grpo_run / "checkpoints/step-000002/model/model.safetensors")
    written = load_file(published / "model.safetensors")
    assert trained.keys() == written.keys()
    assert all(torch.equal(trained[name], written[name]) for name in trained)
    check_whole(published, str(grpo_run))
    card = (published / "README.md").read_text()
    assert "license: cc-by-sa-3.0" in card and "logits equal" in card
    assert "| grpo_long_audio | GRPO | 2 |" in card and "<t>" in card


def test_a_folder_that_differs_is_not_published(
    grpo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = publishing.save_checkpoint

    def spoiled(model: torch.nn.Module, *arguments: object) -> None:
        with torch.no_grad():
            model.get_parameter("lm_head.weight").mul_(1.001)
        save(model, *arguments)

    monkeypatch.setattr(publishing, "save_checkpoint", spoiled)
    with pytest.raises(RuntimeError, match="logits differ from the source's"):
        publish(str(grpo_run), tmp_path / "out", PublishOptions(clips_s=(3.0,)))
    assert list(tmp_path.iterdir()) == []


def test_the_cards_own_snippets_run(published: Path, timelines: Path, tmp_path: Path) -> None:
    """As they stand, next to the folder, but for the port."""
    shutil.copytree(published, tmp_path / published.name)
    clip = next(row.audio for row in read_rows(timelines / "test.jsonl"))
    shutil.copy(str(clip), tmp_path / "clip.flac")
    blocks = dict(_blocks((published / "README.md").read_text()))
    port = free_port()
    serve = blocks["serve"].replace("8000", str(port)).split()
    log = (tmp_path / "serve.log").open("w")
    options = ["--max-model-len", "2048", "--dtype", "float32"]
    server = subprocess.Popen(
        [str(BIN / serve[0]), *serve[1:], *options], cwd=tmp_path, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", blocks["transformers"]], cwd=tmp_path, capture_output=True,
            text=True, timeout=200,
        )  # fmt: skip
        _wait(f"http://127.0.0.1:{port}/health", server, tmp_path / "serve.log")
        asked = subprocess.run(
            [sys.executable, "-c", blocks["client"].replace("8000", str(port))], cwd=tmp_path,
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"<t>\d+\.\d-\d+\.\d</t>", done.stdout)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip() == done.stdout.strip(), "both libraries say the same"


def _blocks(card: str) -> list[tuple[str, str]]:
    found = re.findall(r"```(python|bash)\n(.*?)```", card, re.DOTALL)
    (transformers, serve, client) = [text for _, text in found[:3]]
    return [("transformers", transformers), ("serve", serve), ("client", client)]


def _wait(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-2000:])
