"""What a recipe may say: one dataclass a section, defaults included. No torch.

Hyper-parameters are named and mean what they do in TRL's GRPOConfig; units stand in the names.
One differs: `scoring.truncated` stands for `mask_truncated_completions`; a dropped completion has
no reward at all, so it leaves its group's mean too (in TRL it only leaves the loss).
`recipe_rules` holds what ties fields together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LANGUAGE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
    train_embeddings: bool = False
    """Token embeddings and output head in full beside an adapter, as PEFT's modules_to_save: for a
    language whose tokens the model hardly ever saw. Without an adapter they always train."""

    @property
    def trains_beside_adapter(self) -> bool:
        """Weights other than an adapter's change."""
        return self.train_encoder or self.train_projector or self.train_embeddings


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
    replay: dict[str, DataSource] = field(default_factory=dict)
    """Rows of what the model must not forget, mixed into training (sft)."""
    replay_ratio: float | None = None
    """Share of the training rows that are replayed, 0 (none, said aloud) to below 1."""
    held_out_pairs: dict[str, DataSource] = field(default_factory=dict)
    """Preference pairs whose ranking `kind: dpo` reports before, during and after training."""
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
class TeacherConfig:
    """On-policy distillation: a frozen checkpoint whose log-probabilities of the student's own
    rollouts become advantages a token."""

    path: str | None = None
    """A folder or Hub id of the same tokenizer; None: no teacher."""
    kl_coef: float = 1.0
    """Weight of the per-token reverse KL beside the advantage of the rewards."""


@dataclass
class ChainsConfig:
    """Offline distillation: how chains are asked of a teacher, and which are kept."""

    teacher: str | None = None
    """An AF-Next checkpoint that listens on the rollout workers; None: the model itself."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server whose text model reads the annotations instead."""
    endpoint_model: str | None = None
    temperature: float = 1.0
    max_tokens: int = 1024
    num_chains: int = 8
    min_answer: float = 0.5
    """Lowest score of the answer, 0 to 1: IoU for times, 1 - error rate for text."""
    min_true: float = 0.75
    """Lowest share of cited times that must be true."""
    require_labels: bool = True
    """Reject chains of rows without labelled events, whose times nothing can check."""
    max_words: int = 1_000
    max_repetition: float = 0.5
    """Highest share of 4-grams said before."""
    blind_samples: int = 4
    """Answers a row without audio; 0 leaves that check out."""
    blind_share: float = 0.5
    """Rows are dropped where so many of those are right."""
    chunk_rows: int = 32
    """Rows that are asked, and written, together: at least rollout.num_workers x max_num_seqs /
    num_chains, or workers wait."""
    parallel_requests: int = 8
    """Requests to the endpoint at once."""


@dataclass
class StageConfig:
    """One step of a ladder: a recipe that starts from where the one before ended."""

    recipe: str = ""
    """A recipe file, relative to the working directory."""
    overrides: list[str] = field(default_factory=list)
    """`key=value` strings, as on the command line."""


@dataclass
class GateConfig:
    """What an evaluated source must show after training, or the run fails with exit code 3."""

    source: str = ""
    """A name of data.held_out or data.reported."""
    metric: str = ""
    """Such as cer, miou, chrf, refusal, over_refusal."""
    min_relative_gain: float | None = None
    """By how much the metric must get better, as a share of its value before."""
    max_relative_loss: float | None = None
    """By how much it may get worse, as a share of its value before."""
    max_loss: float | None = None
    """By how much it may get worse, in its own unit."""
    worst: float | None = None
    """Value after training that it must reach: at most for errors, at least for scores."""


@dataclass
class DpoConfig:
    """The preference loss, as TRL's DPOConfig names it."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    sft_weight: float = 0.0
    """Of the chosen answers' mean negative log-likelihood; keeps them likely."""


@dataclass
class TrainingConfig:
    """Optimisation, schedule and safety."""

    max_steps: int = 100
    prompts_per_step: int = 32
    """In one optimizer step, over all ranks. grpo: groups, a multiple of learner.num_processes over
    learner.sequence_parallel_size. sft and dpo: clips, each with its rows or pairs."""
    per_device_train_batch_size: int = 1
    """sft and dpo: clips that a rank forwards at once; the rest of prompts_per_step is
    gradient accumulation."""
    rows_per_clip: int = 16
    """sft and dpo: rows (pairs) about one clip that are packed behind one copy of it; pairs that
    reject it for another clip share that one as well, so a bundle has two clips at most."""
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
    loss_rows: int | None = None
    """First so many of these whose loss `kind: sft` and `distill` report; None: all."""
    before: str | None = None
    """`held_out/after.json` of the run that made model.path, on the same rows: not asked again."""
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
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    chains: ChainsConfig = field(default_factory=ChainsConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    gates: dict[str, GateConfig] = field(default_factory=dict)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
