"""AF-Next-nano: the released classes and processor at about 2.4 M parameters.

Same special tokens, chat-template form, single-digit tokens, untied embeddings and rotary time
embedding as AF-Next; only sizes differ. Everything that reads a checkpoint reads this one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers
from transformers import (
    AudioFlamingo3EncoderConfig,
    MusicFlamingoConfig,
    MusicFlamingoForConditionalGeneration,
    MusicFlamingoProcessor,
    Qwen2Config,
    Qwen2Tokenizer,
    WhisperFeatureExtractor,
)

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>", "<|sound_bos|>", "<|sound_eos|>",
)  # fmt: skip
TIME_TAGS = ("<t>", "</t>")
WINDOW_S = 10
MAX_AUDIO_LEN_S = 1800

SYSTEM_PROMPT = "You are Audio Flamingo-Next, a multimodal assistant."
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'audio' -%}"
    "<sound>{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class NanoSize:
    """Widths and depths; the defaults are what is committed."""

    encoder_width: int = 128
    encoder_layers: int = 2
    encoder_heads: int = 4
    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    vocab_size: int = 640


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen2's own pre-tokenizer, trained on `corpus`."""
    shell: Tokenizer = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(TIME_TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[], show_progress=False, min_frequency=2,
    )  # fmt: skip
    shell.train_from_iterator(corpus, trainer)
    model = json.loads(shell.to_str())["model"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    vocab = {token: i for token, i in model["vocab"].items() if token not in SPECIAL_TOKENS}
    vocab = {token: i for i, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )  # fmt: skip
    # one token each: a model of four layers cannot carry a label across `<`, `t`, `>` to a time
    tokenizer.add_tokens(
        [AddedToken(tag, lstrip=tag == "<t>", normalized=False) for tag in TIME_TAGS]
    )
    return tokenizer


def build_processor(tokenizer: Any) -> MusicFlamingoProcessor:
    """AF-Next's processor: 128 mel bins, 25 ms windows, 10 ms hop, windows of 10 s."""
    extractor = WhisperFeatureExtractor(
        feature_size=128, sampling_rate=16_000, hop_length=160, n_fft=400, chunk_length=WINDOW_S
    )
    return MusicFlamingoProcessor(
        extractor, tokenizer, chat_template=CHAT_TEMPLATE, max_audio_len=MAX_AUDIO_LEN_S
    )


def build_config(tokenizer: Any, size: NanoSize | None = None) -> MusicFlamingoConfig:
    size = size or NanoSize()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    audio = AudioFlamingo3EncoderConfig(
        num_mel_bins=128, hidden_size=size.encoder_width, intermediate_size=4 * size.encoder_width,
        num_hidden_layers=size.encoder_layers, num_attention_heads=size.encoder_heads,
        max_source_positions=WINDOW_S * 50,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, max_position_embeddings=131_072,
        tie_word_embeddings=False, rope_theta=15_300_000.0, bos_token_id=None,
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
    )  # fmt: skip
    return MusicFlamingoConfig(
        audio_config=audio, text_config=text, audio_token_id=ids["<sound>"],
        audio_bos_token_id=ids["<|sound_bos|>"], audio_eos_token_id=ids["<|sound_eos|>"],
        tie_word_embeddings=False,
    )  # fmt: skip


def build_model(config: MusicFlamingoConfig) -> MusicFlamingoForConditionalGeneration:
    """A randomly initialised model; seed torch before."""
    model = MusicFlamingoForConditionalGeneration(config)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model
