"""The tokenizer, the chat template, where completions begin and end, and what truncation says."""

import json

import pytest

from fastalign.data.formats import (
    Completion,
    DataError,
    LoadReport,
    Preference,
    Prompt,
    read_prompts,
)
from fastalign.data.synthetic import SyntheticTask
from fastalign.data.tokenizer import EOS, PAD, train_tokenizer
from fastalign.data.tokens import (
    TokenizedCompletion,
    TokenizedPreference,
    tokenize_completions,
    tokenize_preferences,
    tokenize_prompts,
)

CORPUS = [f"{c.prompt}{c.completion}" for c in SyntheticTask().completions(300)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(chat_template=None, eos=None):
    tokenizer = train_tokenizer(CORPUS, 600)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if eos is not None:
        tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": []})
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return trained()


@pytest.fixture(scope="module")
def chatml():
    return trained(CHATML, eos="<|im_end|>")


def conversation(text):
    return [{"role": "user", "content": text}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def complete(records, tokenizer, **options):
    report = LoadReport("data")
    options = {"max_length": 10_000} | options
    records = [Completion(p, c, None, f"data:{i}") for i, (p, c) in enumerate(records, 1)]
    return tokenize_completions(records, tokenizer, report, **options), report


# The tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "The trail is wonderful.",
        "\n\n  tabs\tand  spaces \n",
        "naïve café 你好 🙂",
        "\x00\x7f",
    ],
)
def test_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_special_tokens(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) == 600
    assert tokenizer(EOS)["input_ids"] == [tokenizer.eos_token_id]
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_training_is_deterministic(tokenizer):
    assert trained().get_vocab() == tokenizer.get_vocab()


def test_saved_and_loaded(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == (EOS, PAD)
    assert loaded.chat_template == tokenizer.chat_template
    text = "\n\nHuman: Tell me.\n\nAssistant: naïve 🙂"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match="expected vocab_size >= 258 .* got 100"):
        train_tokenizer(["a"], 100)


def test_chat_template_is_the_text_of_the_built_in_task(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "More?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "\n\nSystem: Be brief.\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: More?\n\nAssistant:"
    )
    whole = tokenizer.apply_chat_template(messages + answer("Yes."), tokenize=False)
    assert whole == text + " Yes." + EOS


# Where completions begin and end


def test_plain_text(tokenizer):
    (record,), report = complete([("\n\nHuman: Hello?\n\nAssistant:", " The trail.")], tokenizer)
    assert tokenizer.decode(record.prompt) == "\n\nHuman: Hello?\n\nAssistant:"
    assert tokenizer.decode(record.completion) == " The trail." + EOS
    assert record.completion.count(tokenizer.eos_token_id) == 1
    assert report.kept == 1 and not report.dropped and not report.truncated


def test_conversation_gives_the_same_tokens_as_its_text(tokenizer):
    (plain,), _ = complete([("\n\nHuman: Hello?\n\nAssistant:", " The trail.")], tokenizer)
    (chat,), _ = complete([(conversation("Hello?"), answer("The trail."))], tokenizer)
    assert chat == plain


def test_template_that_ends_a_turn_with_eos_and_a_line_break(chatml):
    (record,), _ = complete([(conversation("Hello?"), answer("The trail."))], chatml)
    assert chatml.decode(record.prompt) == (
        "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chatml.decode(record.completion) == "The trail.<|im_end|>"
    assert record.completion.count(chatml.eos_token_id) == 1


def test_template_that_ends_a_turn_with_nothing():
    bare = trained("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
                   "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    (record,), _ = complete([(conversation("Hello?"), answer("The trail."))], bare)
    assert bare.decode(record.prompt) == "[user] Hello? [assistant]"
    assert bare.decode(record.completion) == " The trail. " + EOS


@pytest.mark.parametrize("ending", [EOS, EOS + EOS, EOS + "\n"])
def test_text_that_already_ends_in_eos_gets_no_second_one(tokenizer, ending):
    (record,), _ = complete([("Hello?", " Yes." + ending)], tokenizer)
    assert tokenizer.decode(record.completion) == " Yes." + EOS


def test_tokenizer_that_adds_bos_and_eos(tokenizer):
    """BOS opens a plain prompt once; the EOS such a tokenizer puts after every text does not."""
    from tokenizers.processors import TemplateProcessing

    both = trained()
    bos, eos = both.convert_tokens_to_ids(PAD), both.eos_token_id
    both._tokenizer.post_processor = TemplateProcessing(
        single=f"{PAD} $A {EOS}", special_tokens=[(PAD, bos), (EOS, eos)]
    )
    (record,), _ = complete([("Hello?", " Yes.")], both)
    assert record.prompt == [bos, *tokenizer("Hello?")["input_ids"]]
    assert record.completion == [*tokenizer(" Yes.")["input_ids"], eos]
    (chat,), _ = complete([(conversation("Hello?"), answer("Yes."))], both)
    assert bos not in chat.prompt + chat.completion


def test_the_text_of_a_prompt_has_no_bos():
    """Plain or rendered, as rewards that read text get it of responses in data too."""
    tokenizer = trained("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer.bos_token = PAD
    for prompt in ("Hello?", conversation("Hello?")):
        (found,) = tokenize_prompts(
            [Prompt(prompt, "data:1")], tokenizer, LoadReport("data"), max_prompt_length=99
        )
        assert found.text == "Hello?"
    assert found.prompt[0] == tokenizer.bos_token_id


def test_template_that_changes_the_prompt_is_refused():
    changing = trained(
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="data:1: the tokenizer's chat template renders the prompt"):
        complete([(conversation("Hello?"), answer("Yes."))], changing)


def test_no_chat_template(tokenizer):
    without = trained()
    without.chat_template = None
    with pytest.raises(DataError, match="data:1: .*the tokenizer has no chat template"):
        complete([(conversation("Hello?"), answer("Yes."))], without)
    assert len(complete([("Hello?", "Yes.")], without)[0]) == 1


def test_no_eos():
    without = trained()
    without.eos_token = None
    with pytest.raises(DataError, match="the tokenizer has no EOS token"):
        complete([("Hello?", "Yes.")], without)


# Lengths


def test_cut_completion_has_no_eos_and_is_counted(tokenizer):
    prompt, text = "Hello?", " The trail is wonderful."
    p, c = len(tokenizer(prompt)["input_ids"]), len(tokenizer(text)["input_ids"])
    full = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    for room in range(1, c + 3):
        (record,), report = complete([(prompt, text)], tokenizer, max_length=p + room)
        assert record.completion == full[:room]
        assert (record.completion[-1] == tokenizer.eos_token_id) == (room >= c + 1)
        reason = f"completion cut at {p + room} tokens with its prompt, EOS removed"
        assert report.truncated == ({} if room >= c + 1 else {reason: 1})
        assert report.examples == ({} if room >= c + 1 else {reason: "data:1"})


def test_long_prompts_are_dropped_and_counted(tokenizer):
    prompts = ["a", "a b c d e f g h", "a b"]
    records, report = complete([(p, "x") for p in prompts], tokenizer, max_prompt_length=3)
    assert [tokenizer.decode(r.prompt) for r in records] == ["a", "a b"]
    assert report.dropped == {"prompt longer than 3 tokens": 1}
    assert report.examples == {"prompt longer than 3 tokens": "data:2"}
    assert report.kept == 2
    report = LoadReport("data")
    kept = tokenize_prompts(
        [Prompt(p, f"data:{i}") for i, p in enumerate(prompts, 1)],
        tokenizer,
        report,
        max_prompt_length=3,
    )
    assert [p.text for p in kept] == ["a", "a b"]
    assert str(report) == (
        "data: kept 2 of 3; dropped 1 (prompt longer than 3 tokens: 1, first at data:2)"
    )


def test_max_length_alone_leaves_room_for_one_token(tokenizer):
    n = len(tokenizer("a b c d")["input_ids"])
    (record,), _ = complete([("a b c d", "x y")], tokenizer, max_length=n + 1)
    assert len(record.completion) == 1
    with pytest.raises(DataError, match=f"nothing left .*prompt longer than {n - 1} tokens: 1"):
        complete([("a b c d", "x y")], tokenizer, max_length=n)


def test_preferences(tokenizer):
    records = [
        Preference("a", " b c", " b d", "data:1"),
        Preference("a", " b c d b c b", " b c d b c d", "data:2"),
        Preference("a " * 50, " b", " c", "data:3"),
        Preference("a", " b c d b c d b", " c", "data:4"),
    ]
    report = LoadReport("data", kept=4)
    kept = tokenize_preferences(records, tokenizer, report, max_length=6)
    eos = tokenizer.eos_token_id
    prompt = tokenizer("a")["input_ids"]
    (b,), (c,), (d,) = (tokenizer(text)["input_ids"] for text in (" b", " c", " d"))
    assert kept == [
        TokenizedPreference(prompt, [b, c, eos], [b, d, eos]),
        TokenizedPreference(prompt, [b, c, d, b, c], [c, eos]),
    ]
    assert report.kept == 2
    assert report.dropped == {
        "chosen equals rejected after truncation": 1,
        "prompt longer than 5 tokens": 1,
    }
    cut = "cut at 6 tokens with its prompt, EOS removed"
    assert report.truncated == {f"chosen {cut}": 1}
    assert report.examples[f"chosen {cut}"] == "data:4"


def test_rewards_and_rendered_prompts_are_carried(tokenizer):
    report = LoadReport("data")
    (record,) = tokenize_completions(
        [Completion("a", " b", 0.25, "data:1")], tokenizer, report, max_length=9
    )
    ids = tokenizer(" b")["input_ids"]
    assert record == TokenizedCompletion(
        tokenizer("a")["input_ids"], [*ids, tokenizer.eos_token_id], 0.25
    )
    (prompt,) = tokenize_prompts(
        [Prompt(conversation("Hello?"), "data:1")], tokenizer, report, max_prompt_length=99
    )
    assert prompt.text == "\n\nHuman: Hello?\n\nAssistant:"
    assert tokenizer.decode(prompt.prompt) == prompt.text


@pytest.mark.parametrize("template", [None, CHATML, CHATML.replace("nt'] }}", "nt'] | trim }}")])
def test_a_completion_that_was_cut_off_ends_where_its_text_does(template):
    """Neither EOS nor what a template closes a turn with; with both, where it is finished."""
    tokenizer = trained(template, eos=template and "<|im_end|>")
    report, records = LoadReport("data"), []
    for finished in (True, False):
        records += [
            Completion("a", " b c", None, "data:1", finished),
            Completion(conversation("a"), answer(" b <|im_end|> b"), None, "data:2", finished),
        ]
    kept = tokenize_completions(records, tokenizer, report, max_length=99)
    for whole, cut in zip(kept[:2], kept[2:], strict=True):
        assert whole.completion == [*cut.completion, tokenizer.eos_token_id]
        assert whole.prompt == cut.prompt and tokenizer.eos_token_id not in cut.completion
    assert tokenizer.decode(kept[2].completion) == " b c"
    assert report.noted["unfinished, no EOS set"] == 2


def test_a_turn_that_was_cut_off_is_not_closed():
    """By a mark that is not EOS either."""
    tokenizer = trained(CHATML.replace("<|im_end|>", "</turn>"))
    records = [
        Completion(conversation("a"), answer(" b"), None, "data:1", ended)
        for ended in (True, False)
    ]
    found = tokenize_completions(records, tokenizer, LoadReport("data"), max_length=99)
    texts = [tokenizer.decode(one.completion) for one in found]
    assert texts == [f" b</turn>\n{EOS}", " b"]


def test_mixed_plain_and_conversation_keep_their_order(tokenizer):
    records = [("a", " b"), (conversation("c"), answer("d")), ("e", " f")]
    kept, _ = complete(records, tokenizer)
    assert [tokenizer.decode(r.prompt + r.completion) for r in kept] == [
        "a b" + EOS,
        "\n\nHuman: c\n\nAssistant: d" + EOS,
        "e f" + EOS,
    ]


@pytest.mark.parametrize("lengths", [(1, None), (8, 8), (8, 0)])
def test_lengths_that_leave_no_room(tokenizer, lengths):
    with pytest.raises(ValueError, match="expected 1 <= max_prompt_length < max_length"):
        complete([("a", "b")], tokenizer, max_length=lengths[0], max_prompt_length=lengths[1])


def test_prompt_without_tokens():
    empty = trained("{{ '' }}")
    with pytest.raises(DataError, match="data:1: the prompt has no tokens"):
        complete([(conversation("Hello?"), answer("Yes."))], empty)


def test_from_file_to_tokens(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("a", "b " * 30)))
    prompts, report = read_prompts(str(path))
    assert len(tokenize_prompts(prompts, tokenizer, report, max_prompt_length=5)) == 1
    assert str(report).startswith(f"{path}: kept 1 of 2; dropped 1 (prompt longer than 5 tokens")
