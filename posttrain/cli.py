"""`posttrain`: check, run, data, eval, compare, report, publish, score, parity, doctor, nano.

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

from posttrain.types import GateFailed

SUITE_NAMES = (
    "grounding", "choice", "speech", "translation", "long_audio", "refusal", "robustness"
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = _parse(parser, argv)
    level = os.environ.get("POSTTRAIN_LOG_LEVEL", "WARNING")
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    try:
        return int(args.command(args) or 0)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except GateFailed as error:
        print(f"gate: {error}", file=sys.stderr)
        return 3
    except RuntimeError as error:
        logging.getLogger("posttrain").debug("traceback", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere, also behind options, where argparse itself takes none."""
    args, left = parser.parse_known_args(argv)
    strangers = [a for a in left if a.startswith("-") or "=" not in a or "overrides" not in args]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if left:
        args.overrides = [*args.overrides, *left]
    return args


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
    teacher = nano_commands.add_parser("teacher", help="train it for longer, as a teacher")
    teacher.add_argument("--base", type=Path, default=Path("checkpoints/af-next-nano"))
    teacher.add_argument("--out", type=Path, required=True)
    teacher.add_argument("--steps", type=int, default=400)
    teacher.add_argument("--seed", type=int, default=0)
    teacher.set_defaults(command=_nano_teacher)
    card = nano_commands.add_parser("card", help="score a nano checkpoint and write its card")
    card.add_argument("checkpoint", type=Path)
    card.set_defaults(command=_nano_card)

    _add_data_commands(commands)
    _add_eval_commands(commands)
    _add_report_command(commands)
    _add_publish_commands(commands)

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


def _add_eval_commands(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("eval", help="a suite's scores of a model, with intervals")
    evaluate.add_argument("suite", choices=SUITE_NAMES)
    evaluate.add_argument("--model", required=True, help="checkpoint, Hub id, or run folder")
    evaluate.add_argument("--data", type=Path, required=True, metavar="FOLDER_OR_ROWS",
                          help="folder as its owners publish it, or ROWS.jsonl")  # fmt: skip
    evaluate.add_argument("--out", type=Path, default=None, help="default: evals/SUITE-MODEL")
    evaluate.add_argument("--layout", default=None, help="of the folder, where it is not evident")
    evaluate.add_argument("--language", default=None, help="of the speech, as the set writes it")
    evaluate.add_argument("--target", default=None, help="language to translate into")
    evaluate.add_argument("--split", default=None)
    evaluate.add_argument("--limit", type=int, default=None, metavar="N", help="first N rows only")
    evaluate.add_argument("--max-tokens", type=int, default=None, help="of an answer")
    evaluate.add_argument("--temperature", type=float, default=0.0)
    evaluate.add_argument("--instruction", default="", help="added to every question")
    evaluate.add_argument("--judge", default=None, metavar="URL", help="OpenAI-compatible endpoint")
    evaluate.add_argument("--judge-model", default=None, metavar="NAME")
    evaluate.add_argument("--chunk-rows", type=int, default=256, help="asked for and kept together")
    evaluate.add_argument("--json", action="store_true", help="print the scores as JSON")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="as in recipes")
    evaluate.set_defaults(command=_eval)

    compare = commands.add_parser("compare", help="paired differences of two evaluations")
    compare.add_argument("a", type=Path, metavar="EVAL_A")
    compare.add_argument("b", type=Path, metavar="EVAL_B")
    compare.add_argument("--json", action="store_true")
    compare.set_defaults(command=_compare)


def _add_publish_commands(commands: argparse._SubParsersAction) -> None:
    publish = commands.add_parser("publish", help="write, prove and upload a trained model")
    publish.add_argument("source", metavar="CKPT_OR_RUN")
    publish.add_argument("--out", type=Path, required=True, metavar="DIR")
    publish.add_argument("--override", default="", metavar="REASON",
                         help="publish though gates failed; goes on the card")  # fmt: skip
    publish.add_argument("--adapter", action="store_true", help="the LoRA adapter, not merged")
    publish.add_argument("--license", default=None, metavar="ID", help="where the base names none")
    publish.add_argument("--clip", type=Path, default=None, help="recording to prove it on")
    publish.add_argument("--eval", type=Path, action="append", default=[], metavar="EVAL",
                         help="scores for the card; may be repeated")  # fmt: skip
    publish.add_argument("--clips-s", type=float, nargs="+", default=None, help="for parity")
    publish.add_argument("--push", default=None, metavar="ORG/NAME", help="upload to the Hub")
    publish.add_argument("--public", action="store_true", help="with --push; private otherwise")
    publish.add_argument("--dry-run", action="store_true", help="with --push: list the files only")
    publish.set_defaults(command=_publish)


def _add_report_command(commands: argparse._SubParsersAction) -> None:
    report = commands.add_parser("report", help="one HTML file to look at and listen to")
    report.add_argument("source", type=Path, metavar="RUN_OR_EVAL")
    report.add_argument("--out", type=Path, default=None, help="default: report.html in the folder")
    report.add_argument("--limit", type=int, default=1000, help="answers to browse, at most")
    report.add_argument("--audio-mib", type=float, default=12.0, help="embedded; links beyond it")
    report.set_defaults(command=_report)


def _add_data_commands(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser("data", help="look at rows, check them, select from them")
    actions = data.add_subparsers(required=True, metavar="ACTION")
    for name, help_, command in (
        ("check", "validate a file of rows: audio, durations, events, duplicates", _data_check),
        ("stats", "hours, languages, tasks, lengths", _data_stats),
    ):
        action = actions.add_parser(name, help=help_)
        action.add_argument("rows", type=Path)
        action.add_argument("--json", action="store_true", help="print one JSON object")
        action.set_defaults(command=command)
    select = actions.add_parser("select", help="keep rows that a model gets right sometimes")
    select.add_argument("rows", type=Path)
    select.add_argument("--model", required=True, help="checkpoint to ask: a folder or a Hub id")
    select.add_argument("--pass-rate", default="0.375..0.75", metavar="LOW..HIGH",
                        help="share of samples that must be right")  # fmt: skip
    select.add_argument("--out", type=Path, required=True, metavar="KEPT.jsonl")
    select.add_argument("--samples", type=int, default=8)
    select.add_argument("--blind-share", type=float, default=0.5,
                        help="drop rows where more answers to silence are right")  # fmt: skip
    select.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key=value",
                        help="of a recipe, such as rollout.num_workers=4")  # fmt: skip
    select.set_defaults(command=_data_select)


def _data_check(args: argparse.Namespace) -> int:
    from posttrain.inspect_rows import check_rows, print_findings

    findings = check_rows(args.rows)
    if args.json:
        print(json.dumps(findings.to_json(), ensure_ascii=False))
        return 1 if findings.problems else 0
    return print_findings(args.rows, findings)


def _data_stats(args: argparse.Namespace) -> None:
    from posttrain.data.rows import read_rows
    from posttrain.inspect_rows import row_statistics, statistics_lines

    facts = row_statistics(read_rows(args.rows))
    lines = [json.dumps(facts, ensure_ascii=False)] if args.json else statistics_lines(facts)
    print("\n".join(lines))


def _data_select(args: argparse.Namespace) -> None:
    from posttrain.config import engine_recipe
    from posttrain.select_rows import pass_rate_range, select_rows

    limits = pass_rate_range(args.pass_rate)
    recipe = engine_recipe(args.model, args.overrides)
    counts = select_rows(
        args.rows, args.out, recipe, limits, samples=args.samples, blind_share=args.blind_share
    )
    print(f"{counts['kept']} of {counts['rows']} rows -> {args.out}")
    for reason, count in counts["left_out"].items():
        print(f"  {count} left out: {reason}")


def _eval(args: argparse.Namespace) -> None:
    from posttrain.eval_suite import asking_recipe, evaluate_suite, show
    from posttrain.evaluate.judge import Judge
    from posttrain.evaluate.suites import Source

    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("--judge URL and --judge-model NAME belong together; give both or none")
    name = Path(args.model.rstrip("/")).name
    out = args.out or Path("evals") / f"{args.suite}-{name}"
    source = Source(
        args.data, args.layout, args.language, args.target, args.split, out.absolute() / "audio"
    )
    scores = evaluate_suite(
        args.suite, asking_recipe(args.model, args.overrides), source, out,
        max_tokens=args.max_tokens, temperature=args.temperature, instruction=args.instruction,
        judge=Judge(args.judge, args.judge_model) if args.judge else None, limit=args.limit,
        chunk_rows=args.chunk_rows,
    )  # fmt: skip
    if args.json:
        print(json.dumps(scores, ensure_ascii=False))
    else:
        show(scores, out)


def _compare(args: argparse.Namespace) -> None:
    from posttrain.compare_evals import compare_evaluations, show

    result = compare_evaluations(args.a, args.b)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        show(result)


def _report(args: argparse.Namespace) -> None:
    from posttrain.report.report import write_report

    print(write_report(args.source, args.out, limit=args.limit, audio_mib=args.audio_mib))


def _publish(args: argparse.Namespace) -> None:
    from posttrain.publish.publish import PublishOptions, publish
    from posttrain.publish.push import check_whole, files_of, push
    from posttrain.rollout.parity import DEFAULT_CLIPS_S

    clips_s = tuple(args.clips_s) if args.clips_s else DEFAULT_CLIPS_S
    options = PublishOptions(
        args.override, args.license, args.adapter, args.clip, args.eval, clips_s
    )
    if args.push and args.out.exists():
        check_whole(args.out, args.source, adapter=args.adapter)  # push it as it is
    else:
        print(f"published: {publish(args.source, args.out, options)}")
    if args.push and args.dry_run:
        for name, size in files_of(args.out):
            print(f"{size:>14,}  {name}")
        print(f"would go to {args.push}, {'public' if args.public else 'private'}")
    elif args.push:
        print(f"pushed: {push(args.out, args.push, public=args.public)}")


def _check(args: argparse.Namespace) -> None:
    from posttrain.config import load_recipe, to_yaml

    print(to_yaml(load_recipe(args.recipe, args.overrides)), end="")


def _run(args: argparse.Namespace) -> None:
    from posttrain.config import load_recipe
    from posttrain.train.kinds import run_recipe

    print(f"run folder: {run_recipe(load_recipe(args.recipe, args.overrides))}")


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


def _nano_teacher(args: argparse.Namespace) -> None:
    from posttrain.train.nano_pretrain import train_teacher

    train_teacher(args.base, args.out, args.steps, args.seed)
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
