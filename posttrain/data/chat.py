"""Prompts through the processor's own template, and label masks on expanded ids.

The processor turns one `<sound>` into hundreds of tokens, so nothing here counts tokens of the
text prompt: masks are read off the expanded ids, at the template's turn markers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Message = Mapping[str, Any]


def with_audio_part(messages: Sequence[Message], has_audio: bool) -> list[dict[str, Any]]:
    """Messages in content-part form, with the clip in front of the first user turn's text."""
    out, placed = [], not has_audio
    for message in messages:
        parts: list[dict[str, Any]] = [{"type": "text", "text": str(message["content"])}]
        if message["role"] == "user" and not placed:
            parts.insert(0, {"type": "audio"})
            placed = True
        out.append({"role": message["role"], "content": parts})
    if not placed:
        raise ValueError("chat: a clip and no user turn to put it in; add a user message")
    return out


def render(
    processor: Any, messages: Sequence[Message], *, has_audio: bool, generate: bool = True
) -> str:
    """The prompt as text, one `<sound>` for the clip; `generate` opens the assistant's turn."""
    return processor.apply_chat_template(
        with_audio_part(messages, has_audio), tokenize=False, add_generation_prompt=generate
    )


MIN_FRAMES = 3  # mel frames (10 ms) below which a window yields no token


def drop_tokenless_tail(waveform: np.ndarray, processor: Any) -> np.ndarray:
    """Cuts off a last window too short to yield a token (under 30 ms past a window's end).

    Such a window adds nothing to the prompt, but transformers 5.19 then fails to match windows
    with clips (`_build_audio_timestamps` indexes past its end), so neither engine gets to see it.
    """
    extractor = processor.feature_extractor
    window = extractor.chunk_length * extractor.sampling_rate
    tail = len(waveform) % window
    if len(waveform) > window and 0 < tail <= (MIN_FRAMES - 1) * extractor.hop_length:
        return waveform[: len(waveform) - tail]
    return waveform


def encode(
    processor: Any,
    messages: Sequence[Message],
    waveform: np.ndarray | None = None,
    *,
    generate: bool = True,
) -> dict[str, torch.Tensor]:
    """Expanded ids, and audio features where there is a clip.

    Args:
        waveform: float32 (num_samples,) at 16 kHz, or None.

    Returns:
        `input_ids` (1, P) and, with audio, `input_features` (W, mel_bins, frames) and
        `input_features_mask` (W, frames), W windows.
    """
    text = render(processor, messages, has_audio=waveform is not None, generate=generate)
    audio = None if waveform is None else [drop_tokenless_tail(waveform, processor)]
    batch = processor(text=[text], audio=audio, return_tensors="pt")
    keep = ("input_ids", "input_features", "input_features_mask")
    return {key: batch[key] for key in keep if key in batch}


def expanded_prompt(
    processor: Any, messages: Sequence[Message], num_audio_tokens: int | None, *,
    generate: bool = True,
) -> torch.Tensor:  # fmt: skip
    """(P,) int64: the ids that `encode` gives, from the number of audio tokens alone.

    Args:
        num_audio_tokens: of the clip, or None without one.
        generate: open the assistant's turn at the end.
    """
    text = render(processor, messages, has_audio=num_audio_tokens is not None, generate=generate)
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    if num_audio_tokens is not None:
        places = [i for i, token in enumerate(ids) if token == processor.audio_token_id]
        if len(places) != 1:
            raise ValueError(
                f"chat: {len(places)} audio placeholders for one clip; remove "
                f"{processor.audio_token} from the messages' text"
            )
        place = places[0]
        run = [processor.audio_token_id] * num_audio_tokens
        ids[place : place + 1] = [
            processor.audio_bos_token_id, *run, processor.audio_eos_token_id
        ]  # fmt: skip
    return torch.tensor(ids)


def assistant_mask(input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Which tokens the assistant wrote, the closing `<|im_end|>` included.

    Args:
        input_ids: (T,) expanded ids of one conversation.

    Returns:
        bool (T,).
    """
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = input_ids.tolist()
    mask = torch.zeros(len(ids), dtype=torch.bool)
    position = 0
    while position + len(opening) <= len(ids):
        if ids[position : position + len(opening)] != opening:
            position += 1
            continue
        position += len(opening)
        while position < len(ids):
            mask[position] = True
            position += 1
            if ids[position - 1] == end_id:
                break
    return mask
