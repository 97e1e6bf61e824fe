"""The command line: `fastalign COMMAND`. One documented dataclass per command is its configuration.

`--config FILE` loads values from YAML (a run's config.yaml, say), options after it override them,
and `--print_config` shows what results. Whatever is wrong with the input ends in one line and exit
status 2 (1 for a run that had to stop, 130 for Ctrl-C, 143 for SIGTERM).
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from fastalign.errors import UserError

# command -> (module, dataclass, function); imported only when chosen, so that --help is quick.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("fastalign.quickstart", "QuickstartConfig", "run"),
    "train sft": ("fastalign.train.sft", "SFTConfig", "train"),
    "train reward": ("fastalign.train.reward", "RewardConfig", "train"),
    "train apa": ("fastalign.train.apa", "APAConfig", "train"),
    "train awr": ("fastalign.train.awr", "AWRConfig", "train"),
    "train ppo": ("fastalign.train.ppo", "PPOConfig", "train"),
    "train grpo": ("fastalign.train.grpo", "GRPOConfig", "train"),
    "train mle": ("fastalign.train.mle", "MLEConfig", "train"),
    "train rwr": ("fastalign.train.rwr", "RWRConfig", "train"),
    "train dpo": ("fastalign.train.dpo", "DPOConfig", "train"),
    "generate": ("fastalign.commands.generate", "GenerateConfig", "run"),
    "evaluate": ("fastalign.commands.evaluate", "EvaluateConfig", "run"),
    "bestofn": ("fastalign.commands.bestofn", "BestOfNConfig", "run"),
    "frontier": ("fastalign.commands.frontier", "FrontierConfig", "run"),
    "overoptimise": ("fastalign.commands.overoptimise", "OveroptimiseConfig", "run"),
    "train dt": ("fastalign.train.dt", "DTConfig", "train"),
    "train apa-offline": ("fastalign.train.offline", "OfflineAPAConfig", "train_apa"),
    "train awr-offline": ("fastalign.train.offline", "OfflineAWRConfig", "train_awr"),
    "score": ("fastalign.commands.score", "ScoreConfig", "run"),
    "report": ("fastalign.report.command", "ReportConfig", "run"),
    "laboratory": ("fastalign.laboratory.command", "LaboratoryConfig", "run"),
}
ABOUT = {
    "quickstart": "the whole road on the built-in task: SFT, reward ensemble, APA, report",
    "train sft": "supervised fine-tuning",
    "train reward": "an ensemble of reward heads from preference pairs",
    "train apa": "Advantage-Induced Policy Alignment with a reward",
    "train awr": "advantage-weighted regression on the policy's own samples",
    "train ppo": "proximal policy optimisation; --preset ppo-max",
    "train grpo": "group-relative policy optimisation and its variants, without a critic",
    "train mle": "fine-tuning on the responses with the highest rewards",
    "train rwr": "fine-tuning on all responses, weighted by their rewards",
    "train dpo": "a policy from preferences: DPO and its variants, SimPO, KTO",
    "generate": "a model's answers to prompts, as JSON lines",
    "evaluate": "a model beside a baseline: rewards, win rate, KL, length, diversity",
    "bestofn": "keep the best of N answers, and what every n up to N would give",
    "frontier": "the best reward at every KL to a model, and where runs stand, from its samples",
    "overoptimise": "gold against proxy reward along runs and best-of-n, and where they part",
    "train dt": "return-conditioned fine-tuning: the reward as text in the prompt",
    "train apa-offline": "Advantage-Induced Policy Alignment on given responses with rewards",
    "train awr-offline": "advantage-weighted regression on given responses with rewards",
    "score": "rewards of given responses, as JSON lines",
    "report": "write report.html of a run",
    "laboratory": "every method on a source whose optimum is known, and its regret",
}


def usage() -> str:
    lines = ["usage: fastalign COMMAND [options]      (COMMAND --help shows its options)", ""]
    lines += [f"  {name:14} {ABOUT[name]}" for name in COMMANDS]
    return "\n".join(lines)


def say(message: str) -> None:
    """One line on standard error; of several processes only the main one speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fastalign: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """What is wrong with the command line, in one line, and the end."""
    say(message)
    raise SystemExit(2)


def choose_command(argv: list[str]) -> tuple[str, list[str]]:
    """The command's name and its own arguments."""
    if not argv:
        print(usage(), file=sys.stderr)
        raise SystemExit(2)
    if argv[0] in ("-h", "--help", "help") or argv[:2] in (["train", "-h"], ["train", "--help"]):
        print(usage())
        raise SystemExit(0)
    if argv[0] == "--version":
        from fastalign import __version__

        print(__version__)
        raise SystemExit(0)
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    if argv[0].startswith("-"):
        fail(f"expected a command before {argv[0]} (fastalign --help lists them)")
    name = " ".join(word for word in argv[:2] if not word.startswith("-"))
    if name == "train":
        methods = [c.split()[1] for c in COMMANDS if c.startswith("train ")]
        fail(f"train: expected one of {', '.join(methods)}")
    near = difflib.get_close_matches(name, [*COMMANDS, "train"], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    fail(f"unknown command {name!r}{hint} (fastalign --help lists them)")


def parse(name: str, config_class: type, argv: list[str]) -> Any:
    """The command's configuration from defaults, --config and options."""
    from jsonargparse import ActionYesNo, ArgumentParser, set_parsing_settings

    from fastalign import help_page

    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            fail(f"{name}: {explain(name, message, options)}")

    parser = Parser(
        prog=f"fastalign {name}",
        description=(config_class.__doc__ or "").strip(),
        allow_abbrev=False,  # --beta is not --beta2
        formatter_class=help_page.Formatter,
    )
    fields = set(config_class.__dataclass_fields__)  # type: ignore[attr-defined]
    apart = {"overwrite", "resume"} & fields
    parser.add_class_arguments(config_class, as_positional=True, skip=apart)
    parser.add_argument("--config", action="config", help="YAML file of values for these options.")
    if "overwrite" in apart:
        parser.add_argument(
            "--overwrite",
            action=ActionYesNo,
            default=False,
            help="Delete what a former run left in the output folder.",
        )
    if "resume" in apart:
        parser.add_argument(
            "--resume",
            nargs="?",
            const="auto",
            default=None,
            help="Go on from the output folder's newest intact checkpoint, or from a given one.",
        )
    help_page.arrange(parser, config_class)
    options = [o for action in parser._actions for o in action.option_strings]
    argv = joined(argv)
    try:
        if any(word.startswith("--resume") for word in argv):
            # A run goes on as it began: its own configuration, where no option says otherwise.
            asked = parser.parse_args([w for w in argv if not w.startswith("--print_config")])
            own = run_folder(asked) / "config.yaml"
            if own.is_file() and asked.config is None:
                check_config(name, own, fields)
                argv = ["--config", str(own), *argv]
        values = parser.parse_args(argv)
        values.pop("config", None)
        return config_class(**parser.instantiate(values).as_dict())
    except UserError as error:
        fail(f"{name}: {error}")
    except UnicodeDecodeError:
        fail(f"{name}: --config: not UTF-8 text")


def joined(argv: list[str]) -> list[str]:
    """`--lr -1e-5` as `--lr=-1e-5`: argparse would take the number for an option. No option begins
    with a digit."""
    words: list[str] = []
    for word in argv:
        last = words[-1] if words else ""
        if re.match(r"-[\d.]", word) and last.startswith("--") and "=" not in last:
            words[-1] = f"{last}={word}"
        else:
            words.append(word)
    return words


def run_folder(values: Any) -> Path:
    """The folder of the run that --resume speaks of: a checkpoint's, or the output folder."""
    if values.resume in (None, "auto"):
        return Path(values.output)
    return Path(values.resume).parent.parent


def check_config(name: str, file: Path, fields: set[str]) -> None:
    """UserError where the configuration of a run to be resumed is another command's."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return  # what is wrong with it is said where it is parsed
    strange = [key for key in found if key not in fields] if isinstance(found, dict) else []
    if strange:
        raise UserError(
            f"--resume: {file.parent} is not a run of {name}, which has no option "
            f"--{strange[0]} ({file} has)"
        )


def explain(name: str, message: str, options: list[str]) -> str:
    """jsonargparse's message in one line, in our words where the mistake is a common one."""
    text = " ".join(message.split())
    for pattern in (
        r"nrecognized arguments: (--?[A-Za-z][\w.]*)",
        r"(?:Group '(\w+)' does not accept o|O)ption '([\w.]+)'",
    ):
        unknown = re.search(pattern, text)
        if unknown:
            from fastalign import unknown_option

            word = ".".join(part for part in unknown.groups() if part)
            word = word if word.startswith("-") else f"--{word}"
            return unknown_option.told(word, options, fields_of_others(name))
    key = re.search(r'Parser key "([\w.]+)"', text)
    types = re.findall(r"Expected a <class '(\w+)'>", text)
    value = re.search(r"(?:Got|Given) value: (.*)$", text)
    if key and types and value:
        expected = " or ".join(name for name in types if name != "NoneType")
        return f"--{key[1]}: expected {expected}, got {value[1]!r}"
    missing = re.search(r"^argument (--[\w.]+): expected one argument$", text)
    if missing:
        return f"{missing[1]}: expected a value"
    return re.sub(r'^Parser key "config": ', "--config: ", text)


def fields_of_others(name: str) -> dict[str, set[str]]:
    """The options of all commands but this one, without those inside of groups."""
    return {
        other: set(getattr(import_module(module), config_class).__dataclass_fields__)
        for other, (module, config_class, _) in COMMANDS.items()
        if other != name
    }


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `fastalign` command."""
    name, rest = choose_command(sys.argv[1:] if argv is None else argv)
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1" and not name.startswith("train "):
        fail(f"{name} runs in one process, not in {size}: start it without torchrun")
    module, config_name, function_name = COMMANDS[name]
    loaded = import_module(module)
    config = parse(name, getattr(loaded, config_name), rest)
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    is_main = os.environ.get("RANK", "0") == "0"
    logging.getLogger("fastalign").setLevel(logging.INFO if is_main else logging.ERROR)
    run_command(name, getattr(loaded, function_name), config)


def run_command(name: str, function: Callable[[Any], Any], config: Any) -> None:
    """Runs it; turns what users can mend into one line. What they cannot keeps its traceback."""
    from fastalign.train.distributed import finish
    from fastalign.train.run import Interrupted, Stopped

    status = 0
    try:
        function(config)
        if name.startswith("train ") and os.environ.get("RANK", "0") == "0":
            from fastalign.report.command import conclude

            logging.getLogger("fastalign").info("report: %s", conclude(Path(config.output)))
    except Interrupted as stop:
        status = 128 + stop.number
        say(f"{name}: {stop}")
    except KeyboardInterrupt:
        status = 130
        say(f"{name}: stopped at once; the last checkpoint stays")
    except UserError as error:
        status = 1 if isinstance(error, Stopped) else 2
        say(f"{name}: {str(error).removeprefix(f'{name}: ')}")
    except OSError as error:
        status = 1
        place = f": {error.filename}" if error.filename else ""
        say(f"{name}: {error.strerror or error}{place}")
    finish(status)
    if status:
        raise SystemExit(status)


def quiet_libraries() -> None:
    """Progress bars and notices of libraries would tear our own apart; nothing phones home."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
