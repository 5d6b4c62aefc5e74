"""How many floating-point operations a forward pass of the language model takes.

A matrix of p numbers costs 2 p a token; attention costs 4 x heads x head_dim a layer for every
(query, key) pair that is attended to: a product for the score and one for the sum.

Source: PaLM (arXiv 2204.02311), appendix B; pairs counted exactly instead of as sequence length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def attended_pairs(num_prompt: int, lengths: Sequence[int]) -> int:
    """(query, key) pairs of one prompt and the completions that share it, itself included.

    Args:
        lengths: tokens forwarded of every completion.
    """
    own = sum(n * (n + 1) // 2 for n in lengths)
    return num_prompt * (num_prompt + 1) // 2 + num_prompt * sum(lengths) + own


def matrix_parameters(config: Any) -> int:
    """Numbers in the matrices of all layers, of a Qwen2 `text_config`; embeddings are look-ups."""
    width, heads, kv_heads = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
    )  # fmt: skip
    head_dim = getattr(config, "head_dim", None) or width // heads
    attention = 2 * width * head_dim * (heads + kv_heads)
    return config.num_hidden_layers * (attention + 3 * width * config.intermediate_size)


def forward_flops(config: Any, num_tokens: int, num_pairs: int, num_predictions: int = 0) -> float:
    """Of `num_tokens` forwarded, `num_pairs` attended to, `num_predictions` put to `lm_head`."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention_width = config.num_attention_heads * head_dim
    layers = 2.0 * matrix_parameters(config) * num_tokens
    attention = 4.0 * config.num_hidden_layers * attention_width * num_pairs
    head = 2.0 * config.vocab_size * config.hidden_size * num_predictions
    return layers + attention + head
