"""`posttrain doctor` names what is missing and what to do."""

from __future__ import annotations

import pytest

from posttrain import doctor
from posttrain.cli import main


def test_every_part_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    text = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "deepspeed",
        "vllm",
        "devices",
        "plugin",
        "audio",
        "recordings",
    ):
        assert name in text
    assert code == (1 if "MISSING" in text else 0)


def test_a_missing_package_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    findings = doctor.examine()
    assert doctor.print_findings(findings) == 1
    text = capsys.readouterr().out
    assert "MISSING no-such-package" in text and "-> run `make setup`" in text


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def _broken() -> doctor.Finding:
        raise OSError("disk on fire")

    monkeypatch.setattr(doctor, "_disk", _broken)
    found = next(f for f in doctor.examine() if f.name == "broken")
    assert not found.ok and "disk on fire" in found.detail and found.fix
