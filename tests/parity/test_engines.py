"""vLLM against transformers on the committed checkpoint, and `vllm serve` on it."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_recipes.temporal_cot import ChainSettings, asked_rows, choose, collect
from posttrain.data.rows import read_rows
from posttrain.model.load import load_model, save_checkpoint
from posttrain.rollout.chain_teachers import ReadingTeacher
from posttrain.rollout.rendezvous import free_port

pytestmark = pytest.mark.slow


def run_cli(*arguments: str, timeout: int = 400) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "posttrain.cli", *arguments],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_parity_command_on_nano(nano: str) -> None:
    done = run_cli("parity", nano, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    print(report)
    assert report["prompt_ids_equal"] is True
    assert report["max_abs_logprob_diff"] <= 1e-5
    assert report["clips_s"] == [3.0, 41.0, 95.5, 600.0]


def test_parity_fails_when_the_engines_differ(nano: str) -> None:
    done = run_cli("parity", nano, "--json", "--clips-s", "10.015", "--tolerance", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["max_abs_logprob_diff"] > 0, "two kernels never round alike"
    assert report["prompt_ids_equal"] is True, "a window without tokens must not disturb the prompt"


def test_saved_weights_are_canonical_and_strangers_are_refused(nano: str, tmp_path: Path) -> None:
    model = load_model(nano)
    save_checkpoint(model, None, tmp_path)
    saved, original = (load_file(Path(p) / "model.safetensors") for p in (tmp_path, nano))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    extra = saved | {"avg_embed_norm": torch.ones(1)}
    save_file(extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(tmp_path)
    strange = saved | {"vision_tower.weight": torch.ones(1)}
    save_file(strange, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected weights \['vision_tower.weight'\]"):
        load_model(tmp_path)
    missing = {k: v for k, v in saved.items() if "lm_head" not in k}
    save_file(missing, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing weights"):
        load_model(tmp_path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_model(tmp_path / "nowhere")


def test_the_longest_clip_is_counted_as_vllm_counts_it(nano: str) -> None:
    """By the plugin from lengths, by vLLM from the features of half an hour of silence."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = EngineArgs(model=nano, dtype="float32").create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    counted = processor.info.get_mm_max_tokens_per_item(2_048, {"audio": 1})
    (placeholder,) = processor.get_dummy_mm_inputs({"audio": 1})["mm_placeholders"]["audio"]
    assert counted == {"audio": placeholder.get_num_embeds()} == {"audio": 45_000}


@pytest.fixture(scope="module")
def server(nano: str) -> Iterator[str]:
    """Address of `vllm serve` on nano, on loopback."""
    port = free_port()
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    vllm = Path(sys.executable).with_name("vllm")
    process = subprocess.Popen(
        [str(vllm), "serve", nano, "--host", "127.0.0.1", "--port", str(port),
         "--max-model-len", "2048", "--max-num-batched-tokens", "8192", "--dtype", "float32",
         "--enforce-eager", "--skip-mm-profiling", "--served-model-name", "nano"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def test_vllm_serve_answers_about_audio(server: str, timelines: Path) -> None:
    clip = next((timelines / "audio").glob("*.flac")).read_bytes()
    sound = {"data": base64.b64encode(clip).decode(), "format": "flac"}
    question = "When is seven heard? Reason step by step with timestamps, "
    content = [
        {"type": "input_audio", "input_audio": sound},
        {"type": "text", "text": question + "then give the final answer."},
    ]
    answer = post(
        f"{server}/v1/chat/completions",
        {"model": "nano", "max_tokens": 96, "temperature": 0,
         "messages": [{"role": "user", "content": content}]},
    )  # fmt: skip
    text = answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > 200, "the clip's tokens are in the prompt"
    assert "<t>" in text or "not heard" in text, text


def test_a_reading_teacher_is_asked_behind_the_endpoint(
    server: str, timelines: Path, tmp_path: Path
) -> None:
    """What the server says is collected as it is; a server that is gone loses nothing."""
    rows = read_rows(timelines / "train.jsonl")[:4]
    settings = ChainSettings(num_chains=3, blind_samples=1, chunk_rows=2)
    teacher = ReadingTeacher(f"{server}/v1", "nano", temperature=1.0, max_tokens=24)
    collect(rows, teacher, settings, tmp_path)
    asked = list(asked_rows(rows, settings, tmp_path))
    assert [len(said) for _, said, _ in asked] == [3] * 4
    assert [len(blind) for *_, blind in asked] == [1] * 4
    assert len({c.text for _, said, _ in asked for c in said}) > 4, "sampled, not greedy"
    ends = {c.finish_reason for _, said, blind in asked for c in [*said, *blind]}
    assert ends <= {"stop", "length"}
    report = choose(rows, settings, tmp_path)
    assert report["chains"] == 12 == report["kept"] + sum(report["rejected_chains"].values())

    (alone,) = teacher.chains(rows[:1], 2, seed=5)
    (again,) = teacher.chains(rows[:1], 2, seed=5)
    (other,) = teacher.chains(rows[:1], 2, seed=6)
    assert alone == again != other, "the seed decides"
    stranger = ReadingTeacher(f"{server}/v1", "stranger", temperature=1.0, max_tokens=24)
    with pytest.raises(RuntimeError, match=r"teacher stranger at http.*chains.endpoint_model"):
        stranger.chains(rows[:1], 1, seed=0)
    too_long = ReadingTeacher(f"{server}/v1", "nano", temperature=1.0, max_tokens=4_096)
    with pytest.raises(RuntimeError, match=r"refused all 2 rows, .*4096.*correct chains"):
        collect(rows, too_long, settings, tmp_path / "too long")
    assert not list((tmp_path / "too long" / "chunks").iterdir()), "no refusal is kept as data"


def wait_until_healthy(url: str, server: subprocess.Popen, limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        assert server.poll() is None, server.stdout.read()  # type: ignore[union-attr]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise AssertionError(f"not healthy after {limit_s} s")


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)
