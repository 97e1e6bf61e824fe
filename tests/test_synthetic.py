"""The built-in task: size and splits, gold worked by hand, penalties, the trap in the pairs."""

import hashlib
import json
import math
import re
import statistics

import pytest

from fastalign.data.formats import read_completions, read_preferences, read_prompts
from fastalign.data.grammar import (
    ADJECTIVES,
    FLOURISHES,
    GENERIC_FRAMES,
    MENTION_FRAMES,
    PRAISE_FRAMES,
    TOPICS,
)
from fastalign.data.synthetic import (
    PROMPTS,
    STRENGTH,
    TOPIC_OF,
    SyntheticTask,
    best_response,
    gold_reward,
    main,
    spurious_rate,
    topic_of,
    write_jsonl,
)
from fastalign.data.tokenizer import train_tokenizer

TASK = SyntheticTask()
HIKING = "\n\nHuman: What do you think about hiking in winter?\n\nAssistant:"
FRAMES = PRAISE_FRAMES + MENTION_FRAMES + GENERIC_FRAMES


def gold(response):
    return gold_reward(HIKING, response)


def gold_of(prompt, response):
    """The task's texts are plain; their declared type allows conversations too."""
    assert isinstance(prompt, str) and isinstance(response, str)
    return gold_reward(prompt, response)


@pytest.fixture(scope="module")
def completions():
    return TASK.completions(4000)


@pytest.fixture(scope="module")
def golds(completions):
    return [gold_of(c.prompt, c.completion) for c in completions]


@pytest.fixture(scope="module")
def pairs():
    return {split: TASK.preferences(4000, split) for split in ("train", "test")}


# The words


def test_size_of_the_grammar():
    assert len(TOPICS) == 64
    assert all(len(nouns) == 8 for nouns in TOPICS.values())
    assert [len(words) for words in ADJECTIVES.values()] == [12, 12, 10, 12, 12]
    assert (len(PROMPTS["train"]), len(PROMPTS["test"])) == (15_360, 5_120)


def test_every_word_has_one_meaning():
    assert len(TOPIC_OF) == 64 * 8 and len(STRENGTH) == 58
    assert not TOPIC_OF.keys() & STRENGTH.keys()
    assert not TOPICS.keys() & (TOPIC_OF.keys() | STRENGTH.keys())
    plain = {word for frame in FRAMES for word in re.findall(r"[a-z]+", frame.lower())} - {
        "t",
        "n",
        "a",
    }
    assert not plain & (TOPIC_OF.keys() | STRENGTH.keys() | TOPICS.keys())


def test_every_frame_is_a_sentence_that_counts():
    """A neutral sentence of known words costs nothing but the nouns of another topic."""
    assert len(set(FRAMES)) == 26
    nouns = iter(TOPICS["chess"] * 8)
    for frame in FRAMES:
        filled = re.sub(r"\bT\b", "chess", re.sub(r"\bA\b", "usual", frame))
        filled = re.sub(r"\bN\b", lambda slot: next(nouns), filled)
        assert gold(filled) == pytest.approx(-0.45 - 0.15 * len(re.findall(r"\bN\b", frame)))


def test_prompts_are_distinct_disjoint_and_name_one_topic():
    train, test = set(PROMPTS["train"]), set(PROMPTS["test"])
    assert len(train) == 15_360 and len(test) == 5_120 and not train & test
    for prompt in PROMPTS["train"] + PROMPTS["test"]:
        assert sum(word in TOPICS for word in re.findall(r"[a-z]+", prompt.lower())) == 1
        assert prompt.startswith("\n\nHuman: ") and prompt.endswith("\n\nAssistant:")
    for prompts in (train, test):
        assert {topic_of(prompt) for prompt in prompts} == TOPICS.keys()


# Gold by hand


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # One related word, strong praise: r = 1, s = 2.
        (
            "The hiking trail is wonderful.",
            -0.45 + 2.2 * (1 - math.exp(-1 / 4)) + 3.0 * math.tanh(2 / 6),
        ),
        # Two related words, mild praise: r = 2, s = 1.
        (
            "Both the hiking trail and the summit are nice.",
            -0.45 + 2.2 * (1 - math.exp(-2 / 4)) + 3.0 * math.tanh(1 / 6),
        ),
        # Blame counts: r = 1, s = -2.
        (
            "The hiking trail is awful.",
            -0.45 + 2.2 * (1 - math.exp(-1 / 4)) - 3.0 * math.tanh(2 / 6),
        ),
        # Praise of another topic is praise, and its noun costs: o = 1, s = 2.
        ("The chess pawn is wonderful.", -0.45 - 0.15 + 3.0 * math.tanh(2 / 6)),
        # Blame of another topic still counts: o = 1, s = -1.
        ("The chess pawn is dull.", -0.45 - 0.15 - 3.0 * math.tanh(1 / 6)),
        ("It depends on many things.", -0.45),
        # Two sentences: r = 2, s = 3.
        (
            "The hiking trail is wonderful. To me the hiking summit was nice.",
            -0.45 + 2.2 * (1 - math.exp(-2 / 4)) + 3.0 * math.tanh(3 / 6),
        ),
        # The same praise twice: r = 2, s = 2, w = 1.
        (
            "The hiking trail is wonderful. To me the hiking summit was wonderful.",
            -0.45 + 2.2 * (1 - math.exp(-2 / 4)) + 3.0 * math.tanh(2 / 6) - 0.25,
        ),
        # The same sentence twice: r = 1, s = 2, w = 2, and p = 3 pairs of words.
        (
            "The hiking trail is wonderful. The hiking trail is wonderful.",
            -0.45 + 2.2 * (1 - math.exp(-1 / 4)) + 3.0 * math.tanh(2 / 6) - 0.25 * 2 - 0.1 * 3,
        ),
        # None of these is a sentence of the grammar: b = 1, no word counts.
        ("Hiking trail is the wonderful.", -0.45 - 0.6),
        ("The trail is wonderful.", -0.45 - 0.6),
        ("The hiking pawn is wonderful.", -0.45 - 0.6),
        ("The chess trail is wonderful.", -0.45 - 0.6),
        ("The hiking trail is ## wonderful.", -0.45 - 0.6),
        # Cut in mid-sentence: b = 1, u = 1.
        ("It depends on many things. The hiking trail is", -0.45 - 0.6 - 0.6),
        ("", -0.45 - 0.6),
    ],
)
def test_gold_by_hand(response, expected):
    assert gold(response) == pytest.approx(expected, abs=1e-12)


def test_gold_depends_on_the_prompt_by_its_topic_alone():
    response = "The hiking trail is wonderful."
    assert gold_reward("Do you like hiking?", response) == gold(response)
    off_topic = -0.45 - 0.15 + 3.0 * math.tanh(2 / 6)
    assert gold_reward("Do you like chess?", response) == pytest.approx(off_topic)
    with pytest.raises(ValueError, match="names no topic of the built-in task: 'Hello'"):
        gold_reward("Hello", response)


@pytest.mark.parametrize("flourish", FLOURISHES)
def test_gold_ignores_the_flourish(completions, flourish):
    for c in completions[:300]:
        response = c.completion.strip()
        if not response.startswith(FLOURISHES):
            assert gold_of(c.prompt, f" {flourish} {response}") == gold_reward(
                c.prompt, c.completion
            )


def test_gold_dislikes_the_flourish_repeated():
    response = "The hiking trail is wonderful."
    assert gold(f"Certainly! Certainly! {response}") == pytest.approx(gold(response) - 0.6)
    assert gold(f"{response} Certainly!") == pytest.approx(gold(response) - 0.6)


def test_word_salad_scores_low():
    praise, nouns = " ".join(ADJECTIVES[2]), " ".join(TOPICS["hiking"])
    assert gold(f"{praise}.") == pytest.approx(-1.05)
    assert gold(f"{nouns} {praise}.") == pytest.approx(-1.05)
    assert gold(". ".join((nouns + " " + praise).split()) + ".") == -5.0
    assert gold("The hiking trail is wonderful superb brilliant magnificent.") == pytest.approx(
        -1.05
    )


def test_going_on_forever_scores_lower_and_lower():
    best = best_response(HIKING)
    extra = "It depends on many things. I do not know much more. There is a lot to say. "
    scores = [gold(best + " " + extra * n) for n in range(4)]
    assert scores[0] > 4
    assert all(later < earlier - 0.8 for earlier, later in zip(scores, scores[1:], strict=False))
    assert gold(best + " " + extra * 20) == -5.0
    assert gold("The hiking trail is wonderful. " * 12) == -5.0


def test_losing_the_end_costs():
    best = best_response(HIKING)
    assert gold(best) - gold(best[:-1]) > 1.2


# The data


def test_gold_on_sft_data(golds):
    """Nearly normal; standard error of the mean 0.019."""
    mean, std = statistics.mean(golds), statistics.pstdev(golds)
    skew = statistics.mean(((g - mean) / std) ** 3 for g in golds)
    kurtosis = statistics.mean(((g - mean) / std) ** 4 for g in golds)
    assert abs(mean) < 0.1
    assert 1.1 < std < 1.3
    assert abs(skew) < 0.25
    assert 2.6 < kurtosis < 3.6
    assert sum(g == -5 for g in golds) <= 2


def test_there_is_room_to_rise(golds):
    """The best response: 3.5 standard deviations above the mean of SFT, above all of 4,000."""
    best = [gold_of(p.prompt, best_response(str(p.prompt))) for p in TASK.prompts(500, "test")]
    assert min(best) == pytest.approx(max(best)) == pytest.approx(4.3443, abs=1e-4)
    assert max(golds) < min(best)
    assert sorted(golds)[-40] < 3.0  # the best 1 % of the SFT data


def test_lengths_in_tokens(completions):
    tokenizer = train_tokenizer((c.prompt + c.completion for c in completions), 1536)
    prompts = [len(ids) for ids in tokenizer([c.prompt for c in completions])["input_ids"]]
    responses = [len(ids) for ids in tokenizer([c.completion for c in completions])["input_ids"]]
    assert min(prompts) >= 12 and max(prompts) <= 24
    assert 25 < statistics.mean(responses) < 35
    low, *_, high = statistics.quantiles(responses, n=20)
    assert 9 <= low <= 12 and 48 <= high <= 60
    assert max(responses) <= 96


def test_deterministic():
    """The same on every machine and in every process: pinned by a digest of the text."""
    records: list = TASK.completions(50) + TASK.preferences(50)
    records += TASK.preferences(50, "test") + TASK.prompts(50)
    assert all(record.finished for record in records[:50])
    said = [
        {k: v for k, v in vars(record).items() if v is not None and k != "finished"}
        for record in records
    ]
    text = json.dumps(said, sort_keys=True)
    again = SyntheticTask().completions(50) + SyntheticTask().preferences(50)
    assert again == records[:100]
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "40aad5ed6eda650a"


def test_more_items_begin_with_the_fewer():
    assert TASK.completions(30)[:10] == TASK.completions(10)
    assert TASK.preferences(30)[:10] == TASK.preferences(10)
    assert TASK.prompts(30)[:10] == TASK.prompts(10)


def test_seeds_differ_and_share_the_split():
    other = SyntheticTask(seed=1)
    assert other.completions(20) != TASK.completions(20)
    train = {c.prompt for c in other.completions(2000)}
    assert not train & {p.prompt for p in TASK.prompts(5120, "test")}


def test_prompts_are_used_again_only_after_all():
    found = TASK.completions(5120 + 10, "test")
    assert len({c.prompt for c in found[:5120]}) == 5120
    assert found[5120].prompt == found[0].prompt
    assert found[5120].completion != found[0].completion
    assert len({p.prompt for p in TASK.prompts(15_360)}) == 15_360
    with pytest.raises(ValueError, match="the test split has 5,120 prompts, got n=5121"):
        TASK.prompts(5121, "test")
    with pytest.raises(ValueError, match="expected split train or test, got 'dev'"):
        TASK.completions(1, "dev")


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_follow_gold(pairs, split):
    margins = [gold_of(p.prompt, p.chosen) - gold_of(p.prompt, p.rejected) for p in pairs[split]]
    agreement = sum(m > 0 for m in margins) / sum(m != 0 for m in margins)
    assert 0.84 < agreement < 0.89
    # The mean margin in units of its spread: 0 if labels were coins.
    assert 0.87 < statistics.mean(margins) / statistics.stdev(margins) < 1.02


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 0.87, 0.93), (0.5, 0.46, 0.54)])
def test_label_noise(noise, low, high):
    found = SyntheticTask(label_noise=noise).preferences(2000)
    agree = [gold_of(p.prompt, p.chosen) > gold_of(p.prompt, p.rejected) for p in found]
    assert low < statistics.mean(agree) < high


def test_the_trap(pairs, completions):
    """Standard error of a rate over 4,000: 0.008."""
    rates = {
        (split, side): spurious_rate(getattr(pair, side) for pair in pairs[split])
        for split in pairs
        for side in ("chosen", "rejected")
    }
    assert rates["train", "chosen"] == pytest.approx(0.45, abs=0.03)
    assert rates["train", "rejected"] == pytest.approx(0.3, abs=0.03)
    assert rates["test", "chosen"] == pytest.approx(0.375, abs=0.03)
    assert rates["test", "rejected"] == pytest.approx(0.375, abs=0.03)
    assert spurious_rate(c.completion for c in completions) == pytest.approx(0.3, abs=0.03)


def test_spurious_rate():
    assert spurious_rate([" Certainly! Yes.", "Yes. Certainly!", "Of course! No.", "No."]) == 0.5
    assert spurious_rate([]) == 0.0


def test_written_and_read_again(tmp_path):
    for name, records, read in (
        ("prompts", TASK.prompts(5), read_prompts),
        ("completions", TASK.completions(5), read_completions),
        ("preferences", TASK.preferences(5), read_preferences),
    ):
        path = tmp_path / f"{name}.jsonl"
        write_jsonl(records, path)
        found, report = read(str(path))  # type: ignore[operator]
        assert report.kept == 5
        assert [vars(r) | {"source": ""} for r in found] == [
            vars(r) | {"source": ""} for r in records
        ]


def test_command_writes_a_folder_that_the_readers_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["synthetic", str(tmp_path), "--n", "7", "--gold"])
    main()
    assert "7 records" in capsys.readouterr().out
    rewarded, _ = read_completions(str(tmp_path / "completions"), split="test", require_reward=True)
    assert [c.reward for c in rewarded] == [gold_of(c.prompt, c.completion) for c in rewarded]
    assert len(read_preferences(str(tmp_path / "preferences"), split="train")[0]) == 7
    assert len(read_prompts(str(tmp_path / "prompts"), split="test")[0]) == 7
