"""Over-optimisation on the built-in task: gold against proxy for heads, models and statistics.

    python -m benchmarks.over_optimisation --out runs/over-optimisation --seeds 1 --processes 2

Few preference pairs with many labels turned round make a reward that GRPO without a KL penalty soon
outgrows. Of each seed: a reward model of several heads on one encoder, as many models of one head;
a run of GRPO for one model alone and for each source and statistic; best-of-n of the SFT model's
answers under both sources. `fastalign overoptimise` then reads the folder. What is done already is
kept: called again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastalign.data.synthetic import SyntheticTask, write_jsonl

STATISTICS = ("mean", "min", "lcb", "uwo")
Command = list[str]


def options(**given: object) -> list[str]:
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def sft(out: Path) -> Command:
    return ["train", "sft"] + options(
        output=out / "sft",
        model="scratch:1m",
        limit=8000,
        epochs=2,
        batch_tokens=1024,
        max_length=256,
        lr=2e-3,
        eval_every=100,
    )


def reward(out: Path, name: str, seed: int, heads: int) -> Command:
    """A reward model on the seed's pairs, `out` being the seed's folder."""
    return ["train", "reward"] + options(
        output=out / name,
        model=out.parent / "sft" / "model",
        data=out / "pairs.jsonl",
        eval_data=out / "held_out.jsonl",
        heads=heads,
        batch_tokens=1536,
        max_length=256,
        lr=7e-4,
        eval_every=50,
        seed=seed,
    )


def policy(out: Path, name: str, source: str, statistic: str, seed: int, steps: int) -> Command:
    return ["train", "grpo", "--sampling.max_new_tokens", "64"] + options(
        output=out / name,
        policy=out.parent / "sft" / "model",
        reward=source,
        statistic=statistic,
        gold="gold",
        steps=steps,
        prompts_per_step=16,
        samples_per_prompt=4,
        epochs=1,
        batch_tokens=2048,
        lr=5e-4,
        eval_limit=32,
        eval_samples=2,
        seed=seed,
    )


def best_of_n(out: Path, name: str, source: str, seed: int, n: int) -> Command:
    return ["bestofn", "--sampling.max_new_tokens", "64"] + options(
        output=out / name,
        policy=out.parent / "sft" / "model",
        reward=source,
        gold="gold",
        prompts="synthetic",
        limit=32,
        n=n,
        seed=seed,
    )


def run(command: Command) -> None:
    """`fastalign COMMAND`, unless its results are there.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    folder = Path(command[command.index("--output") + 1])
    if (folder / "model").is_dir() or (folder / "curve.json").is_file():
        return
    print(" ".join(["fastalign", *command]), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", *command, "--overwrite"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{folder} failed: {done.stderr.strip()[-2000:]}")


def stages(out: Path, seeds: int, models: int, steps: int, n: int) -> list[list[Command]]:
    """What can run side by side, stage after stage."""
    found: list[list[Command]] = [[sft(out)], [], []]
    for seed in range(seeds):
        here = out / f"seed-{seed}"
        found[1].append(reward(here, "heads", seed, models))
        found[1] += [reward(here, f"model-{k}", 100 * seed + k, 1) for k in range(models)]
        single = str(here / "model-0" / "model")
        sources = {
            "heads": str(here / "heads" / "model"),
            "models": "+".join(str(here / f"model-{k}" / "model") for k in range(models)),
        }
        found[2] += [best_of_n(here, f"bestofn-{k}", s, seed, n) for k, s in sources.items()]
        found[2].append(policy(here, "grpo-single", single, "mean", seed, steps))
        found[2] += [
            policy(here, f"grpo-{name}-{statistic}", source, statistic, seed, steps)
            for statistic in STATISTICS
            for name, source in sources.items()
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/over-optimisation"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--models", type=int, default=4, help="heads, and models of one head")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--label_noise", type=float, default=0.15, help="share turned round")
    parser.add_argument("--steps", type=int, default=40, help="rounds of GRPO")
    parser.add_argument("--n", type=int, default=64, help="answers to a prompt, of best-of-n")
    parser.add_argument("--processes", type=int, default=1, help="commands side by side")
    args = parser.parse_args()
    for seed in range(args.seeds):
        here = args.out / f"seed-{seed}"
        here.mkdir(parents=True, exist_ok=True)
        noisy = SyntheticTask(seed=seed, label_noise=args.label_noise)
        write_jsonl(noisy.preferences(args.pairs), here / "pairs.jsonl")
        true = SyntheticTask(seed=seed, label_noise=0.0)
        write_jsonl(true.preferences(300, "test"), here / "held_out.jsonl")
    with ThreadPoolExecutor(args.processes) as pool:
        for stage in stages(args.out, args.seeds, args.models, args.steps, args.n):
            list(pool.map(run, stage))
    command = ["overoptimise", str(args.out), "--output", str(args.out / "overoptimise")]
    subprocess.run([sys.executable, "-m", "fastalign", *command, "--overwrite"], check=True)


if __name__ == "__main__":
    main()
