"""Thought and answer of a completion."""

from __future__ import annotations


def split_thinking(text: str) -> tuple[str, str]:
    """(thought, answer), split at the LAST `</think>`; the opening tag is often missing.

    Without a closing tag there is no thought and everything is the answer.
    """
    thought, found, answer = text.rpartition("</think>")
    if not found:
        return "", text.strip()
    return thought.replace("<think>", "", 1).strip(), answer.strip()
