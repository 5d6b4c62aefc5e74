"""Rules over several fields of a recipe: they raise, and never rewrite. No torch."""

from __future__ import annotations

from posttrain.schema import Recipe

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
REPORTERS = ("tensorboard", "wandb", "trackio")
DPO_LOSS_TYPES = ("sigmoid", "sigmoid_norm", "hinge", "ipo")
KINDS = ("grpo", "sft", "distill", "dpo", "reward", "ladder")
TRAINING_KINDS = ("grpo", "sft", "distill", "dpo")


# fmt: off
def validate(recipe: Recipe, known_rewards: tuple[str, ...]) -> None:
    """Rules over several fields.

    Raises:
        ValueError: the key, its value and the fix.
    """
    r = recipe
    _within_limits(recipe)
    _one_of("kind", r.kind, KINDS)
    _one_of("resume", r.resume, ("auto", "never"))
    _one_of("model.dtype", r.model.dtype, ("bfloat16", "float32"))
    _one_of("learner.device", r.learner.device, ("auto", "cuda", "cpu"))
    for reporter in r.report_to:
        _one_of("report_to", reporter, REPORTERS)
    _rule(r.model.path, "model.path=''", "give a checkpoint folder or a Hub id")
    _rule(r.data.train or r.kind == "ladder", "data.train={}",
          "name at least one source with a path")
    for part in ("train", "held_out", "reported", "replay", "held_out_pairs"):
        for name, source in getattr(r.data, part).items():
            _rule(source.max_rows is None or source.max_rows >= 1,
                  f"data.{part}.{name}.max_rows={source.max_rows}", "at least 1, or null for all")
    for name in sorted(r.data.held_out.keys() & r.data.reported.keys()):
        raise ValueError(f"data.reported.{name}: data.held_out has this name too; rename one")
    if r.rewards or (r.kind == "grpo" and r.teacher.path is None):
        _validate_rewards(recipe, known_rewards)
    if r.kind == "grpo":
        _validate_grpo(recipe)
    if r.kind in ("sft", "distill", "dpo"):
        _validate_supervised(recipe)
    if r.kind in TRAINING_KINDS:
        _validate_training(recipe)
    _validate_gates(recipe)
    if r.kind == "ladder":
        _rule(r.stages, "stages={}", "name the stages, each with a recipe")
        _rule(r.data.held_out, "data.held_out={}", "all stages are scored on the same rows")
        for name, stage in r.stages.items():
            _rule(stage.recipe, f"stages.{name}.recipe=''", "give a recipe file")


def _validate_rewards(recipe: Recipe, known_rewards: tuple[str, ...]) -> None:
    r, a = recipe, recipe.algorithm
    _rule(r.rewards, "rewards={}", "name at least one reward, such as timestamp_grounding")
    for name, term in r.rewards.items():
        _rule(name in known_rewards or term.path, f"rewards.{name}: unknown reward",
              f"known: {', '.join(known_rewards)}; for your own give rewards.{name}.path")
        _rule(term.gate is None or (term.gate in r.rewards and term.gate != name),
              f"rewards.{name}.gate={term.gate}", "must name another reward of the recipe")
    _one_of("scoring.truncated", r.scoring.truncated, ("drop", "0", "score"))
    _one_of("scoring.errored", r.scoring.errored, ("drop", "stop"))
    _one_of("algorithm.multi_objective_aggregation", a.multi_objective_aggregation,
            ("sum_then_normalize", "normalize_then_sum"))
    if "format" in r.rewards:
        weight = r.rewards["format"].weight
        _rule(weight <= 0.2, f"rewards.format.weight={weight}", "at most 0.2, or form is all")


def _validate_grpo(recipe: Recipe) -> None:
    r, s, a = recipe, recipe.sampling, recipe.algorithm
    _rule(not (r.data.replay or r.data.replay_ratio is not None or r.data.held_out_pairs),
          "data.replay, data.replay_ratio or data.held_out_pairs with kind=grpo",
          "rows are mixed by naming more sources under data.train")
    _one_of("algorithm.loss_type", a.loss_type, LOSS_TYPES)
    _one_of("algorithm.importance_sampling_level", a.importance_sampling_level,
            ("token", "sequence"))
    _one_of("algorithm.scale_rewards", a.scale_rewards, ("group", "batch", "none"))
    _one_of("algorithm.vllm_importance_sampling_mode", a.vllm_importance_sampling_mode, IS_MODES)
    _rule(s.num_generations >= 2 or not r.rewards,
          f"sampling.num_generations={s.num_generations}",
          "at least 2: the advantage of a reward is relative to the group")
    _rule(s.temperature > 0, f"sampling.temperature={s.temperature}",
          "above 0: greedy completions of a group are all equal")
    for key in ("top_p", "repetition_penalty"):
        value = getattr(s, key)
        _rule(value == 1.0, f"sampling.{key}={value}",
              "must be 1.0: otherwise log-probabilities are not those of the sampled policy")
    _rule(not (r.rollout.weight_sync == "adapter" and not r.lora.enabled),
          "rollout.weight_sync=adapter with lora.enabled=false", "use full, or train an adapter")
    _rule(not (r.rollout.weight_sync == "full" and r.lora.enabled),
          "rollout.weight_sync=full with lora.enabled=true", "only the adapter changes: use auto")
    _rule(not (r.lora.enabled and r.model.trains_beside_adapter),
          "lora.enabled=true with model.train_encoder, train_projector or train_embeddings "
          "under kind=grpo",
          "the adapter alone is sent to the engines: train one or the other")
    truncates = a.vllm_importance_sampling_mode.endswith("truncate")
    bounded = a.vllm_importance_sampling_clip_min or a.vllm_importance_sampling_clip_max
    _rule(not (a.vllm_importance_sampling_correction and truncates and not bounded),
          "algorithm.vllm_importance_sampling_clip_max=null with a truncate mode", "set a bound")
    _rule(a.loss_type != "cispo" or (a.epsilon_high or 0) >= 1,
          f"algorithm.epsilon_high={a.epsilon_high} with loss_type=cispo",
          "it bounds the ratio itself: 1 or more, such as 5.0")
    _rule(not (a.delta is not None and a.loss_type == "cispo"),
          f"algorithm.delta={a.delta} with loss_type=cispo", "cispo clips by epsilon_high alone")

def _validate_gates(recipe: Recipe) -> None:
    _rule(not recipe.gates or recipe.kind in TRAINING_KINDS, f"gates with kind={recipe.kind}",
          "nothing judges them there; put them into a stage's recipe")
    sources = recipe.data.held_out | recipe.data.reported
    for name, gate in recipe.gates.items():
        _rule(gate.source in sources, f"gates.{name}.source={gate.source}",
              f"a name of data.held_out or data.reported: {', '.join(sources) or 'none there'}")
        _rule(gate.metric, f"gates.{name}.metric=''", "such as cer or miou")
        limits = (gate.min_relative_gain, gate.max_relative_loss, gate.max_loss, gate.worst)
        _rule(any(limit is not None for limit in limits), f"gates.{name}: no limit",
              "give min_relative_gain, max_relative_loss, max_loss or worst")


def _validate_supervised(recipe: Recipe) -> None:
    r, t = recipe, recipe.training
    ranks, batch = r.learner.num_processes, t.per_device_train_batch_size
    _one_of("dpo.loss_type", r.dpo.loss_type, DPO_LOSS_TYPES)
    c = r.chains
    _rule(t.micro_batch_tokens is None, f"training.micro_batch_tokens with kind={r.kind}",
          "training.per_device_train_batch_size and rows_per_clip say what is forwarded at once")
    _rule(r.kind == "dpo" or not r.data.held_out_pairs, f"data.held_out_pairs with kind={r.kind}",
          "pairs are read under kind=dpo alone")
    _rule(r.kind != "dpo" or not r.data.replay, "data.replay with kind=dpo",
          "mix pairs by naming more sources under data.train")
    _rule(0 <= (r.data.replay_ratio or 0) < 1, f"data.replay_ratio={r.data.replay_ratio}",
          "a share from 0 to below 1")
    _rule(bool(r.data.replay) == (r.data.replay_ratio is not None),
          f"data.replay_ratio={r.data.replay_ratio} with {len(r.data.replay)} replay sources",
          "give both or neither; a ratio of 0 trains without the sources")
    _rule((c.endpoint is None) == (c.endpoint_model is None),
          f"chains.endpoint={c.endpoint} with chains.endpoint_model={c.endpoint_model}",
          "give both or neither")
    _rule(not (c.endpoint and c.teacher), f"chains.teacher={c.teacher} with chains.endpoint",
          "one teacher: a checkpoint or an endpoint")
    _rule(r.learner.sequence_parallel_size == 1,
          f"learner.sequence_parallel_size={r.learner.sequence_parallel_size} with kind={r.kind}",
          "ranks share a sequence under kind=grpo alone: set it to 1")
    _rule(r.shared_prefix.enabled or r.learner.zero_stage < 3,
          f"shared_prefix.enabled=false with learner.zero_stage=3 and kind={r.kind}",
          "ranks forward unequal numbers of answers one by one, and ZeRO-3 waits for all of them: "
          "set learner.zero_stage=2")
    _rule(t.prompts_per_step % (ranks * batch) == 0,
          f"training.prompts_per_step={t.prompts_per_step} with learner.num_processes={ranks} and "
          f"training.per_device_train_batch_size={batch}", "make it a multiple of their product")


def _validate_training(recipe: Recipe) -> None:
    r, t = recipe, recipe.training
    _one_of("rollout.engine", r.rollout.engine, ("vllm", "transformers"))
    _one_of("rollout.weight_sync", r.rollout.weight_sync, ("auto", "full", "adapter"))
    _one_of("rollout.device", r.rollout.device, ("auto", "cuda", "cpu"))
    _one_of("training.lr_scheduler_type", t.lr_scheduler_type, ("cosine", "linear", "constant"))
    _one_of("learner.zero_stage", r.learner.zero_stage, (2, 3))
    degree = r.learner.sequence_parallel_size
    _rule(r.learner.num_processes % degree == 0,
          f"learner.num_processes={r.learner.num_processes} with "
          f"learner.sequence_parallel_size={degree}", "make it a multiple: ranks share a sequence")
    _rule(r.model.gradient_checkpointing or not r.model.activation_offload,
          "model.activation_offload=true with model.gradient_checkpointing=false",
          "switch gradient_checkpointing on: without it the weights would be copied as well")
    _rule(degree == 1 or r.shared_prefix.enabled,
          f"learner.sequence_parallel_size={degree} with shared_prefix.enabled=false",
          "only the packed sequence is shared out")
    _rule(t.prompts_per_step % (r.learner.num_processes // degree) == 0,
          f"training.prompts_per_step={t.prompts_per_step} with {r.learner.num_processes} "
          f"learner processes, {degree} a sequence", "make it a multiple of the sequences at once")
    _one_of("shared_prefix.verify", r.shared_prefix.verify, ("first_step", "never"))
    _rule(r.rollout.num_workers >= 1, f"rollout.num_workers={r.rollout.num_workers}", "at least 1")
    _rule(1 <= r.lora.r <= 512, f"lora.r={r.lora.r}", "from 1 to 512")

# fmt: on


LIMITS: tuple[tuple[str, float, float], ...] = (
    ("sampling.max_completion_length", 1, 1e6),
    ("algorithm.beta", 0, 1e6),
    ("algorithm.epsilon", 0, 1),
    ("algorithm.num_iterations", 1, 1_000),
    ("teacher.kl_coef", 0, 1e6),
    ("chains.num_chains", 1, 1e4),
    ("chains.temperature", 0.01, 10),
    ("chains.max_tokens", 1, 1e6),
    ("chains.blind_samples", 0, 1e4),
    ("chains.blind_share", 0.001, 1),
    ("chains.min_answer", 0, 1),
    ("chains.min_true", 0, 1),
    ("chains.max_repetition", 0, 1),
    ("chains.chunk_rows", 1, 1e6),
    ("chains.parallel_requests", 1, 1e4),
    ("dpo.beta", 1e-6, 1e6),
    ("dpo.sft_weight", 0, 1e6),
    ("training.rows_per_clip", 1, 1e6),
    ("training.per_device_train_batch_size", 1, 1e6),
    ("training.max_steps", 1, 1e9),
    ("training.prompts_per_step", 1, 1e6),
    ("training.micro_batch_tokens", 1, 1e9),
    ("training.learning_rate", 0, 1),
    ("training.warmup_ratio", 0, 1),
    ("training.max_grad_norm", 0, 1e9),
    ("training.save_steps", 1, 1e9),
    ("training.eval_steps", 1, 1e9),
    ("training.save_total_limit", 1, 1e9),
    ("training.max_skipped_steps", 1, 1e9),
    ("learner.num_processes", 1, 1e6),
    ("learner.sequence_parallel_size", 1, 1e6),
    ("shared_prefix.verify_tokens", 1, 1e9),
    ("shared_prefix.logprob_tolerance", 0, 1e9),
    ("shared_prefix.gradient_tolerance", 0, 1e9),
    ("audio_embeddings.max_gib", 0, 1e9),
    ("rollout.num_workers", 1, 1e6),
    ("rollout.tensor_parallel_size", 1, 64),
    ("rollout.gpu_memory_utilization", 0.05, 1),
    ("rollout.max_num_seqs", 1, 1e6),
    ("rollout.timeout_s", 1, 1e9),
    ("rollout.max_restarts", 0, 1e9),
    ("scoring.timeout_s", 0.01, 1e9),
    ("scoring.num_threads", 1, 1_000),
    ("evaluation.num_rows", 1, 1e9),
    ("evaluation.loss_rows", 1, 1e9),
    ("evaluation.bootstrap_samples", 100, 1e9),
)


def _within_limits(recipe: Recipe) -> None:
    for key, low, high in LIMITS:
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{key}={value}: must be from {low:g} to {high:g}")


def _one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value}: must be one of {', '.join(map(str, allowed))}")


def _rule(holds: object, what: str, fix: str) -> None:
    if not holds:
        raise ValueError(f"{what}: {fix}")
