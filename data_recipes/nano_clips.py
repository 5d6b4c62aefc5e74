"""The closed vocabulary of AF-Next-nano: file names of English voice prompts, and tones."""

from __future__ import annotations


def _clip_names() -> tuple[str, ...]:
    digits = [f"digits/{n}" for n in (*range(13), 20, 30, 40, 50, 60, 70, 80, 90)]
    letters = [f"letters/{c}" for c in "aefhiklmoqrswxyz"]
    calendar = [f"digits/day-{n}" for n in range(7)] + [f"digits/mon-{n}" for n in range(12)]
    prompts = (
        "hello goodbye activated cancelled location lowercase digits/today digits/tomorrow "
        "digits/yesterday digits/pound digits/star digits/thousand beep beeperr ascending-2tone"
    )
    return (*digits, *letters, *calendar, *prompts.split())


CLIP_NAMES = _clip_names()
