"""`posttrain`: check, run, score, doctor, schema, nano, parity.

Heavy imports wait for their command.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    level = os.environ.get("POSTTRAIN_LOG_LEVEL", "WARNING")
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(args.command(args) or 0)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        logging.getLogger("posttrain").debug("traceback", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="posttrain", description="Post-training for Audio Flamingo Next."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="print the resolved recipe, or what is wrong with it")
    check.add_argument("recipe", type=Path)
    check.add_argument("overrides", nargs="*", metavar="key=value")
    check.set_defaults(command=_check)

    run = commands.add_parser("run", help="run a recipe by its kind")
    run.add_argument("recipe", type=Path)
    run.add_argument("overrides", nargs="*", metavar="key=value")
    run.set_defaults(command=_run)

    doctor = commands.add_parser("doctor", help="what is installed, and what to do about the rest")
    doctor.set_defaults(command=_doctor)

    schema = commands.add_parser("schema", help="write the JSON Schema of recipes")
    schema.add_argument("--out", type=Path, default=Path("recipes/schema.json"))
    schema.set_defaults(command=_schema)

    nano = commands.add_parser("nano", help="the small checkpoint of AF-Next's architecture")
    nano_commands = nano.add_subparsers(required=True, metavar="ACTION")
    build = nano_commands.add_parser("build", help="create and pretrain it (about an hour)")
    build.add_argument("--out", type=Path, default=Path("checkpoints/af-next-nano"))
    build.add_argument("--seed", type=int, default=0)
    build.set_defaults(command=_nano_build)
    card = nano_commands.add_parser("card", help="score a nano checkpoint and write its card")
    card.add_argument("checkpoint", type=Path)
    card.set_defaults(command=_nano_card)

    score = commands.add_parser("score", help="score a model's outputs offline")
    score.add_argument("--reward", required=True, metavar="NAME[,NAME...]",
                       help="names, or package.module:function of your own")  # fmt: skip
    score.add_argument("--in", dest="source", type=Path, required=True, metavar="ROWS.jsonl")
    score.add_argument("--out", type=Path, required=True, metavar="SCORED.jsonl")
    score.add_argument("--prior", type=Path, default=None, help="prior.json of a run")
    score.add_argument("--packed", choices=("refuse", "accept"), default="refuse")
    score.add_argument("--head", type=Path, default=None,
                       help="folder of a learned reward, for audio_text_grounding")  # fmt: skip
    score.add_argument("--checkpoint", default=None,
                       help="for audio_text_grounding and evidence_ablation")  # fmt: skip
    score.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    score.set_defaults(command=_score)

    parity = commands.add_parser("parity", help="compare vLLM with transformers on a checkpoint")
    parity.add_argument("checkpoint")
    parity.add_argument("--json", action="store_true", help="print one JSON object")
    parity.add_argument("--tolerance", type=float, default=None)
    parity.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parity.add_argument("--clips-s", type=float, nargs="+", default=None)
    parity.set_defaults(command=_parity)
    return parser


def _check(args: argparse.Namespace) -> None:
    from posttrain.config import load_recipe, to_yaml

    print(to_yaml(load_recipe(args.recipe, args.overrides)), end="")


def _run(args: argparse.Namespace) -> None:
    from posttrain.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.kind == "reward":
        from posttrain.train.reward_grounding import train_reward as train
    else:
        from posttrain.train.grpo import train

    folder = train(recipe)
    print(f"run folder: {folder}")


def _doctor(args: argparse.Namespace) -> int:
    from posttrain.doctor import examine, print_findings

    return print_findings(examine())


def _schema(args: argparse.Namespace) -> None:
    from posttrain.config import write_json_schema

    write_json_schema(args.out)
    print(args.out)


def _nano_build(args: argparse.Namespace) -> None:
    from posttrain.train.nano_pretrain import PretrainSettings, build_nano

    args.out.mkdir(parents=True, exist_ok=True)
    build_nano(args.out, PretrainSettings(seed=args.seed), args.out / "pretraining.jsonl")
    print(args.out)


def _nano_card(args: argparse.Namespace) -> None:
    from posttrain.train.nano_card import write_card

    print(write_card(args.checkpoint))


def _score(args: argparse.Namespace) -> int:
    from posttrain.score import score_command

    return score_command(
        args.reward.split(","), args.source, args.out, prior=args.prior, packed=args.packed,
        head=args.head, checkpoint=args.checkpoint, as_json=args.json,
    )  # fmt: skip


def _parity(args: argparse.Namespace) -> int:
    from posttrain.rollout.parity import DEFAULT_CLIPS_S, measure_parity

    report = measure_parity(
        args.checkpoint, clips_s=args.clips_s or DEFAULT_CLIPS_S, dtype=args.dtype,
        tolerance=args.tolerance,
    )  # fmt: skip
    print(json.dumps(report.to_json()) if args.json else report.to_text())
    return 0 if report.within_tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
