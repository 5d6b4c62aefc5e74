"""Names of weights: canonical on disk, whatever the module tree calls them.

transformers reads `language_model.model.*` and, from models built out of a config, writes
`language_model.model.model.*`; vLLM reads only the canonical form. So every save goes through
`canonical_key`, and a checkpoint's keys are checked before a model is trusted.
"""

from __future__ import annotations

from collections.abc import Iterable

IGNORED_SUFFIXES = ("avg_embed_norm",)

# module tree of MusicFlamingoForConditionalGeneration -> canonical checkpoint
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


def canonical_key(name: str) -> str:
    """The name on disk of a parameter of the transformers model.

    Raises:
        ValueError: a name that AF-Next does not have.
    """
    for prefix, canonical in _PREFIXES:
        if name.startswith(prefix):
            return canonical + name[len(prefix) :]
        if name.startswith(canonical):
            return name
    raise ValueError(
        f"weight {name!r} is none of AF-Next's; known prefixes: {[p for p, _ in _PREFIXES]}"
    )


def module_key(canonical: str) -> str:
    """The inverse of `canonical_key`: a canonical name in the transformers module tree."""
    for prefix, known in _PREFIXES:
        if canonical.startswith(known):
            return prefix + canonical[len(known) :]
    raise ValueError(f"weight {canonical!r} is not canonical; known: {[c for _, c in _PREFIXES]}")


def split_ignored(keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """(keys to load, keys ignored by name)."""
    keys = list(keys)
    ignored = [k for k in keys if k.endswith(IGNORED_SUFFIXES)]
    return [k for k in keys if k not in set(ignored)], ignored
