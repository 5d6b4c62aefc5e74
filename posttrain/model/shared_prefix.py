"""One prompt, many completions, one sequence: the packed layout and its attention.

    |<------- prompt ------->|<- completion 1 ->|<- completion 2 ->| next group ...
    position 0 ........... P-1 P ...........     P .............     0 ...
    sees     itself, causally  prompt + itself   prompt + itself

Nothing is padded, and a prompt (with its audio) is forwarded once however many completions follow.
The last token of every completion predicts nothing, so it is not forwarded at all.

Attention is registered with transformers' `AttentionInterface`; a `PackedLayout` travels in the
place of the attention mask. On CPU, and as the reference, it is SDPA: one causal call for the
prompt, one masked call for its completions. On CUDA it is FlexAttention over a block mask that is
built once a batch and shared by all layers.

Source: the layout of "Prefix Grouper" (arXiv 2506.05433), for prompts that contain audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from posttrain.model.flex_prefix import flex_prefix_attention
from posttrain.model.sequence_parallel import SequenceGroup, gather_heads, scatter_heads

ATTENTION = "shared_prefix"
PAD_GROUP = -1


@dataclass(frozen=True)
class PrefixSpan:
    """Where one group lies in the sequence.

    Attributes:
        start: of its prompt.
        num_prompt: P, tokens of the prompt.
        lengths: tokens forwarded of every completion, one fewer than it has.
    """

    start: int
    num_prompt: int
    lengths: tuple[int, ...]

    @property
    def completions_start(self) -> int:
        return self.start + self.num_prompt

    @property
    def end(self) -> int:
        return self.completions_start + sum(self.lengths)


@dataclass(frozen=True)
class PackedLayout:
    """What attends to what in a packed sequence.

    Attributes:
        spans: groups in order, without gaps, from 0.
        num_tokens: N, of the whole sequence; above the last group's end only to make N a
            multiple of the sequence-parallel degree.
        device: of the sequence.
        kernel: "sdpa" or "flex".
        sequence_group: ranks that share the sequence, None: this one holds all of it.
    """

    spans: tuple[PrefixSpan, ...]
    num_tokens: int
    device: torch.device
    kernel: str
    sequence_group: SequenceGroup | None = None

    @cached_property
    def group_N(self) -> Tensor:
        """(N,) int32: which group a token belongs to; -1 for padding."""
        group_N = torch.full((self.num_tokens,), PAD_GROUP, dtype=torch.int32)
        for i, span in enumerate(self.spans):
            group_N[span.start : span.end] = i
        return group_N.to(self.device)

    @cached_property
    def segment_N(self) -> Tensor:
        """(N,) int32: 0 in a prompt, 1, 2, ... in the completions of a group."""
        segment_N = torch.zeros(self.num_tokens, dtype=torch.int32)
        for span in self.spans:
            counts = torch.tensor((0, *span.lengths))
            numbers = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
            segment_N[span.completions_start : span.end] = numbers
        return segment_N.to(self.device)

    @cached_property
    def position_N(self) -> Tensor:
        """(N,) int64 rotary positions: every completion starts where its prompt ends."""
        positions = [torch.zeros(0, dtype=torch.long)]
        for span in self.spans:
            positions.append(torch.arange(span.num_prompt))
            positions += [span.num_prompt + torch.arange(n) for n in span.lengths]
        position_N = torch.cat(positions)
        return F.pad(position_N, (0, self.num_tokens - len(position_N))).to(self.device)

    def completion_mask(self, span: PrefixSpan, dtype: torch.dtype) -> Tensor:
        """(sum T, P + sum T) additive mask of a group's completions; built once a batch."""
        if (span, dtype) not in self._masks:
            segment = self.segment_N[span.completions_start : span.end]
            order = torch.arange(len(segment), device=self.device)
            own = (segment.unsqueeze(1) == segment) & (order.unsqueeze(1) >= order)
            mask = torch.zeros(len(segment), span.end - span.start, dtype=dtype, device=self.device)
            mask[:, span.num_prompt :].masked_fill_(~own, -torch.inf)
            self._masks[span, dtype] = mask
        return self._masks[span, dtype]

    @cached_property
    def _masks(self) -> dict[tuple[PrefixSpan, torch.dtype], Tensor]:
        return {}

    @cached_property
    def flex_state(self) -> dict[str, Any]:
        """What FlexAttention keeps of this batch: its block mask."""
        return {}


def packed_layout(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    device: torch.device,
    *,
    kernel: str | None = None,
    sequence_group: SequenceGroup | None = None,
) -> PackedLayout:
    """Lays groups out one after the other.

    Args:
        prompt_lengths: P of every group.
        completion_lengths: T of every completion of every group, at least 1.
        kernel: "sdpa" or "flex"; None: flex on CUDA.
    """
    spans, start = [], 0
    for num_prompt, lengths in zip(prompt_lengths, completion_lengths, strict=True):
        if min(num_prompt, *lengths) < 1:
            raise ValueError(
                f"packed layout: prompt of {num_prompt} tokens, completions of {list(lengths)}; "
                "each needs at least one"
            )
        span = PrefixSpan(start, num_prompt, tuple(n - 1 for n in lengths))
        spans.append(span)
        start = span.end
    degree = sequence_group.size if sequence_group else 1
    num_tokens = -(-start // degree) * degree
    if kernel is None:
        kernel = "flex" if device.type == "cuda" else "sdpa"
    return PackedLayout(tuple(spans), num_tokens, device, kernel, sequence_group)


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of `AttentionInterface`; plain SDPA unless given a `PackedLayout`.

    Args:
        query: (1, heads, N, head_dim); key and value (1, kv_heads, N, head_dim). Under sequence
            parallelism N is the rank's share.

    Returns:
        (1, N, heads, head_dim), and no weights.
    """
    if not isinstance(attention_mask, PackedLayout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout}: shared_prefix has no attention dropout; set it to 0 in "
            "the checkpoint's text_config, or shared_prefix.enabled=false"
        )
    layout = attention_mask
    group = layout.sequence_group
    if group is not None:
        query, key, value = (scatter_heads(x, group) for x in (query, key, value))
    attend = flex_prefix_attention if layout.kernel == "flex" else sdpa_prefix_attention
    output = attend(query, key, value, layout, scaling).transpose(1, 2)
    if group is not None:
        output = gather_heads(output, group)
    return output.contiguous(), None


def sdpa_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None
) -> Tensor:
    """(1, heads, N, head_dim): a causal call a prompt, a masked call for its completions.

    The completions' keys are the group's own stretch of the sequence, so nothing is copied.
    """
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for span in layout.spans:
        prompt = slice(span.start, span.completions_start)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, prompt], key[:, :, prompt], value[:, :, prompt],
                is_causal=True, scale=scaling, enable_gqa=grouped,
            )
        )  # fmt: skip
        if span.end > span.completions_start:
            whole = slice(span.start, span.end)
            outputs.append(
                F.scaled_dot_product_attention(
                    query[:, :, span.completions_start : span.end], key[:, :, whole],
                    value[:, :, whole], attn_mask=layout.completion_mask(span, query.dtype),
                    scale=scaling, enable_gqa=grouped,
                )
            )  # fmt: skip
    padding = layout.num_tokens - (layout.spans[-1].end if layout.spans else 0)
    if padding:
        outputs.append(torch.zeros_like(query[:, :, :padding]))
    return torch.cat(outputs, dim=2)


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_shared_prefix(model: Any) -> None:
    """Switches the language model of AF-Next to this attention; without a layout it stays SDPA.

    Raises:
        ValueError: the language model has layers that do not attend to everything before them.
    """
    kinds = set(model.config.text_config.layer_types)
    if kinds != {"full_attention"}:
        raise ValueError(
            f"text_config.layer_types has {sorted(kinds)}: shared_prefix knows full attention "
            "only; set shared_prefix.enabled=false"
        )
    model.model.language_model.set_attn_implementation(ATTENTION)
