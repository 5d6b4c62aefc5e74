"""The licence that a derivative of a checkpoint must carry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard

NVIDIA_NAME = "nvidia-oneway-noncommercial-license"
NVIDIA_WARNING = (
    "**Noncommercial.** The weights derive from NVIDIA's Audio Flamingo Next and stay under the "
    "NVIDIA OneWay Noncommercial License: research and other noncommercial use only, by everyone "
    "who receives them."
)


@dataclass(frozen=True)
class Licence:
    """As the Hub's cards write it.

    Attributes:
        id: of the Hub's list, "other" for one that is not on it.
        name, link: of an "other" licence.
        warning: what a reader must see before using the weights; "" if there is nothing.
    """

    id: str
    name: str = ""
    link: str = ""
    warning: str = ""


def licence_of(base: str, given: str | None = None) -> Licence:
    """Of a base checkpoint: its card's, or NVIDIA's for Audio Flamingo Next.

    Args:
        given: licence id to take where the base has no card.

    Raises:
        ValueError: nobody says what it is.
    """
    if base.lower().startswith("nvidia/"):
        return Licence("other", NVIDIA_NAME, f"https://huggingface.co/{base}", NVIDIA_WARNING)
    card = Path(base) / "README.md"
    if card.exists():
        data = ModelCard.load(card).data
        if data.license:
            name = str(data.get("license_name") or "")
            warning = NVIDIA_WARNING if "nvidia" in name and "noncommercial" in name else ""
            return Licence(str(data.license), name, str(data.get("license_link") or ""), warning)
    if given:
        return Licence(given)
    raise ValueError(
        f"base checkpoint {base}: its card names no licence; say under which it may be passed on "
        "with --license ID (an id of the Hub's list)"
    )
