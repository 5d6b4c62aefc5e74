"""What a recipe may say: one dataclass a section, defaults included. No torch.

Hyper-parameters are named and mean what they do in TRL's GRPOConfig; units stand in the names.
One differs: `scoring.truncated` stands for `mask_truncated_completions`; a dropped completion has
no reward at all, so it leaves its group's mean too (in TRL it only leaves the loss).
`validate` holds the rules that tie fields together: they raise and never rewrite.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LANGUAGE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
REPORTERS = ("tensorboard", "wandb", "trackio")
LATER_KINDS = ("sft", "distill", "on_policy_distill", "dpo", "ladder")
KINDS = ("grpo", "reward")


@dataclass
class ModelConfig:
    """The checkpoint to train. `path` is a local folder or a Hub id."""

    path: str = ""
    dtype: str = "bfloat16"
    """Of learner and engine weights: bfloat16 or float32."""
    max_audio_len_s: float | None = None
    """Longest clip accepted; None: the processor's own limit. Longer clips are refused."""
    gradient_checkpointing: bool = True
    activation_offload: bool = False
    """The inputs of all layers wait in host memory for the backward pass; needs
    gradient_checkpointing."""
    train_encoder: bool = False
    train_projector: bool = False


@dataclass
class LoraConfig:
    """Adapter on the language model's linears, chosen by path: the encoder has q_proj too."""

    enabled: bool = False
    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: list(LANGUAGE_LINEARS))


@dataclass
class SharedPrefixConfig:
    """One forward of the prompt for all completions of a group."""

    enabled: bool = True
    """false: the dense path, every completion with its own copy of the prompt."""
    verify: str = "first_step"
    """first_step: a part of the first group is computed densely too, and a difference ends the run;
    never."""
    verify_tokens: int = 4096
    """Prompt tokens of that check; a longer prompt is shortened to its end."""
    logprob_tolerance: float | None = None
    """Largest difference allowed (nats); None: 1e-4 in float32, 1 in bfloat16."""
    gradient_tolerance: float | None = None
    """Of the gradient of the inputs, relative; None: 1e-3 in float32, 0.2 in bfloat16."""


@dataclass
class AudioEmbeddingsConfig:
    """Where encoded clips are kept. Whether, and what of them, follows from what trains."""

    dir: str | None = None
    """A folder on local disk; None: ~/.cache/posttrain/audio_embeddings."""
    max_gib: float = 50.0
    """Least recently used clips are dropped above this."""


@dataclass
class DataSource:
    """One JSONL of rows."""

    path: str = ""
    tasks: list[str] | None = None
    """Keep rows of these tasks only; None keeps all."""
    max_rows: int | None = None


@dataclass
class DataConfig:
    """Named sources, so that `data.train.timelines.path=x` works from the command line."""

    train: dict[str, DataSource] = field(default_factory=dict)
    held_out: dict[str, DataSource] = field(default_factory=dict)
    reported: dict[str, DataSource] = field(default_factory=dict)
    """Evaluated beside held_out and gating nothing, such as source clips never heard."""
    shuffle: bool = True


@dataclass
class RewardConfig:
    """One term of the weighted sum."""

    weight: float = 1.0
    gate: str | None = None
    """Another reward of the recipe; this term counts only where that one is scored above 0."""
    path: str | None = None
    """package.module:name of a reward of your own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reward; docs/rewards.md lists them."""


@dataclass
class ScoringConfig:
    """How rewards are run, and what becomes of completions without one."""

    truncated: str = "drop"
    """drop: out of loss and group mean; "0": worth 0 at most; score: like any other."""
    errored: str = "drop"
    """drop: out of loss and group mean, counted and shown; stop: end the run."""
    timeout_s: float = 60.0
    """A completion whose reward runs for so long while no other ends is errored."""
    num_threads: int = 16
    """Completions scored side by side: learned rewards form their batches from them."""
    prior: str | None = None
    """File of a blind prior; None: fitted on the training rows and saved with the run."""


@dataclass
class SamplingConfig:
    """How rollouts are drawn."""

    num_generations: int = 8
    """G, completions a prompt."""
    max_completion_length: int = 512
    """Tokens."""
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


@dataclass
class AlgorithmConfig:
    """The loss, as TRL's GRPOConfig names it."""

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    beta: float = 0.0
    """Weight of the k3 KL to the reference; 0 loads no reference."""
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    """Upper clip of the raw ratio (two-sided clipping); None: off."""
    num_iterations: int = 1
    """Optimizer passes over one batch of rollouts."""
    scale_rewards: str = "group"
    multi_objective_aggregation: str = "sum_then_normalize"
    """sum_then_normalize, or normalize_then_sum: each reward by itself within its group."""
    use_bias_correction_kl: bool = True
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0


@dataclass
class TrainingConfig:
    """Optimisation, schedule and safety."""

    max_steps: int = 100
    prompts_per_step: int = 32
    """Groups in one optimizer step, over all ranks; a multiple of learner.num_processes over
    learner.sequence_parallel_size."""
    micro_batch_tokens: int | None = None
    """Tokens that a rank forwards at once; small groups are packed together, larger ones split
    into parts that each carry the prompt once. None: one group at a time."""
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    save_steps: int = 50
    save_total_limit: int | None = 2
    eval_steps: int | None = 50
    """Held-out evaluation every so many steps, and always before and after; None: only those."""
    max_skipped_steps: int = 5
    """Steps in a row that a NaN loss may skip before the run stops."""


@dataclass
class LearnerConfig:
    """DeepSpeed ranks."""

    num_processes: int = 1
    zero_stage: int = 2
    device: str = "auto"
    """auto, cuda or cpu."""
    cpu_offload: bool = False
    """Optimizer state in host memory."""
    sequence_parallel_size: int = 1
    """Ranks that share one packed sequence (Ulysses); divides num_processes and the heads."""
    threads_per_process: int | None = None
    """CPU threads of a rank; None: torch decides."""


@dataclass
class RolloutConfig:
    """Inference workers."""

    engine: str = "vllm"
    """vllm or transformers."""
    num_workers: int = 1
    tensor_parallel_size: int = 1
    device: str = "auto"
    gpu_memory_utilization: float = 0.85
    cpu_kv_cache_gib: int = 1
    max_model_len: int | None = None
    """Prompt and completion together, tokens; None: the checkpoint's limit."""
    max_num_seqs: int = 64
    timeout_s: float = 600.0
    """A worker that does not answer its groups for so long counts as hung and is replaced."""
    threads_per_worker: int | None = None
    """CPU threads of a worker; None: all."""
    max_restarts: int = 3
    """Of workers, over the whole run."""
    weight_sync: str = "auto"
    """auto (adapter with LoRA, else full), full, or adapter."""


@dataclass
class RewardModelConfig:
    """The head that `kind: reward` trains over frozen audio and text features."""

    width: int = 256
    dilations: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Frames between the taps of each convolution."""
    dropout: float = 0.1
    batch_size: int = 16
    """Clips."""
    absent_phrases: int = 8
    """Phrases of other clips asked of every batch."""
    max_windows: int = 2
    """Encoder windows of a clip that a step sees; longer clips are cropped."""
    feature_cache_gib: float = 4.0


@dataclass
class EvaluationConfig:
    """Held-out evaluation: greedy, same rows every time, before and after training."""

    num_rows: int | None = None
    """First so many rows of each held-out source; None: all."""
    bootstrap_samples: int = 2_000


@dataclass
class Recipe:
    """A run. `base:` names a recipe to inherit from, relative to the file."""

    kind: str = "grpo"
    run_name: str | None = None
    """Default: the recipe's file stem."""
    output_dir: str = "runs"
    seed: int = 0
    resume: str = "auto"
    """auto: continue an unfinished run of this name; never: start a new folder."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    shared_prefix: SharedPrefixConfig = field(default_factory=SharedPrefixConfig)
    audio_embeddings: AudioEmbeddingsConfig = field(default_factory=AudioEmbeddingsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)


# fmt: off
def validate(recipe: Recipe, known_rewards: tuple[str, ...]) -> None:
    """Rules over several fields.

    Raises:
        ValueError: the key, its value and the fix.
    """
    r = recipe
    _within_limits(recipe)
    if r.kind in LATER_KINDS:
        raise ValueError(
            f"kind={r.kind}: not in this version yet; kinds that run: {', '.join(KINDS)}"
        )
    _one_of("kind", r.kind, KINDS)
    _one_of("resume", r.resume, ("auto", "never"))
    _one_of("model.dtype", r.model.dtype, ("bfloat16", "float32"))
    _one_of("learner.device", r.learner.device, ("auto", "cuda", "cpu"))
    for reporter in r.report_to:
        _one_of("report_to", reporter, REPORTERS)
    _rule(r.model.path, "model.path=''", "give a checkpoint folder or a Hub id")
    _rule(r.data.train, "data.train={}", "name at least one source with a path")
    for name in sorted(r.data.held_out.keys() & r.data.reported.keys()):
        raise ValueError(f"data.reported.{name}: data.held_out has this name too; rename one")
    if r.kind == "grpo":
        _validate_rewards(recipe, known_rewards)
        _validate_grpo(recipe)


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
    r, s, a, t = recipe, recipe.sampling, recipe.algorithm, recipe.training
    _one_of("algorithm.loss_type", a.loss_type, LOSS_TYPES)
    _one_of("algorithm.importance_sampling_level", a.importance_sampling_level,
            ("token", "sequence"))
    _one_of("algorithm.scale_rewards", a.scale_rewards, ("group", "batch", "none"))
    _one_of("algorithm.vllm_importance_sampling_mode", a.vllm_importance_sampling_mode, IS_MODES)
    _one_of("rollout.engine", r.rollout.engine, ("vllm", "transformers"))
    _one_of("rollout.weight_sync", r.rollout.weight_sync, ("auto", "full", "adapter"))
    _one_of("rollout.device", r.rollout.device, ("auto", "cuda", "cpu"))
    _one_of("training.lr_scheduler_type", t.lr_scheduler_type, ("cosine", "linear", "constant"))
    _rule(s.num_generations >= 2, f"sampling.num_generations={s.num_generations}",
          "at least 2: the advantage is relative to the group")
    _rule(s.temperature > 0, f"sampling.temperature={s.temperature}",
          "above 0: greedy completions of a group are all equal")
    for key in ("top_p", "repetition_penalty"):
        value = getattr(s, key)
        _rule(value == 1.0, f"sampling.{key}={value}",
              "must be 1.0: otherwise log-probabilities are not those of the sampled policy")
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
    _rule(not (r.rollout.weight_sync == "adapter" and not r.lora.enabled),
          "rollout.weight_sync=adapter with lora.enabled=false", "use full, or train an adapter")
    _rule(not (r.rollout.weight_sync == "full" and r.lora.enabled),
          "rollout.weight_sync=full with lora.enabled=true", "only the adapter changes: use auto")
    _rule(not (r.lora.enabled and (r.model.train_encoder or r.model.train_projector)),
          "lora.enabled=true with model.train_encoder or train_projector",
          "the adapter alone is sent to the engines: train one or the other")
    _rule(1 <= r.lora.r <= 512, f"lora.r={r.lora.r}", "from 1 to 512")
    truncates = a.vllm_importance_sampling_mode.endswith("truncate")
    bounded = a.vllm_importance_sampling_clip_min or a.vllm_importance_sampling_clip_max
    _rule(not (a.vllm_importance_sampling_correction and truncates and not bounded),
          "algorithm.vllm_importance_sampling_clip_max=null with a truncate mode", "set a bound")
    _rule(a.loss_type != "cispo" or (a.epsilon_high or 0) >= 1,
          f"algorithm.epsilon_high={a.epsilon_high} with loss_type=cispo",
          "it bounds the ratio itself: 1 or more, such as 5.0")
    _rule(not (a.delta is not None and a.loss_type == "cispo"),
          f"algorithm.delta={a.delta} with loss_type=cispo", "cispo clips by epsilon_high alone")

# fmt: on


LIMITS: tuple[tuple[str, float, float], ...] = (
    ("sampling.max_completion_length", 1, 1e6),
    ("algorithm.beta", 0, 1e6),
    ("algorithm.epsilon", 0, 1),
    ("algorithm.num_iterations", 1, 1_000),
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
