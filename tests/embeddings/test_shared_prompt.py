import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from embeddings.shared_prompt import LEAST_SHARED_TOKENS, can_share, let_share, shared_inputs, shared_length

BEGINNING = list(range(1, LEAST_SHARED_TOKENS + 9))
PROMPTS = [[*BEGINNING, *rest] for rest in ([50, 51, 52], [60], [50, 61, 62, 63, 64])]
SIZES = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # wide enough that attention is far from even
    "initializer_range": 0.5,
}


def causal_lm(kind, **changes):
    torch.manual_seed(0)
    if kind == "llama":
        return let_share(LlamaForCausalLM(LlamaConfig(**SIZES, **changes)))
    return let_share(Qwen2ForCausalLM(Qwen2Config(**SIZES, **changes)))


def one_by_one(model, prompts):
    return torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_and_gradients_are_those_of_the_prompts_one_by_one(kind):
    model = causal_lm(kind)
    weight_NV = torch.randn(len(PROMPTS), SIZES["vocab_size"])

    expected_NV = one_by_one(model, PROMPTS)
    (expected_NV * weight_NV).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits_NV = model(**shared_inputs(PROMPTS, shared_length(PROMPTS), model.device)).logits[0]
    (logits_NV * weight_NV).sum().backward()

    torch.testing.assert_close(logits_NV, expected_NV, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() < 1e-5 * expected[name].abs().max(), name
    # prompts differ, or nothing would be shown
    assert (expected_NV[0] - expected_NV[2]).abs().max() > 0.1


def test_what_prompts_share_leaves_each_a_token_and_is_worth_a_pass():
    assert shared_length(PROMPTS) == len(BEGINNING)
    assert shared_length([BEGINNING, [*BEGINNING, 50]]) == len(BEGINNING) - 1
    assert shared_length([PROMPTS[0], PROMPTS[0]]) == len(PROMPTS[0]) - 1
    few = BEGINNING[: LEAST_SHARED_TOKENS - 1]
    assert shared_length([[*few, 50, 51], [*few, 60, 61]]) == 0
    assert shared_length(PROMPTS[:1]) == 0


def test_a_model_with_another_attention_stays_as_it_is():
    sliding = causal_lm("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    other = let_share(GPT2LMHeadModel(GPT2Config(vocab_size=70, n_embd=32, n_layer=1, n_head=2)))

    assert not can_share(sliding)
    assert not can_share(other)
    assert can_share(causal_lm("qwen2"))
    assert other(torch.tensor(PROMPTS[:1])).logits.shape[-1] == 70


def test_dropout_acts_on_what_is_attended_to_in_training_alone():
    model = causal_lm("llama", attention_dropout=0.5)
    inputs = shared_inputs(PROMPTS, shared_length(PROMPTS), model.device)

    with torch.no_grad():
        quiet = [model.eval()(**inputs).logits for _ in range(2)]
        noisy = [model.train()(**inputs).logits for _ in range(2)]

    torch.testing.assert_close(*quiet)
    assert (noisy[0] - noisy[1]).abs().max() > 0.01
    torch.testing.assert_close(quiet[0][0], one_by_one(model.eval(), PROMPTS), atol=1e-4, rtol=1e-4)
