"""Policies and reward ensembles against plain transformers on a padded batch; saving them."""

import copy
import json
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensorMode,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from fastalign import losses, ops
from fastalign.data.packing import pack
from fastalign.data.tokenizer import train_tokenizer
from fastalign.errors import UserError
from fastalign.models import Policy, RewardEnsemble, load_tokenizer, scratch
from fastalign.models.attention import attention
from fastalign.models.reward import EnsembleConfig, check_same_tokenizer
from fastalign.testing import TOLERANCES, assert_no_worse

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}
SEQUENCES = [[5, 9, 3, 250], [7, 8], list(range(1, 12)), [20, 19, 18, 17, 16]]
PROMPTS = [2, 1, 4, 3]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words", "to make a tokenizer of"], 300)


def llama(kv_heads=2, seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=kv_heads)
    )
    for parameter in model.parameters():  # peaked logits, as after training
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def bert(seed=0):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SMALL, num_attention_heads=4), add_pooling_layer=False)


def padded(sequences, side="right"):
    longest = max(len(s) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        ids[i, : len(s)], mask[i, : len(s)] = torch.tensor(s), 1
    return ids, mask


def padded_forward(policy, dtype=torch.float32):
    """(log-probs, entropies, hidden) at the response positions, by transformers and log_softmax."""
    model = policy.model.to(dtype)
    ids, mask = padded(SEQUENCES)
    with attention(model, "eager"):
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    logp = out.logits.log_softmax(-1)
    token = logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    rows = [(i, t) for i, s in enumerate(SEQUENCES) for t in range(PROMPTS[i] - 1, len(s) - 1)]
    i, t = torch.tensor(rows).T
    return token[i, t], entropy[i, t], out.hidden_states[-1][i, t]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_policy_packed_equals_padded(kv_heads):
    policy = Policy(llama(kv_heads), value_head=True)
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.down.weight)
    packed = pack(SEQUENCES, PROMPTS)
    logp, entropy = policy.logprobs(packed, return_entropy=True)
    hidden = policy.hidden(packed)[packed.kept]
    assert torch.equal(policy.response_hidden(packed), hidden)
    values = policy.values(hidden)
    assert entropy is not None
    eager_logp, eager_entropy, eager_hidden = padded_forward(policy)
    eager_values = policy.values(eager_hidden)
    true_logp, true_entropy, true_hidden = padded_forward(policy, torch.float64)
    true_values = policy.value_head.double().down(torch.relu(policy.value_head.up(true_hidden)))[
        :, 0
    ]
    assert packed.kept.numel() == 2 + 1 + 7 + 2 == logp.numel()
    assert_no_worse(logp, eager_logp, true_logp, torch.float32)
    assert_no_worse(entropy, eager_entropy, true_entropy, torch.float32)
    assert_no_worse(hidden, eager_hidden, true_hidden, torch.float32)
    assert_no_worse(values, eager_values, true_values, torch.float32)
    assert values.std() > 0.01 and values.dtype == torch.float32


ADVANTAGES = torch.linspace(-2, 2, 12)
REFERENCE = torch.linspace(-7, -3, 12)


@pytest.mark.parametrize("loss", [losses.MLE(), losses.APA(lambda_=0.5)], ids=["sft", "apa"])
def test_gradients_of_a_step_equal_those_of_a_padded_batch(loss):
    policy = Policy(llama())
    needs = {"advantages": ADVANTAGES, "ref_logp": REFERENCE}
    inputs = {name: needs[name] for name in loss.required}

    def gradients():
        found = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
        policy.model.zero_grad()
        return found

    packed = pack(SEQUENCES, PROMPTS)
    out = ops.linear_loss(
        policy.response_hidden(packed),
        policy.head_weight,
        packed.response_targets,
        loss,
        inputs,
        normalizer=12,
    )
    out.loss.backward()
    ours = gradients()

    def by_autograd(dtype):
        logp = padded_forward(policy, dtype)[0]
        if isinstance(loss, losses.MLE):
            total = -logp.sum() / 12
        else:
            total = ((logp - ADVANTAGES / 0.5 - REFERENCE) ** 2).sum() / 12
        total.backward()
        return total.detach(), gradients()

    eager_loss, eager = by_autograd(torch.float32)
    true_loss, truth = by_autograd(torch.float64)
    assert_no_worse(out.loss.detach(), eager_loss, true_loss, torch.float32)
    largest = max(g.abs().max() for g in truth.values())
    for name in truth:
        # Relative to the largest gradient of the model, so that tiny ones are not judged alone.
        got, plain, true = (
            torch.cat([found[name].flatten() / largest, torch.ones(1)])
            for found in (ours, eager, truth)
        )
        assert_no_worse(got, plain, true, torch.float32, grad=True)


def test_a_forward_pass_never_reads_the_device(monkeypatch):
    """Fake tensors hold nothing: whatever would make the host wait for CUDA is an error. The loss
    head, an op of its own, is told that no row is to be dropped."""
    ignored = []
    plain = ops.linear_logprobs

    def head(*tensors, ignore_index=-100, **options):
        ignored.append(ignore_index)
        return plain(*tensors, ignore_index=ignore_index, **options)

    monkeypatch.setattr(ops, "linear_logprobs", head)
    policy = Policy(llama(), value_head=True)
    ensemble = RewardEnsemble(llama().model, EnsembleConfig(n_heads=3))
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        policy, ensemble, packed = copy.deepcopy((policy, ensemble, pack(SEQUENCES, PROMPTS)))
    with mode:
        logp, entropy = policy.logprobs(packed, return_entropy=True)
        assert entropy is not None and logp.shape == entropy.shape == (12,)
        assert policy.logprobs(packed)[0].shape == (12,) and ignored == [None, None]
        assert policy.values(policy.response_hidden(packed)).shape == (12,)
        assert ensemble(packed).shape == (4, 3)
        with pytest.raises(DataDependentOutputException):
            packed.cu_seqlens.diff().tolist()
        with pytest.raises(DynamicOutputShapeException):
            logp[logp > 0]


def test_scores_packed_equal_padded_for_decoder_and_encoder():
    for trunk in (llama().model, bert()):
        ensemble = RewardEnsemble(trunk, EnsembleConfig(n_heads=3)).eval()
        scores = ensemble(pack(SEQUENCES))
        ids, mask = padded(SEQUENCES)

        def by_transformers(dtype, trunk=trunk, ids=ids, mask=mask, ensemble=ensemble):
            with attention(trunk.to(dtype), "eager"):
                out = trunk(input_ids=ids, attention_mask=mask).last_hidden_state
            last = out[torch.arange(4), mask.sum(1) - 1]
            return last @ ensemble.weight.to(dtype).T

        eager = by_transformers(torch.float32)
        assert_no_worse(scores, eager, by_transformers(torch.float64), torch.float32)
        assert scores.shape == (4, 3) and scores.std() > 0.1


def test_a_saved_policy_is_a_plain_transformers_model(tmp_path, tokenizer):
    policy = Policy(llama(), value_head=True)
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.down.weight)
    policy.save(tmp_path, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([SEQUENCES[2]])
    with attention(policy.model, "sdpa"):
        assert torch.equal(plain(ids).logits, policy.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    again = Policy.load(str(tmp_path), tokenizer, value_head=True)
    ours, theirs = policy.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert "value_head.down.weight" in theirs


def test_frozen_copy_has_its_own_weights():
    policy = Policy(llama(), value_head=True)
    twin = policy.frozen_copy()
    packed = pack(SEQUENCES, PROMPTS)
    before = twin.logprobs(packed)[0]
    assert torch.equal(before, policy.eval().logprobs(packed)[0])
    with torch.no_grad():
        policy.head_weight.mul_(2.0)
    assert torch.equal(before, twin.logprobs(packed)[0])
    assert twin.value_head is None and not any(p.requires_grad for p in twin.parameters())
    with pytest.raises(ValueError, match="without a value head"):
        twin.values(torch.zeros(1, 32))


def test_a_head_that_scales_its_logits_is_refused():
    config = CohereConfig(**SMALL, num_attention_heads=4, logit_scale=0.25, pad_token_id=0)
    with pytest.raises(UserError, match="CohereForCausalLM: a pack does not give"):
        Policy(CohereForCausalLM(config))
    config.logit_scale = 1.0
    assert Policy(CohereForCausalLM(config)).head_weight.shape == (300, 32)


def test_positions_with_an_offset_are_refused():
    """RoBERTa counts positions from its padding id + 1; a pack counts from 0."""
    config = RobertaConfig(**SMALL, num_attention_heads=4, max_position_embeddings=40)
    with pytest.raises(UserError, match="RobertaModel: a pack does not give"):
        RewardEnsemble(RobertaModel(config, add_pooling_layer=False), EnsembleConfig())


def test_ensemble_saved_and_loaded_is_bit_equal(tmp_path, tokenizer):
    config = EnsembleConfig(n_heads=3, statistic="lcb", coef=0.5, head_seed=7)
    ensemble = RewardEnsemble(bert(), config).eval()
    ensemble.standardise(ensemble(pack(SEQUENCES)))
    ensemble.save(tmp_path, tokenizer)
    again = RewardEnsemble.load(str(tmp_path)).eval()
    assert again.config == config
    assert json.loads((tmp_path / "reward_ensemble.json").read_text())["statistic"] == "lcb"
    ours, theirs = ensemble.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    scores = ensemble(pack(SEQUENCES))
    assert torch.equal(scores, again(pack(SEQUENCES)))
    expected = scores.mean(1) - 0.5 * scores.std(1)
    assert_no_worse(again.reduce(scores), expected, expected.double(), torch.float32)


def test_heads_start_apart_and_the_same_each_time():
    def heads(seed, n=4):
        return RewardEnsemble(bert(), EnsembleConfig(n_heads=n, head_seed=seed)).weight.detach()

    first = heads(0)
    assert torch.equal(first, heads(0)) and torch.equal(first[:2], heads(0, 2))
    both = torch.cat([first, heads(1)])  # no head of one seed is a head of another
    assert torch.corrcoef(both).fill_diagonal_(0).abs().max() < 0.7
    assert torch.corrcoef(first).fill_diagonal_(0).abs().max() < 0.6
    assert 0.7 < (first * 32**0.5).std() < 1.3
    wide = RewardEnsemble(bert(), EnsembleConfig(n_heads=4, head_init=3.0)).weight.detach()
    assert torch.allclose(wide, 3.0 * first)


def test_standardise_gives_mean_0_and_deviation_1():
    ensemble = RewardEnsemble(bert(), EnsembleConfig(n_heads=3)).eval()
    with torch.no_grad():
        ensemble.weight.mul_(torch.tensor([[1.0], [20.0], [0.1]]))
        ensemble.bias.copy_(torch.tensor([5.0, -3.0, 0.0]))
    sequences = pack([[i, 2 * i, 3 * i + 1] for i in range(1, 60)])
    for _ in range(2):  # again on its own result: nothing changes
        ensemble.standardise(ensemble(sequences))
        scores = ensemble(sequences)
        floor = 1e2 * TOLERANCES[torch.float32].floor  # means of 59 numbers near 5 in float32
        assert scores.mean(0).abs().max() < floor
        assert (scores.std(0) - 1).abs().max() < floor


def test_scratch_sizes_are_what_they_say(tokenizer):
    for name, low, high in (("1m", 0.9e6, 1.4e6), ("2m", 1.6e6, 2.2e6), ("3m", 2.3e6, 3.0e6)):
        model = scratch.build(f"scratch:{name}", tokenizer, 128, AutoModelForCausalLM)
        assert low < sum(p.numel() for p in model.parameters()) < high
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert Policy(model).max_length == 128
    with pytest.raises(UserError, match="unknown model 'scratch:7m': expected scratch: and one of"):
        scratch.build("scratch:7m", tokenizer, 128, AutoModelForCausalLM)


def test_what_does_not_load_is_said(tmp_path, tokenizer):
    with pytest.raises(UserError, match=f"no model folder at {tmp_path}/nothing"):
        Policy.load(f"{tmp_path}/nothing", tokenizer)
    with pytest.raises(UserError, match="no model folder at runs/sft/nothing"):
        load_tokenizer("runs/sft/nothing")
    with pytest.raises(UserError, match="no tokenizer found at"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no model loads from"):
        Policy.load(str(tmp_path), tokenizer)
    with pytest.raises(UserError, match="reward_ensemble.json is missing"):
        RewardEnsemble.load(str(tmp_path))
    llama().save_pretrained(tmp_path)
    big = train_tokenizer(["words and more words of many kinds " + str(i) for i in range(99)], 320)
    assert len(big) > 300
    with pytest.raises(UserError, match="has 300 embeddings, its tokenizer .* tokens"):
        Policy.load(str(tmp_path), big)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="no model loads from"):
        Policy.load(str(tmp_path), tokenizer)


def test_ensembles_that_make_no_sense_are_refused(tokenizer):
    with pytest.raises(UserError, match="expected n_heads >= 1, got 0"):
        EnsembleConfig(n_heads=0)
    with pytest.raises(UserError, match="expected a statistic of .*, got 'max'"):
        EnsembleConfig(statistic="max")
    other = train_tokenizer(["other words"], 280)
    check_same_tokenizer(tokenizer, tokenizer, "a", "b")
    with pytest.raises(UserError, match=r"'a' and the reward model 'b' have different tokenizers"):
        check_same_tokenizer(tokenizer, other, "a", "b")


@pytest.mark.parametrize("entropies", [False, True])
def test_under_autocast_log_probs_are_bfloat16s_and_no_worse_than_transformers(entropies):
    """Weights stay float32; a step's gradients arrive in float32."""
    policy = Policy(llama())
    packed = pack(SEQUENCES, PROMPTS)
    exact = policy.logprobs(packed)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = policy.logprobs(packed, return_entropy=entropies)
        eager_logp, eager_entropy, _ = padded_forward(policy)
    assert logp.dtype == torch.float32
    assert (logp - exact).abs().max() > 1e-3  # it is bfloat16 that computed
    logp.mean().backward()
    grads = [p.grad for p in policy.model.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)
    truth, true_entropy, _ = padded_forward(policy, torch.float64)
    assert_no_worse(logp.detach(), eager_logp.detach(), truth.detach(), torch.bfloat16)
    if entropy is not None:
        assert_no_worse(
            entropy.detach(), eager_entropy.detach(), true_entropy.detach(), torch.bfloat16
        )
