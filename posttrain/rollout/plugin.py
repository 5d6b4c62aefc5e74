"""Entry point `vllm.general_plugins`: tells every vLLM process about AF-Next.

vLLM removed its own MusicFlamingo model in 0.25; this registers ours under the checkpoint's
architecture name, by import string, so that nothing heavy loads until a checkpoint asks for it.
"""

ARCHITECTURE = "MusicFlamingoForConditionalGeneration"
MODEL_CLASS = "posttrain.rollout.vllm_afnext:AFNextForConditionalGeneration"


def register() -> None:
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
