"""Rows as token ids to learn from: cut behind the clip, with a mask of what the assistant wrote.

    |<--- prefix: the same for all rows about a clip --->|<---------- the row's own ---------->|
    system, <|im_start|>user, bos, <sound> x 250, eos     question, <|im_start|>assistant answer
                                                           not trained                    trained

AF-Next's template puts the clip in front of the text, so rows about one clip share everything up to
its end, and the shared-prefix path forwards that once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from posttrain.data.chat import Message, assistant_mask, expanded_prompt
from posttrain.data.rows import Row


@dataclass(frozen=True)
class Conversation:
    """One row as ids.

    Attributes:
        prefix_P: (P,) int64, up to the end of the clip; without one, up to the first answer.
        ids_T: (T,) int64, the rest, the last answer's end token included.
        assistant_T: bool (T,), what the assistant wrote, end tokens included.
    """

    prefix_P: Tensor
    ids_T: Tensor
    assistant_T: Tensor


def row_messages(row: Row) -> tuple[Message, ...]:
    """The row's whole conversation, reference answer included.

    Raises:
        ValueError: the row has no answer to learn.
    """
    if not row.answer.strip():
        raise ValueError(f"row {row.id!r}: no `answer` to learn from; give one or drop the row")
    return (*row.prompt, {"role": "assistant", "content": row.answer})


def conversation(
    processor: Any, messages: Sequence[Message], num_audio_tokens: int | None
) -> Conversation:
    """Ids and mask of a conversation; every assistant turn is marked, multi-turn included.

    Args:
        num_audio_tokens: of the clip, or None without one.

    Raises:
        ValueError: the template leaves no trace of an assistant turn.
    """
    ids = expanded_prompt(processor, messages, num_audio_tokens, generate=False)
    mask = assistant_mask(ids, processor.tokenizer)
    written = mask.nonzero().squeeze(1)
    if len(written) == 0:
        raise ValueError("chat: no assistant turn found in the conversation; add an answer")
    if num_audio_tokens is None:
        cut = int(written[0])
    else:
        cut = int((ids == processor.audio_token_id).nonzero()[-1]) + 2  # and the closing token
    end = int(written[-1]) + 1
    return Conversation(ids[:cut], ids[cut:end], mask[cut:end])


def shared_context(row: Row) -> tuple[str | None, str]:
    """Rows with the same pair have the same prefix: the clip, and the system message."""
    system = "\n".join(str(m["content"]) for m in row.prompt if m["role"] == "system")
    return row.audio, system
