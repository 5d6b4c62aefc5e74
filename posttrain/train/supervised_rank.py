"""A DeepSpeed rank of SFT and DPO: TRL's SFTTrainer around packed groups.

    objective --collate--> packed groups --policy--> log-probabilities --loss--> SFTTrainer's step

Loop, schedule, data order, accumulation and DeepSpeed are transformers' and TRL's. Three things are
posttrain's: batches are packed groups that share clips, held-out sets are scored exactly (sums over
all ranks), and checkpoints are canonical safetensors, where DeepSpeed's own are pickles.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerControl
from trl import SFTTrainer

from posttrain.model.policy import GroupTensors, Policy, group_logprobs
from posttrain.schema import Recipe
from posttrain.train.batches import StepOrder, rows_with_loss, training_pairs, training_rows
from posttrain.train.checkpoints import Checkpoints
from posttrain.train.objectives import Batch, DpoObjective, Objective, SftObjective
from posttrain.train.optimizer_state import load_rank_state, load_rng_state
from posttrain.train.policy_rank import PolicyRank
from posttrain.train.schedule import lr_factor
from posttrain.train.trainer_arguments import tell_accelerate, trainer_arguments

TRAINER_STATE = "trainer_state.json"


class TrainedPolicy(Policy):
    """The policy with what Trainer asks of a transformers model, answered for the one inside."""

    @property
    def config(self) -> Any:
        return self.core.config

    @property
    def generation_config(self) -> Any:
        return self.core.generation_config

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.core.lm_head

    def add_model_tags(self, tags: Any) -> None:
        """Cards are written by posttrain."""


class SupervisedRank(PolicyRank):
    """Holds the policy and its trainer; `train` runs to the end, `news` answers meanwhile."""

    policy_class = TrainedPolicy

    def build(self, resume_dir: str | None = None) -> dict[str, int]:
        """Loads the policy (or a checkpoint of it) and the data; returns sizes."""
        tell_accelerate(self.device)
        sizes = self.load(Path(resume_dir) if resume_dir else None)
        self.logs: deque[tuple[int, dict[str, float]]] = deque()
        self.scoring = ""  # which held-out set, and how far
        self.objective = self._objective()
        recipe = self.recipe
        adapter_alone = recipe.lora.enabled and not recipe.model.trains_beside_adapter
        if recipe.kind == "dpo" and not adapter_alone:
            self.reference = self.build_reference()  # no adapter to switch off brings it back
        return sizes

    def _objective(self) -> Objective:
        """What is learned; the controller has checked the data."""
        recipe = self.recipe
        if recipe.kind == "dpo":
            pairs, held_out_pairs = training_pairs(recipe, check=False)
            return DpoObjective(
                pairs, held_out_pairs, recipe.dpo, recipe.training.rows_per_clip, self.audio_inputs
            )
        rows, held_out = training_rows(recipe, check=False)
        answered = rows_with_loss(recipe, held_out)
        return SftObjective(rows, answered, recipe.training.rows_per_clip, self.audio_inputs)

    def train(self, run_dir: str, resume_dir: str | None) -> None:
        """Runs the recipe's steps; checkpoints and held-out losses fall due on the way."""
        checkpoints = Checkpoints(Path(run_dir), self.recipe.training.save_total_limit)
        self.trainer = PackedTrainer(self, checkpoints, resumed=resume_dir is not None)
        self.trainer.train(resume_from_checkpoint=resume_dir)

    def news(self) -> tuple[list[tuple[int, dict[str, float]]], str]:
        """(step, metrics) logged since the last call, which rank 0 has; what is being scored."""
        return [self.logs.popleft() for _ in range(len(self.logs))], self.scoring


class PackedTrainer(SFTTrainer):
    """SFTTrainer on batches of packed groups."""

    control: TrainerControl
    lr_scheduler: Any

    def __init__(self, rank: SupervisedRank, checkpoints: Checkpoints, *, resumed: bool) -> None:
        self.rank, self.objective, self.checkpoints = rank, rank.objective, checkpoints
        self.sums: dict[str, Any] = defaultdict(float)  # of a step, this rank's
        self.num_items = 0.0  # of a step, all ranks'
        super().__init__(
            rank.policy,
            trainer_arguments(rank.recipe, rank.device.type, checkpoints.folder, resumed=resumed),
            data_collator=self._collated,
            train_dataset=Dataset.from_dict({"bundle": range(self.objective.num_bundles())}),
            eval_dataset=Dataset.from_dict({"bundle": [0]}),  # `evaluate` has the real ones
            processing_class=rank.processor,
            callbacks=[_StopWhenSkipping(self), *([_Log(rank)] if rank.rank == 0 else [])],
        )
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the items of a batch
        if self.args.world_size != rank.world_size:
            raise RuntimeError(
                f"accelerate sees {self.args.world_size} processes, there are {rank.world_size}; "
                "another version of accelerate? The locked one is in requirements/"
            )

    def _collated(self, items: list[dict[str, int]]) -> dict[str, Any]:
        batch = self.objective.collate([item["bundle"] for item in items])
        # Trainer counts these over accumulation steps and ranks: the batch's number of items
        counted = torch.zeros(batch.num_items, dtype=torch.long)
        return {"batch": batch, "labels": counted, "shift_labels": counted}

    def get_train_dataloader(self) -> DataLoader:
        """The order is a function of the step alone, so a resumed run goes on where it was."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=RankBatches(
                self.rank.recipe, self.objective.num_bundles(), self.rank.rank
            ),
            collate_fn=self.data_collator,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """Sum over this rank's items by the number of items of the whole batch.

        DeepSpeed averages gradients over ranks, hence the factor.

        Raises:
            RuntimeError: Trainer did not count the items of the whole batch.
        """
        if num_items_in_batch is None:
            raise RuntimeError("transformers' Trainer counts no items; use the locked version")
        batch: Batch = inputs["batch"]
        verified = self.rank.verify(batch.groups[0].to(self.rank.device))
        for name, difference in verified.items():
            self._metrics["train"][name].append(difference)
        self.num_items = float(num_items_in_batch)
        loss, sums = self._loss(model, batch, self.num_items / dist.get_world_size())
        for name, value in sums.items():
            self.sums[name] += value.detach().double()
        return loss

    def _loss(
        self, model: Any, batch: Batch, denominator: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        groups = [group.to(self.rank.device) for group in batch.groups]
        moved = Batch(groups, batch.num_items, batch.details)

        def forward(groups: Sequence[GroupTensors]) -> Any:
            return group_logprobs(model, groups, temperature=1.0)

        return self.objective.loss(moved, forward, self.reference_logprobs, denominator)

    def reference_logprobs(self, groups: Sequence[GroupTensors]) -> Any:
        self.rank.engine = self.model_wrapped
        return self.rank.reference_logprobs(groups, temperature=1.0)

    def _over_ranks(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Sums over all ranks, which all have the same names."""
        names = sorted(sums)
        total = torch.tensor([float(sums[n]) for n in names], dtype=torch.float64)
        total = total.to(self.rank.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Sums of all micro-batches and ranks become the step's metrics."""
        own = {name: sum(values) for name, values in self._metrics["train"].items()}
        self._metrics["train"].clear()
        if self.sums:
            own |= self.objective.means(self._over_ranks(self.sums), self.num_items)
            self.sums.clear()
        super().log(logs | own, start_time)

    @torch.no_grad()
    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Held-out loss and metrics of every set, exact over ranks whatever the batches."""
        self.model_wrapped.eval()
        metrics: dict[str, float] = {}
        for name, held_out in self.objective.held_out.items():
            if not held_out:  # no row of the source has an answer
                continue
            sums: dict[str, float] = defaultdict(float)
            shares = self._shares(len(held_out))
            for done, numbers in enumerate(shares):
                self.rank.scoring = f"scoring {name} {done}/{len(shares)}"
                # a rank that has run out keeps the others company, as ZeRO-3 needs, for nothing
                batch = self.objective.collate(numbers or [0], name)
                loss, parts = self._loss(self.model_wrapped, batch, 1.0)
                counted: dict[str, Any] = {"loss": loss, "items": batch.num_items, **parts}
                for key, value in counted.items():
                    sums[key] += float(value) if numbers else 0.0
            total = self._over_ranks(sums)
            items = total.pop("items")
            means = self.objective.means(total, items)
            metrics |= {f"eval_{name}_{key}": value for key, value in means.items()}
        self.rank.scoring = ""
        self.model_wrapped.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _shares(self, num_items: int) -> list[list[int]]:
        """This rank's batches: every item on one rank, equally many (some empty) on all."""
        size = self.args.per_device_train_batch_size
        rank, ranks = self.rank.rank, self.rank.world_size
        mine = list(range(rank, num_items, ranks))
        most = math.ceil(math.ceil(num_items / ranks) / size)
        return [mine[i * size : (i + 1) * size] for i in range(most)]

    # --- checkpoints ------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All ranks write into one folder; rank 0 renames it when everything is there."""
        step = self.state.global_step
        folder = self.checkpoints.partial(step)
        if self.rank.rank == 0:
            self.checkpoints.begin(step)
        dist.barrier()
        self.rank.engine = self.model_wrapped
        self.rank.save(str(folder))
        if self.rank.rank == 0:
            self.state.save_to_json(str(folder / TRAINER_STATE))
        dist.barrier()
        if self.rank.rank == 0:
            self.checkpoints.finish(step, policy_version=1)
        dist.barrier()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Trainer's own, then this rank's optimizer state: weights came with the policy."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            load_rank_state(self.model_wrapped, self._rank_state(resume_from_checkpoint))
            for _ in range(self.state.global_step):  # what accelerate wraps, its own does nothing
                self.model_wrapped.lr_scheduler.step()
        return prepared

    def _init_training_state(self, max_steps: int, *arguments: Any) -> tuple[int, int]:
        """Trainer's own; how often to save and evaluate is the recipe's, not the checkpoint's."""
        found = super()._init_training_state(max_steps, *arguments)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_rng_state(self._rank_state(checkpoint))

    def _rank_state(self, checkpoint: str) -> Path:
        return Path(checkpoint) / "optimizer" / f"rank-{self.rank.rank:05d}.safetensors"

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """posttrain's schedule, the same in every kind of run."""
        if self.lr_scheduler is None:
            recipe = self.rank.recipe
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: lr_factor(recipe, step)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler


class RankBatches(Sampler[list[int]]):
    """What a rank forwards: every step's items dealt out to the ranks, so many at once.

    The whole run is one epoch of Trainer's; `StepOrder` has the real ones.
    """

    def __init__(self, recipe: Recipe, num_items: int, rank: int) -> None:
        training = recipe.training
        self.order = StepOrder(
            num_items, training.prompts_per_step, recipe.seed, recipe.data.shuffle
        )
        self.steps, self.size = training.max_steps, training.per_device_train_batch_size
        self.rank, self.ranks = rank, recipe.learner.num_processes

    def __len__(self) -> int:
        return self.steps * (self.order.per_step // (self.ranks * self.size))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            mine = self.order.step(step)[self.rank :: self.ranks]
            for first in range(0, len(mine), self.size):
                yield mine[first : first + self.size]


class _StopWhenSkipping(TrainerCallback):
    """DeepSpeed leaves the weights alone when gradients are not finite; too often ends the run."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer, self.in_a_row = trainer, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        optimizer = self.trainer.model_wrapped.optimizer
        skipped = bool(getattr(optimizer, "overflow", False))
        self.trainer._metrics["train"]["skipped"] = [float(skipped)]
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        limit = self.trainer.rank.recipe.training.max_skipped_steps
        if self.in_a_row >= limit:
            raise RuntimeError(
                f"step {state.global_step}: gradients not finite for {limit} steps in a row "
                "(training.max_skipped_steps); lower training.learning_rate and resume"
            )


class _Log(TrainerCallback):
    """Keeps what Trainer logs for the controller."""

    def __init__(self, rank: SupervisedRank) -> None:
        self.rank = rank

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        if metrics := renamed(logs or {}, state.global_step, self.rank.recipe):
            self.rank.logs.append((state.global_step, metrics))


NOT_LOGGED = ("epoch", "step", "train_runtime", "train_samples_per_second",
              "train_steps_per_second", "train_loss", "total_flos")  # fmt: skip


def renamed(logs: Mapping[str, Any], step: int, recipe: Recipe) -> dict[str, float]:
    """What Trainer logs, under posttrain's names; the learning rate is the one that was used."""
    metrics = {}
    for name, value in logs.items():
        if name in NOT_LOGGED:
            continue
        if name.startswith("eval_"):
            metrics[f"held_out/{name.removeprefix('eval_')}"] = float(value)
        else:
            own = name.startswith("shared_prefix/")
            metrics[name if own else f"train/{name}"] = float(value)
    if "train/learning_rate" in metrics:
        metrics["train/learning_rate"] = recipe.training.learning_rate * lr_factor(recipe, step - 1)
    return metrics
