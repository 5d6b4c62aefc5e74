"""Completions scored a second on one core, and memory over a long file; one run, one JSON object.

    python -m benchmarks.reward_speed
    python -m benchmarks.reward_speed --rows 100000 1000000      (memory; half an hour)

Speed: all rule rewards on completions of 450 words, once with tagged times and once in prose;
medians of several rounds. Memory: `posttrain score` on streamed files of two lengths, each in a
process of its own; the figure is the difference of their peaks.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from posttrain.data.rows import Event, Row
from posttrain.types import Completion, Task
from reward_models.registry import RewardSpec, build_rewards
from reward_models.timestamps import parse_spans

RULES = ("timestamp_grounding", "chain_grounding", "format", "length_band", "repetition")
LABELS = ("a dog barking", "a door closing", "rain", "a woman speaking", "a car horn", "footsteps")
FILLER = (
    "The sound is fairly close to the microphone and stays at about the same level for a while.",
    "There is some noise in the background, which makes the quieter parts difficult to follow.",
    "Nothing else seems to happen in this part, so I keep listening for the next change.",
)


def example(rng: random.Random, tagged: bool) -> tuple[Row, Completion]:
    """A clip of two minutes with eight events, and a completion of 450 words about it."""
    events = []
    for i in range(8):
        start_s = 14 * i + rng.uniform(0, 8)
        events.append(Event(start_s, start_s + rng.uniform(1, 6), rng.choice(LABELS)))
    thought: list[str] = []
    for event in events:
        if tagged:
            thought.append(f"I hear {event.label} <t>{event.start_s:.1f}-{event.end_s:.1f}</t>.")
        else:
            thought.append(
                f"I hear {event.label} from {event.start_s:.1f} to {event.end_s:.1f} seconds."
            )
        thought += rng.choices(FILLER, k=3)
    words = " ".join(thought).split()[:440]
    answer = f"{events[0].label} at <t>{events[0].start_s:.1f}-{events[0].end_s:.1f}</t>"
    text = f"<think>{' '.join(words)}</think> {answer}"
    prompt = ({"role": "user", "content": f"When is {events[0].label} heard?"},)
    row = Row("r", prompt, "a.wav", 120.0, Task.GROUNDING, tuple(events), events[0].label)
    return row, Completion((), (), text, "stop", 0)


def speed(tagged: bool, count: int, rounds: int) -> dict[str, float]:
    """Completions a second: all rules, and reading the times alone."""
    rng = random.Random(0)
    reward = build_rewards({name: RewardSpec() for name in RULES})
    all_rules, parsing = [], []
    for _ in range(rounds):
        items = [example(rng, tagged) for _ in range(count)]
        started = time.process_time()
        for row, completion in items:
            reward(row, completion)
        all_rules.append(count / (time.process_time() - started))
        items = [example(rng, tagged) for _ in range(count)]
        started = time.process_time()
        for row, completion in items:
            parse_spans(completion.text, row.duration_s)
        parsing.append(count / (time.process_time() - started))
    rules, parse = statistics.median(all_rules), statistics.median(parsing)
    words = len(items[0][1].text.split())
    return {"words": words, "per_s": rules, "parse_only_per_s": parse, "parse_share": rules / parse}


def write_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    with path.open("w") as out:
        for i in range(count):
            start = rng.uniform(0, 50)
            record = {
                "id": str(i), "completion": f"<t>{start:.2f}-{start + 3:.2f}</t>",
                "duration_s": 60.0, "question": "When?", "answer": "", "task": "grounding",
                "events": [{"start_s": start, "end_s": start + rng.uniform(1, 5), "label": "x"}],
            }  # fmt: skip
            out.write(json.dumps(record) + "\n")


PEAK = (
    "import resource, sys\n"
    "from posttrain.cli import main\n"
    "code = main(sys.argv[1:])\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)\n"
    "sys.exit(code)\n"
)


def peak_mib(count: int, folder: Path) -> float:
    """Peak memory of `posttrain score` over `count` rows, MiB."""
    rows, out = folder / f"{count}.jsonl", folder / f"{count}.scored.jsonl"
    write_rows(rows, count)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "score", "--reward", "timestamp_grounding,format", "--in",
         str(rows), "--out", str(out), "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    with out.open("rb") as lines:
        assert sum(1 for _ in lines) == count
    rows.unlink()
    out.unlink()
    return float(done.stderr.strip().splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=400, help="completions a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs=2, default=None, metavar=("FEW", "MANY"))
    args = parser.parse_args(argv)
    report: dict[str, object] = {
        "tagged": speed(True, args.count, args.rounds),
        "prose": speed(False, args.count, args.rounds),
    }
    if args.rows:
        with tempfile.TemporaryDirectory() as folder:
            few, many = (peak_mib(count, Path(folder)) for count in args.rows)
        report["memory"] = {
            "rows": args.rows, "peak_mib": [few, many], "growth_mib": many - few,
        }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
