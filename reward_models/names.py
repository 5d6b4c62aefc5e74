"""Names that a recipe's `rewards:` may use; `registry` maps them to code (a test ties the two)."""

REWARD_NAMES = ("timestamp_grounding", "choice", "format")
