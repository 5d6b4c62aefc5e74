"""What is published: lineage, gates, licence, card, checksums, upload; without an engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from simulated_hub import SimulatedHub

from posttrain.cli import main
from posttrain.publish import publish as publishing
from posttrain.publish.card import CardFacts, card_of, plain
from posttrain.publish.licences import NVIDIA_NAME, Licence, licence_of
from posttrain.publish.lineage import data_facts, lineage
from posttrain.publish.publish import PublishOptions, publish
from posttrain.publish.push import check_whole, files_of, push
from posttrain.train.environment import environment, hardware
from posttrain.types import GateFailed


def write_run(folder: Path, model: str, **more: object) -> Path:
    """A finished run as `posttrain run` leaves it, without weights."""
    rows = folder.parent / f"{folder.name}.jsonl"
    line = {"prompt": "?", "audio": "a.flac", "duration_s": 1800.0, "language": "fr",
            "licence": "CC0-1.0", "source": "s<b>"}  # fmt: skip
    lines = [{"id": str(i), **line} for i in range(4)]
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    recipe = {
        "kind": "sft", "seed": 3, "model": {"path": model, "dtype": "float32"},
        "lora": {"enabled": True, "r": 8}, "training": {"max_steps": 7, "learning_rate": 1e-4},
        "data": {"train": {"main": {"path": str(rows)}}, "replay": {}, "held_out": {}},
        "gates": {"times": {"source": "main", "metric": "miou", "max_loss": 0.02}},
    }  # fmt: skip
    passed = {"name": "times", "metric": "miou", "source": "main", "before": 0.5, "after": 0.6,
              "broken": [], "passed": True}  # fmt: skip
    compared = {"metric": "miou", "n": 12, "before": {"miou": 0.5}, "after": {"miou": 0.6},
                "paired_diff": {"mean": 0.1, "ci95": [0.05, 0.15]}}  # fmt: skip
    summary = {"held_out": compared, "gates": [passed], "wall_s": 90.0} | more
    adapter = folder / "checkpoints" / "step-000007" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"commit": "abc", "cpus": 2, "gpus": [],
                                                         "memory_gib": 24.0}))  # fmt: skip
    return folder


FAILED_GATE = {"name": "times", "metric": "miou", "source": "main", "before": 0.5, "after": 0.4,
               "broken": ["loss of 0.1, 0.02 allowed"], "passed": False}  # fmt: skip


def test_lineage_goes_back_to_the_base(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", "nvidia/audio-flamingo-next-think-hf")
    second = write_run(tmp_path / "second", str(first))
    base, stages = lineage(str(second))
    assert base == "nvidia/audio-flamingo-next-think-hf"
    assert [stage.folder for stage in stages] == [first, second]
    (facts,) = data_facts(stages[0])
    assert (facts.rows, facts.languages, facts.licences) == (4, ("fr",), ("CC0-1.0",))
    assert facts.hours == 0.5, "four questions about one clip of half an hour"
    (tmp_path / "first.jsonl").unlink()
    assert data_facts(stages[0])[0].missing
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    recipe["model"]["path"] = str(second)
    (first / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (first / "environment.json").unlink()
    with pytest.raises(ValueError, match="form a circle"):
        lineage(str(second))
    recipe["model"]["path"] = "gone/checkpoints/step-000001/model"
    (first / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="started from gone/.*which is not there"):
        lineage(str(second))


def test_what_only_lies_in_a_run_is_no_checkpoint_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "nvidia/audio-flamingo-next-think-hf")
    (run / "copied").mkdir()
    assert lineage(str(run / "copied")) == (str(run / "copied"), [])


def test_another_steps_scores_and_gates_are_not_this_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "nvidia/audio-flamingo-next-think-hf")
    early = run / "checkpoints" / "step-000003"
    shutil.copytree(run / "checkpoints" / "step-000007", early)
    ((_, (stage,)), (_, (last,))) = lineage(str(early)), lineage(str(run))
    assert stage.summary == {} and stage.failed_gates == ["times: not judged on this checkpoint"]
    assert last.summary and not last.failed_gates
    assert lineage(str(run / "checkpoints/step-000007/adapter"))[1] == [last]


def test_an_adapter_of_a_later_stage_is_no_adapter_of_the_base(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", "nvidia/audio-flamingo-next-think-hf")
    second = write_run(tmp_path / "second", str(first))
    with pytest.raises(ValueError, match="on the base the adapter would be another model"):
        publish(str(second), tmp_path / "out", PublishOptions(adapter=True))


def test_a_failed_gate_stops_it_and_an_override_stands_on_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "nvidia/audio-flamingo-next-think-hf", gates=[FAILED_GATE])
    command = ["publish", str(run), "--out", str(tmp_path / "out"), "--adapter"]
    assert main(command) == 3
    assert "run: times: loss of 0.1, 0.02 allowed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--override", "needed for a <b>demo</b>"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Published although gates failed.** Reason given: needed for a &lt;b>demo" in card
    assert "loss of 0.1, 0.02 allowed" in card
    (run / "summary.json").write_text("{}")
    with pytest.raises(GateFailed, match="times: not judged on this checkpoint"):
        publish(str(run), tmp_path / "other", PublishOptions(adapter=True))
    assert main(command) == 2 and "exists already" in capsys.readouterr().err


def test_the_card_carries_nvidias_licence_and_every_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "nvidia/audio-flamingo-next-think-hf")
    out = publish(str(run), tmp_path / "out", PublishOptions(adapter=True))
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "other" and card.data.get("license_name") == NVIDIA_NAME
    assert card.data.base_model == "nvidia/audio-flamingo-next-think-hf"
    assert card.data.library_name == "peft" and card.data.language == ["fr"]
    for expected in (
        "**Noncommercial.**", "| run | supervised fine-tuning | 7 | 0.0001 | LoRA r = 8 | "
        "2 CPU cores, 24.0 GiB | 1.5 |", "| train.main | run | 4 | 0.50 | fr | CC0-1.0 | s&lt;b> |",
        "| run | held out | miou ↑ | 0.500 | 0.600 | +0.100 [+0.050, +0.150] | 12 |",
        "| times (run) | miou of main | 0.5 | 0.6 | passed |", "seed 3, commit abc",
    ):  # fmt: skip
        assert expected in card.content, expected
    assert (out / "adapter_model.safetensors").read_bytes() == b"weights"
    assert yaml.safe_load((out / "posttrain/1-run/recipe.yaml").read_text())["seed"] == 3
    check_whole(out, str(run), adapter=True)
    with pytest.raises(ValueError, match="not published from .*another --adapter"):
        check_whole(out, str(tmp_path / "another"), adapter=True)
    written = "".join(p.read_text() for p in (out / "posttrain").rglob("*.json"))
    assert str(run) not in written + (out / "README.md").read_text(), "paths of this machine"
    (out / "notes.txt").write_text("private")
    with pytest.raises(ValueError, match=r"notes.txt: not written by posttrain publish"):
        check_whole(out, str(run), adapter=True)
    (out / "notes.txt").unlink()
    (out / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: changed since"):
        check_whole(out, str(run), adapter=True)


def test_licences(tmp_path: Path) -> None:
    assert licence_of("NVIDIA/anything").name == NVIDIA_NAME
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-sa-3.0\n---\n# x\n")
    assert licence_of(str(tmp_path)) == Licence("cc-by-sa-3.0")
    (tmp_path / "README.md").write_text(
        f"---\nlicense: other\nlicense_name: {NVIDIA_NAME}\nlicense_link: x\n---\n"
    )
    assert licence_of(str(tmp_path)).warning
    with pytest.raises(ValueError, match="--license ID"):
        licence_of("somebody/model")
    assert licence_of("somebody/model", "apache-2.0") == Licence("apache-2.0")


def test_an_interrupted_publication_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", "nvidia/audio-flamingo-next-think-hf")

    def interrupted(folder: Path) -> None:
        assert (folder / "README.md").exists(), "as late as can be"
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "_write_checksums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(str(run), tmp_path / "out", PublishOptions(adapter=True))
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_an_adapter_alone_needs_one_and_nothing_beside_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "nvidia/audio-flamingo-next-think-hf")
    (run / "checkpoints/step-000007/model").mkdir()
    with pytest.raises(ValueError, match="trained more than its adapter"):
        publish(str(run), tmp_path / "out", PublishOptions(adapter=True))
    shutil.rmtree(run / "checkpoints/step-000007/adapter")
    with pytest.raises(ValueError, match="holds no LoRA adapter"):
        publish(str(run), tmp_path / "out", PublishOptions(adapter=True))


def test_foreign_text_cannot_break_a_card() -> None:
    assert plain("a | b\n<script>`x`") == "a \\| b &lt;script>'x'"
    empty = CardFacts("n", "b", [], Licence("mit"), True, None, [], [], "")
    assert "None were recorded." in card_of(empty)


def test_hardware_in_one_line() -> None:
    eight = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "cluster": True}
    assert hardware(eight) == "8 x NVIDIA H100 80GB HBM3, and other nodes of a cluster"
    assert environment("a/b")["packages"]["torch"] and environment("a/b")["started_from"] == "a/b"


# --- upload -----------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedHub]:
    monkeypatch.setenv("HF_TOKEN", "hf_a_token_of_the_test")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # xet's own storage is not simulated
    simulated = SimulatedHub()
    yield simulated
    simulated.close()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run", "nvidia/audio-flamingo-next-think-hf")
    return publish(str(run), tmp_path / "published", PublishOptions(adapter=True))


def test_push_is_private_and_whole(hub: SimulatedHub, published: Path) -> None:
    url = push(published, "lab/model", endpoint=hub.endpoint)
    assert url == f"{hub.endpoint}/lab/model"
    repository = hub.repositories["lab/model"]
    assert repository["private"] is True
    expected = {name: (published / name).read_bytes() for name, _ in files_of(published)}
    assert repository["files"] == expected and "README.md" in expected
    assert hub.tokens == {"Bearer hf_a_token_of_the_test"}
    push(published, "lab/open", public=True, endpoint=hub.endpoint)
    assert hub.repositories["lab/open"]["private"] is False
    with pytest.raises(ValueError, match="that repository is public"):
        push(published, "lab/open", endpoint=hub.endpoint)


def test_a_push_replaces_what_was_there(hub: SimulatedHub, published: Path) -> None:
    old = {"private": True, "files": {"model.safetensors": b"old", ".gitattributes": b"x"}}
    hub.repositories["lab/model"] = old
    push(published, "lab/model", endpoint=hub.endpoint)
    assert "model.safetensors" not in old["files"] and "README.md" in old["files"]


def test_a_dry_run_asks_nobody(
    hub: SimulatedHub, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(published.parent / "run")
    command = ["publish", source, "--out", str(published), "--adapter", "--push", "lab/model",
               "--dry-run"]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown and "would go to lab/model, private" in shown
    assert hub.requests == [] and "hf_a_token" not in shown


def test_a_refusal_names_what_to_do_and_not_the_token(published: Path, hub: SimulatedHub) -> None:
    hub.refuse = 403
    with pytest.raises(RuntimeError, match="the Hub refused") as refused:
        push(published, "lab/model", endpoint=hub.endpoint)
    assert "hf_a_token" not in str(refused.value) and "push it again" in str(refused.value)
    with pytest.raises(ValueError, match="give ORG/NAME"):
        push(published, "model", endpoint=hub.endpoint)
