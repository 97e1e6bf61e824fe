"""Models and methods on packs that hold a prompt once, against packs that repeat it."""

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
)

from fastalign.data.packing import pack
from fastalign.data.tokens import TokenizedPreference
from fastalign.errors import UserError
from fastalign.losses import DPO
from fastalign.models import Policy, RewardEnsemble
from fastalign.models.attention import NAME, packed_hidden, register
from fastalign.models.flops import forward_flops, training_flops
from fastalign.models.recompute import recompute_activations
from fastalign.models.reward import EnsembleConfig
from fastalign.train import dpo, experience, grpo, ppo, reward
from fastalign.train.critic import OwnCritic, TrunkCritic, values_of
from fastalign.train.distributed import Micro
from fastalign.train.preference_data import pairs
from fastalign.train.reference import precompute
from fastalign.train.reward_evaluation import score_pairs
from fastalign.train.reward_source import score_packed
from tests.learners import experience_of, learner_of, unread, updated
from tests.test_flops import counted
from tests.test_shared_prompts import groups

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-10
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 24,
}


def llama(kv_heads=2, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=kv_heads, tie_word_embeddings=tied
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # peaked logits, as after training
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def policy(kv_heads=2, tied=False, dtype=torch.float64):
    made = Policy(llama(kv_heads, tied), value_head=True)
    assert made.value_head is not None and made.shares_prompts
    torch.nn.init.normal_(made.value_head.down.weight)
    return made.to(dtype)


def ensemble(dtype=torch.float64):
    made = RewardEnsemble(llama().model, EnsembleConfig(n_heads=3))
    assert made.shares_prompts
    return made.to(dtype)


def both(seed=3):
    """A pack that shares, and the one that repeats."""
    sequences, prompts = groups(seed)
    shared = pack(sequences, prompts, share=True)
    assert shared.shared is not None and sum(shared.lengths) < sum(map(len, sequences)) - 20
    return shared, pack(sequences, prompts)


def gradients(module):
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def same(one, two, tolerance=EXACT):
    assert one.keys() == two.keys() and len(one) > 3
    largest = max(float(x.abs().max()) for x in two.values())
    assert largest > 1e-3
    for name, x in two.items():
        assert (one[name] - x).abs().max() <= tolerance * largest, name


@pytest.mark.parametrize("seed", [3, 8, 29])
@pytest.mark.parametrize(("kv_heads", "tied"), [(4, False), (2, True), (1, False)])
def test_rows_and_gradients_of_a_policy(kv_heads, tied, seed):
    model = policy(kv_heads, tied)

    def rows(packed):
        hidden = model.response_hidden(packed)
        logp, entropy = model.logprobs(packed, return_entropy=True)
        values = model.values(hidden)
        (logp * torch.linspace(-1, 1, len(logp)) + 0.1 * values.square()).sum().backward()
        found = {"hidden": hidden, "logp": logp, "entropy": entropy, "values": values}
        return {name: x.detach() for name, x in found.items()}, gradients(model)

    (one, of_one), (two, of_two) = map(rows, both(seed))
    # Log-probs and values are kept in float32.
    same(one, two, 1e-6)
    assert (one["hidden"] - two["hidden"]).abs().max() < EXACT
    same(of_one, of_two, 1e-6)


def test_gradients_in_float64_throughout():
    """Of a model without a step in float32, and a head in plain products."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = Policy(GPT2LMHeadModel(config)).double().eval()
    assert model.shares_prompts
    weight = torch.randn(32, dtype=torch.float64)

    def found(packed):
        hidden = model.hidden(packed)
        rows = hidden.index_select(0, packed.kept)
        logits = torch.nn.functional.linear(rows, model.head_weight)
        logp = logits.log_softmax(-1).gather(1, packed.response_targets[:, None])[:, 0]
        last = hidden[packed.last_index] @ weight
        (logp.sum() + last.tanh().sum()).backward()
        return {"logp": logp.detach(), "last": last.detach(), **gradients(model)}

    one, two = map(found, both())
    same(one, two)


def test_recomputed_activations_and_low_precision():
    model, (shared, plain) = policy(dtype=torch.float32), both()

    def found(packed, low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            hidden = model.response_hidden(packed)
        hidden.float().square().sum().backward()
        return {"hidden": hidden.detach().float(), **gradients(model)}

    exact, low = found(plain, False), found(shared, True)
    assert exact["hidden"].dtype == torch.float32
    same(low, exact, 0.05)
    once = found(shared, False)
    same(once, exact, 1e-5)
    recompute_activations(model.model)
    again = found(shared, False)
    assert all(torch.equal(again[name], x) for name, x in once.items())
    same(found(shared, True), low, 1e-6)


def test_rewards_and_their_gradients():
    model = ensemble()

    def found(packed):
        scores = model(packed)
        scores.square().sum().backward()
        return {"scores": scores.detach(), **gradients(model)}

    one, two = map(found, both())
    same(one, two, 1e-6)


def test_an_encoder_that_looks_ahead_reads_every_prompt(monkeypatch):
    """Its states of a prompt depend on the answer: the same scores as of whole sequences."""
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SIZES, num_attention_heads=4), add_pooling_layer=False)
    model = RewardEnsemble(bert, EnsembleConfig(n_heads=2)).eval()
    assert model.shares_prompts is False
    asked = some_pairs()
    found = torch.stack(score_pairs(model, asked, 60, "float32"))
    sequences = [p.prompt + r for p in asked for r in (p.chosen, p.rejected)]
    one_by_one = torch.cat([model(pack([s])) for s in sequences]).detach()
    assert torch.allclose(found, one_by_one.reshape(-1, 2, 2).transpose(0, 1), atol=1e-5)
    rollouts = some_rollouts()
    scores = score_packed(model, rollouts, 60, "float32")
    truth = torch.cat([model(pack([r.prompt + r.completion])) for r in rollouts]).detach()
    assert torch.allclose(scores, truth, atol=1e-5)


def test_a_sliding_window_counts_the_prompt():
    """What is held is shorter than the window, what is read is not."""
    register()
    config = MistralConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=8, head_dim=8
    )
    model = MistralModel(config).eval()
    model.set_attn_implementation(NAME)
    sequences = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7, 8, 9]]
    shared = packed_hidden(model, pack(sequences, [4, 4], share=True))
    plain = packed_hidden(model, pack(sequences, [4, 4]))
    assert torch.allclose(shared, plain[[0, 1, 2, 3, 4, 9, 10, 11, 12]], atol=1e-6)
    sequences[1] += [10]
    with pytest.raises(UserError, match="sliding window is 8 tokens, a sequence has 9"):
        packed_hidden(model, pack(sequences, [4, 4], share=True))


# --- methods --------------------------------------------------------------------------------------


def some_pairs():
    """Seven pairs, three of them of one prompt."""
    found = []
    for seed in range(7):
        sequences, prompts = groups(30 + seed % 5, 1)
        p = prompts[0]
        answers = [s[p:] for s in groups(seed, 4)[0]]
        found.append(TokenizedPreference(sequences[0][:p] * 3, answers[0], answers[-1], None))
    return found


def some_rollouts():
    """Responses to four prompts, by turns, as an update's random order has them."""
    sequences, prompts = groups(18)
    asked = dict.fromkeys(tuple(s[:p]) for s, p in zip(sequences, prompts, strict=True))
    found = [
        experience.Rollout(
            list(asked).index(tuple(s[:p])), s[:p], s[p:], [-1.0] * (len(s) - p), True
        )
        for s, p in zip(sequences, prompts, strict=True)
    ]
    return found[::2] + found[1::2]


def test_pairs_in_the_policy_and_the_reference(tmp_path):
    model, found = policy(), {}
    config = dpo.DPOConfig(dtype="float32", micro_tokens=60)
    for share in (False, True):
        examples = pairs(some_pairs())
        if share:
            examples.share_prompts()
        meter = unread()
        precompute(model, [examples.responses], tmp_path / str(share), "float32", 60, meter)
        trainee = dpo.Trainee(model, None, DPO(0.5), config)
        part = trainee.part(examples, Micro(list(range(7))), None)
        out, _ = trainee.forward(part, 7)
        (out.loss * 1000).backward()  # the reference is the policy: 0.69, but not its gradients
        kept: Any = {"loss": out.loss.detach(), "logp": out.logp.detach()}
        kept["ref_logp"] = examples.responses.ref_logp
        found[share] = kept | gradients(model), part.packed, examples, meter
    same(found[True][0], found[False][0], 1e-6)
    tokens = [found[share][1].input_ids.numel() for share in (False, True)]
    examples = found[True][2]
    assert tokens[0] == sum(examples.lengths) > tokens[1] + 30
    own, n, before = examples.responses.size([examples.rows(range(7))])
    assert (sum(own), sum(own) + sum(before)) == (tokens[1], tokens[0])
    assert n == len(found[True][0]["logp"])
    flops = [found[share][3].totals["reference"].flops for share in (False, True)]
    assert flops[0] == forward_flops(model, examples.responses.lengths, n) > flops[1]
    assert max(examples.packed_lengths) < max(examples.lengths)


def test_pairs_in_the_reward_model():
    model, asked = ensemble(), some_pairs()

    def found(share):
        scores = model(reward.packed(asked, share))
        chosen, rejected = scores[0::2], scores[1::2]
        weights = torch.ones(7, 3, dtype=torch.int64)
        loss = reward.pair_loss(chosen, rejected, weights, weights.sum(0))
        loss.backward()
        return {"loss": loss.detach(), "scores": scores.detach(), **gradients(model)}

    one, two = found(True), found(False)
    same(one, two, 1e-6)
    held_out = torch.stack(score_pairs(model.float(), asked, 60, "float32"))
    truth = two["scores"].float().reshape(7, 2, 3).transpose(0, 1)
    assert torch.allclose(held_out, truth, atol=1e-5)


@pytest.mark.parametrize("method", ["ppo", "own critic", "grpo", "gspo"])
def test_an_update_of_a_policy(method, monkeypatch):
    """Gradients and metrics of one update; passes of 60 tokens cut some prompts in two."""
    rollouts, found = some_rollouts(), {}
    n = sum(len(r.completion) for r in rollouts)
    draw = torch.Generator().manual_seed(0)
    tokens = {name: torch.randn(n, generator=draw) for name in ("advantages", "returns")}
    options: dict[str, Any] = {
        "micro_tokens": 60,
        "epochs": 1,
        "dtype": "float32",
        "reward": "none",
    }
    for share in (False, True):
        model = policy(dtype=torch.float32)
        model.shares_prompts = share
        of: Any
        if method in ("grpo", "gspo"):
            of = grpo.GRPO(grpo.GRPOConfig(**options, variant=method))
        else:
            of = ppo.PPO(ppo.PPOConfig(**options))
        learner = learner_of(model, of)
        if method == "own critic":
            trunk = llama().model
            trunk.set_attn_implementation(NAME)
            learner.critic = OwnCritic(trunk, model.value_head, share)
        found_ = experience_of(rollouts, torch.full((n,), -3.0))
        grads: dict[str, torch.Tensor] = {}

        def keep(*args, grads=grads, model=model):
            grads |= gradients(model)
            return {}

        monkeypatch.setattr(learner.optimizer, "update", keep)
        taken = {"old_logp": found_.logp, "ref_logp": found_.ref_logp}
        taken |= tokens | {"old_values": torch.zeros(n)}
        read = tokens_read(model, monkeypatch)
        numbers = updated(learner, 1, found_, taken, kl_coef=0.1)
        found[share] = grads, numbers
        whole = sum(found_.lengths)
        assert max(read) <= 60 and (sum(read) < whole - 20 if share else sum(read) == whole)
    same(found[True][0], found[False][0], 2e-5)
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-4, abs=1e-5)


def tokens_read(model, monkeypatch):
    """Of every pass from now on."""
    read = list[int]()
    plain = model.hidden

    def hidden(packed):
        read.append(packed.input_ids.numel())
        return plain(packed)

    monkeypatch.setattr(model, "hidden", hidden)
    return read


def test_old_logprobs_values_and_scores(monkeypatch):
    rollouts = some_rollouts()
    seen: dict[bool, Any] = {}
    n = sum(len(r.completion) for r in rollouts)
    for share in (False, True):
        model, judge = policy(dtype=torch.float32), ensemble(torch.float32)
        model.shares_prompts = judge.shares_prompts = share
        nothing: Any = None
        sampling = experience.SamplingConfig()
        collector = experience.Collector(
            nothing, model, nothing, nothing, sampling, 60, "float32", None
        )
        read = tokens_read(model, monkeypatch)
        logp, entropy = collector.logprobs(model, rollouts, entropy=True)
        seen[share] = {
            "logp": logp,
            "entropy": entropy,
            "values": values_of(TrunkCritic(model), rollouts, 60, "float32"),
            "scores": score_packed(judge, rollouts, 60, "float32"),
        }
        whole = 2 * sum(len(r.prompt) + len(r.completion) for r in rollouts)
        assert max(read) <= 60 and (sum(read) < whole - 40 if share else sum(read) == whole)
    assert seen[True]["logp"].shape == (n,)
    same(seen[True], seen[False], 1e-5)


# --- what it costs --------------------------------------------------------------------------------


def test_flops_against_torchs_count():
    model, (shared, _) = policy(4, dtype=torch.float32), both()
    before = [n for _, n in shared.shared.spans]
    rows = shared.kept.numel()

    def forward():
        return torch.nn.functional.linear(model.response_hidden(shared), model.head_weight)

    # Half the square of what a sequence reads alone is seen, and of an answer its own square's.
    unseen = (
        2
        * 2
        * 32
        * 2
        / 2
        * sum(
            (t + p) ** 2 - p * p if p == 0 else t * t
            for t, p in zip(shared.lengths, before, strict=True)
        )
    )
    found = forward_flops(model, shared.lengths, rows, before)
    assert found == pytest.approx(counted(forward) - unseen, rel=1e-6)
    both_ = counted(lambda: forward().sum().backward())
    assert training_flops(model, shared.lengths, rows, before) == pytest.approx(3 * found)
    assert 3 * found == pytest.approx(both_ - 3 * unseen, rel=1e-6)
