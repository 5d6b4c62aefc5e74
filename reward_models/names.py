"""Names that a recipe's `rewards:` may use; `registry` maps them to code (a test ties the two)."""

REWARD_NAMES = (
    "timestamp_grounding",
    "chain_grounding",
    "choice",
    "transcript",
    "translation",
    "format",
    "length_band",
    "repetition",
    "evidence_ablation",
    "audio_text_grounding",
)
FORM_ONLY = ("format", "length_band", "repetition")
"""Rewards that do not look at whether anything is true: they never stand alone."""
MODEL_REWARDS = ("evidence_ablation", "audio_text_grounding")
"""Rewards that ask a model, each served by an actor of its own."""
