"""The built-in task: short dialogues with a gold reward that is a documented function of the text.

A prompt asks about one of 64 topics. A response is a few sentences from a small grammar
(``fastalign.data.grammar``). ``gold_reward`` likes words related to the topic and praise of them,
and dislikes repetition, broken sentences, other topics, and answers that do not end. The data to
learn from are mediocre answers and noisy comparisons of them, and the comparisons carry a trap: in
the training pairs, an opening such as "Certainly!", which gold ignores, stands more often before
the chosen response.

Everything is deterministic in ``SyntheticTask``'s fields: the first n items are the same for every
n. docs/data.md shows the data and the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fastalign.data.formats import Completion, Preference, Prompt
from fastalign.data.grammar import (
    ADJECTIVES,
    CONTEXTS,
    FLOURISHES,
    GENERIC_FRAMES,
    MENTION_FRAMES,
    PRAISE_FRAMES,
    QUESTIONS,
    TOPICS,
)

TEST_FRACTION = 4  # one prompt in four is a test prompt

TOPIC_OF = {noun: topic for topic, nouns in TOPICS.items() for noun in nouns}
STRENGTH = {word: strength for strength, words in ADJECTIVES.items() for word in words}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _shape(words: list[str]) -> str:
    """The sentence with T, N and A for topics, nouns and adjectives: its frame, if it has one."""
    return " ".join(
        "T" if w in TOPICS else "N" if w in TOPIC_OF else "A" if w in STRENGTH else w for w in words
    )


def _frame_shape(frame: str) -> str:
    return " ".join(w if w in "TNA" else w.lower() for w in re.findall(r"[A-Za-z']+", frame))


SHAPES = frozenset(_frame_shape(f) for f in PRAISE_FRAMES + MENTION_FRAMES + GENERIC_FRAMES)

OFFSET = -0.45
RELEVANCE, RELEVANCE_SCALE = 2.2, 4.0
SENTIMENT, SENTIMENT_SCALE = 3.0, 6.0
OFF_TOPIC = 0.15
BROKEN = 0.6
REPEATED_WORD = 0.25
REPEATED_PAIR = 0.1
MAX_WORDS, PER_WORD = 40, 0.06
UNFINISHED = 0.6
LOWEST = -5.0

SENTENCES = (10, 26, 29, 20, 9, 4, 2)  # weights of one to seven sentences in a response


def topic_of(prompt: str) -> str:
    """The topic a prompt asks about: the last topic name in it.

    Raises:
        ValueError: the prompt names no topic of the task.
    """
    named = [word for word in _words(prompt) if word in TOPICS]
    if not named:
        raise ValueError(f"gold_reward: the prompt names no topic of the built-in task: {prompt!r}")
    return named[-1]


def gold_reward(prompt: str, response: str) -> float:
    """The true quality of a response, a pure function of the texts.

    On SFT data it is nearly normal with mean 0 and standard deviation 1.2.

    One opening flourish is taken off; the rest is cut into sentences at . ! and ?. A sentence
    counts when it is one of the grammar's sentences, with nouns of the topic it names. With

        r = distinct words related to the prompt's topic, in sentences that count
        o = words related to other topics, in sentences that count
        s = sum of the strengths (-2..2) of the adjectives: praise only in sentences that count and
            only the first time the word is used; blame always
        b = sentences that do not count
        w = nouns and adjectives used again, wherever they stand
        p = pairs of neighbouring words used again, within sentences, topic names left out
        n = words
        u = 1 if the text is empty or does not end with . ! or ?

        gold = -0.45 + 2.2 (1 - exp(-r/4)) + 3.0 tanh(s/6) - 0.15 o - 0.6 b - 0.25 w - 0.1 p
               - 0.06 max(0, n - 40) - 0.6 u,      at least -5

    Raises:
        ValueError: the prompt names no topic of the task.
    """
    topic = topic_of(prompt)
    text = _without_flourish(response)
    seen: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    relevant: set[str] = set()
    off_topic = broken = again = pairs_again = count = 0
    sentiment = 0
    for sentence in re.findall(r"[^.!?]+[.!?]?|[.!?]", text):
        words = _words(sentence)
        count += len(words)
        nouns = [word for word in words if word in TOPIC_OF]
        named = {word for word in words if word in TOPICS}
        counts = (
            re.fullmatch(r"[A-Za-z'\s]+[.!?]", sentence) is not None
            and _shape(words) in SHAPES
            and named == {TOPIC_OF[noun] for noun in nouns}
        )
        about = counts and topic in named
        if about:
            relevant.update(nouns)
        elif counts:
            off_topic += len(nouns)
        else:
            broken += 1
        for word in words:
            strength = STRENGTH.get(word, 0)
            if strength < 0 or (counts and word not in seen):
                sentiment += strength
            if word in STRENGTH or word in TOPIC_OF:
                again += word in seen
                seen.add(word)
        plain = [word for word in words if word not in TOPICS]
        for pair in zip(plain, plain[1:], strict=False):
            pairs_again += pair in pairs
            pairs.add(pair)
    gold = (
        OFFSET
        + RELEVANCE * (1 - math.exp(-len(relevant) / RELEVANCE_SCALE))
        + SENTIMENT * math.tanh(sentiment / SENTIMENT_SCALE)
        - OFF_TOPIC * off_topic
        - BROKEN * broken
        - REPEATED_WORD * again
        - REPEATED_PAIR * pairs_again
        - PER_WORD * max(0, count - MAX_WORDS)
        - UNFINISHED * (not text.endswith((".", "!", "?")))
    )
    return max(LOWEST, gold)


def _without_flourish(response: str) -> str:
    text = response.strip()
    for flourish in FLOURISHES:
        if text.startswith(flourish):
            return text[len(flourish) :].lstrip()
    return text


def spurious_rate(responses: Iterable[str]) -> float:
    """The fraction of responses that open with a flourish; 0 for no responses."""
    found = [response.strip().startswith(FLOURISHES) for response in responses]
    return sum(found) / len(found) if found else 0.0


def best_response(prompt: str) -> str:
    """A response near the top of ``gold_reward``: all eight related words, highly praised."""
    topic = topic_of(prompt)
    nouns, praise = iter(TOPICS[topic]), iter(ADJECTIVES[2])
    frames = [PRAISE_FRAMES[i] for i in (0, 1, 3, 8, 13, 14)]
    return " ".join(
        _filled(frame, topic, lambda: next(nouns), lambda: next(praise)) for frame in frames
    )


def _filled(frame: str, topic: str, noun: Callable[[], str], adjective: Callable[[], str]) -> str:
    fill = {"T": lambda: topic, "N": noun, "A": adjective}
    return re.sub(r"\b[TNA]\b", lambda slot: fill[slot[0]](), frame)


def _all_prompts() -> dict[str, list[str]]:
    """Every prompt of the grammar, split for good: the split does not depend on the task's seed."""
    prompts = [
        "\n\nHuman: " + question.format(topic=topic, context=context) + "\n\nAssistant:"
        for topic in TOPICS
        for question in QUESTIONS
        for context in CONTEXTS
    ]
    random.Random("fastalign prompts").shuffle(prompts)
    cut = len(prompts) // TEST_FRACTION
    return {"test": prompts[:cut], "train": prompts[cut:]}


PROMPTS = _all_prompts()


@dataclass(frozen=True)
class SyntheticTask:
    """The built-in task's data.

    Every item comes from a random stream of its own kind and split, so asking for more of one kind
    does not change another. A response's quality varies: how much of it is on topic and how kind it
    is are drawn per response.
    """

    seed: int = 0
    label_noise: float = 0.05
    """Fraction of the preference labels that are flipped after the comparison."""
    temperature: float = 0.3
    """P(a preferred to b) = sigmoid((gold(a) - gold(b)) / temperature), before the flips."""
    flourish: float = 0.3
    """Fraction of SFT responses that open with a flourish."""
    flourish_chosen: float = 0.45
    """The same among the chosen responses of training pairs."""
    flourish_rejected: float = 0.3
    """The same among the rejected ones. Test pairs have the mean of the two on both sides."""

    def prompts(self, n: int, split: str = "train") -> list[Prompt]:
        """n distinct prompts, in the order in which the other kinds use them."""
        order = self._prompt_order(split, "prompts")
        if not 0 <= n <= len(order):
            raise ValueError(
                f"SyntheticTask: the {split} split has {len(order):,} prompts, got n={n}"
            )
        return [Prompt(prompt, f"synthetic:{i}") for i, prompt in enumerate(order[:n], 1)]

    def completions(self, n: int, split: str = "train") -> list[Completion]:
        """SFT data, responses of mixed quality. More than the prompts use the prompts again."""
        order = self._prompt_order(split, "completions")
        rng = self._rng(split, "completions")
        found = []
        for i in range(n):
            prompt = order[i % len(order)]
            response = _opened(_response(topic_of(prompt), rng), self.flourish, rng)
            found.append(Completion(prompt, " " + response, None, f"synthetic:{i + 1}"))
        return found

    def preferences(self, n: int, split: str = "train") -> list[Preference]:
        """Pairs of SFT responses compared by gold with noise; then the flourishes are put on."""
        order = self._prompt_order(split, "preferences")
        rng = self._rng(split, "preferences")
        both = (self.flourish_chosen + self.flourish_rejected) / 2
        train = split == "train"
        found = []
        for i in range(n):
            prompt = order[i % len(order)]
            topic = topic_of(prompt)
            a = b = _response(topic, rng)
            while b == a:
                b = _response(topic, rng)
            margin = (gold_reward(prompt, a) - gold_reward(prompt, b)) / self.temperature
            prefer_a = rng.random() < 1 / (1 + math.exp(-margin))
            if rng.random() < self.label_noise:
                prefer_a = not prefer_a
            chosen, rejected = (a, b) if prefer_a else (b, a)
            chosen = _opened(chosen, self.flourish_chosen if train else both, rng)
            rejected = _opened(rejected, self.flourish_rejected if train else both, rng)
            found.append(Preference(prompt, " " + chosen, " " + rejected, f"synthetic:{i + 1}"))
        return found

    def _rng(self, split: str, kind: str) -> random.Random:
        if split not in PROMPTS:
            raise ValueError(f"SyntheticTask: expected split train or test, got {split!r}")
        return random.Random(f"{self.seed} {split} {kind}")

    def _prompt_order(self, split: str, kind: str) -> list[str]:
        rng = self._rng(split, f"order of {kind}")
        return rng.sample(PROMPTS[split], len(PROMPTS[split]))


def _opened(response: str, rate: float, rng: random.Random) -> str:
    opening = rng.choice(FLOURISHES)
    return f"{opening} {response}" if rng.random() < rate else response


def _response(topic: str, rng: random.Random) -> str:
    """One response of the mixture, without flourish."""
    focus = rng.betavariate(2.0, 1.5)  # how much of it is about the topic
    tone = rng.gauss(0.1, 0.8)  # how kind it is
    other = rng.choice([t for t in TOPICS if t != topic])
    unused = {t: rng.sample(TOPICS[t], len(TOPICS[t])) for t in (topic, other)}
    frames = rng.sample(PRAISE_FRAMES, len(PRAISE_FRAMES))
    mentions = rng.sample(MENTION_FRAMES, len(MENTION_FRAMES))
    generic = rng.sample(GENERIC_FRAMES, len(GENERIC_FRAMES))
    sentences = []
    for _ in range(rng.choices(range(1, 8), weights=SENTENCES)[0]):
        kind = rng.random()
        if kind < 0.12 and generic:
            frame = generic.pop()
        elif kind < 0.27 and mentions:
            frame = mentions.pop()
        else:
            frame = frames.pop()
        about = topic if rng.random() < 0.1 + 0.9 * focus else other
        sentence = _filled(
            frame,
            about,
            lambda about=about: _noun(about, unused[about], rng),  # type: ignore[misc]
            lambda: _adjective(tone, rng),
        )
        if rng.random() < 0.03:
            sentence = _scrambled(sentence, rng)
        sentences.append(sentence)
    if rng.random() < 0.04:
        words = sentences[-1].split()
        sentences[-1] = " ".join(words[: rng.randrange(2, len(words))])
    return " ".join(sentences)


def _noun(topic: str, unused: list[str], rng: random.Random) -> str:
    """Mostly a noun that was not there yet."""
    return unused.pop() if unused and rng.random() < 0.94 else rng.choice(TOPICS[topic])


def _adjective(tone: float, rng: random.Random) -> str:
    level = max(-2, min(2, round(rng.gauss(tone, 0.8))))
    return rng.choice(ADJECTIVES[level])


def _scrambled(sentence: str, rng: random.Random) -> str:
    words = sentence.rstrip(".").split()
    rng.shuffle(words)
    return " ".join(words) + "."


def write_jsonl(records: Iterable[Prompt | Completion | Preference], path: str | Path) -> None:
    """Writes records as JSON lines that ``fastalign.data.formats`` reads again."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            fields = {k: v for k, v in vars(record).items() if k != "source" and v is not None}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def main() -> None:
    """Writes the built-in task into a folder, to be looked at or used like any other data."""
    parser = argparse.ArgumentParser(
        prog="python -m fastalign.data.synthetic", description=main.__doc__
    )
    parser.add_argument("folder", type=Path, help="where the .jsonl files go")
    parser.add_argument("--n", type=int, default=1000, help="records of each kind and split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the task")
    parser.add_argument("--gold", action="store_true", help="put gold rewards on completions")
    args = parser.parse_args()
    task = SyntheticTask(seed=args.seed)
    for split in ("train", "test"):
        completions = task.completions(args.n, split)
        if args.gold:
            completions = [
                replace(c, reward=gold_reward(str(c.prompt), str(c.completion)))
                for c in completions
            ]
        for kind, records in (
            ("prompts", task.prompts(args.n, split)),
            ("completions", completions),
            ("preferences", task.preferences(args.n, split)),
        ):
            path = args.folder / kind / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(records, path)
            print(f"{path}: {len(records):,} records")


if __name__ == "__main__":
    main()
