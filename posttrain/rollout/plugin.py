"""Entry point `vllm.general_plugins`: tells every vLLM process about AF-Next.

vLLM removed its own MusicFlamingo model in 0.25; this registers ours under the checkpoint's
architecture name, and a gloo weight-transfer engine, both by import string: nothing heavy loads
until it is asked for.
"""

ARCHITECTURE = "MusicFlamingoForConditionalGeneration"
MODEL_CLASS = "posttrain.rollout.vllm_afnext:AFNextForConditionalGeneration"
TRANSFER_MODULE = "posttrain.rollout.gloo_transfer"


def register() -> None:
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
    register_gloo_transfer()


def register_gloo_transfer() -> None:
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    for factory, name in (
        (WeightTransferEngineFactory, "GlooWeightTransferEngine"),
        (WeightTransferTrainerFactory, "GlooTrainerWeightTransferEngine"),
    ):
        if "gloo" not in factory._registry:
            factory.register_engine("gloo", TRANSFER_MODULE, name)
