"""Generation: what prompts share changes no reply, and neither do the habits that a base's settings bring along."""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from lora_ft import adapters, base, config, generate, tasks
from lora_ft.errors import DataError, LoraFtError
from lora_ft.generate import Sampling
from lora_ft.model import modes
from lora_ft.scoring import losses, metrics
from tests import tiny

GREEDY = Sampling(8)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Returns a tiny base, and the adapter on it where asked for, that changes what it says."""

    def made(architecture: str, adapted: bool = False) -> tuple[Any, Any]:
        folder = tiny.model_folder(tmp_path_factory.mktemp(architecture), architecture)
        task = tasks.get("seq2seq" if architecture == "t5" else "complete")
        loaded = base.load(str(folder), quant="none", model_class=task.model_class, dtype="float32", device="cpu")
        if not adapted:
            return loaded.model, loaded.tokenizer
        model = adapters.attach(loaded, config.LoraConfig(rank=4), peft_task=task.peft_task)
        for name, parameter in adapters.trained(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model, loaded.tokenizer

    return made


def prompts(common: int = 30, count: int = 5) -> list[list[int]]:
    """Returns prompts of different lengths that begin alike."""
    rng = random.Random(0)
    begin = [rng.randrange(6, tiny.VOCAB) for _ in range(common)]
    return [begin + [rng.randrange(6, tiny.VOCAB) for _ in range(3 * i + 1)] for i in range(count)]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("architecture", "shares"),
    [("llama", True), ("gpt2", True), ("gpt-neox", True), ("openai-gpt", False), ("t5", False)],
)
def test_sharing_changes_no_reply(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, architecture: str, shares: bool, adapted: bool
) -> None:
    model, tokenizer = load(architecture, adapted)
    asked = prompts()
    prefilled = []
    prefill = generate._prefilled
    monkeypatch.setattr(generate, "_prefilled", lambda model, ids: prefilled.append(len(ids)) or prefill(model, ids))
    together = generate.generate(model, tokenizer, asked, sampling=GREEDY)
    assert any(prefilled) is shares
    assert together == [generate.generate(model, tokenizer, [one], sampling=GREEDY)[0] for one in asked]
    assert len(set(together)) > 1
    monkeypatch.setattr(generate, "shared_length", lambda prompts: 0)
    assert generate.generate(model, tokenizer, asked, sampling=GREEDY) == together


def test_a_sliding_window_is_not_shared_since_it_counts_padding(tmp_path: Path) -> None:
    settings = transformers.MistralConfig(
        vocab_size=tiny.VOCAB, initializer_range=tiny.SPREAD, sliding_window=24, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.set_seed(0)
    model, tokenizer = transformers.MistralForCausalLM(settings), tiny.tokenizer()
    model.requires_grad_(False)
    together = generate.generate(model, tokenizer, prompts(), sampling=GREEDY)
    assert together == [generate.generate(model, tokenizer, [one], sampling=GREEDY)[0] for one in prompts()]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize(
    "habit",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3},
        {"min_new_tokens": 8, "suppress_tokens": list(range(6, 200))},
        {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.5},
    ],
    ids=lambda habit: next(iter(habit)),
)
def test_habits_of_the_base_change_no_reply(
    load: Callable[..., Any], architecture: str, habit: dict[str, Any], adapted: bool
) -> None:
    model, tokenizer = load(architecture, adapted)
    asked = prompts(count=4)
    plain = generate.generate(model, tokenizer, asked, sampling=GREEDY)
    inner = modes.unwrapped(model)
    inner.generation_config.update(**habit)
    assert generate.generate(model, tokenizer, asked, sampling=GREEDY) == plain
    assert all(getattr(inner.generation_config, key) == value for key, value in habit.items())


def test_the_habit_would_change_replies(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation of the test above."""
    model, tokenizer = load("llama")
    asked = prompts(count=4)
    plain = generate.generate(model, tokenizer, asked, sampling=GREEDY)
    model.generation_config.update(repetition_penalty=5.0)
    monkeypatch.setattr(generate, "KEPT_RULES", (*generate.KEPT_RULES, "repetition_penalty"))
    assert generate.generate(model, tokenizer, asked, sampling=GREEDY) != plain


def test_replies_end_with_the_positions(load: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load("gpt2")
    held = model.config.n_positions
    asked = [[tiny.VOCAB - 1] * length for length in (held - 2, 5, held)]
    with caplog.at_level("WARNING"):
        alone = [generate.generate(model, tokenizer, [p], sampling=Sampling(6))[0] for p in asked]
        together = generate.generate(model, tokenizer, asked, sampling=Sampling(6))
    assert together == alone
    assert "2 replies were cut at the last of the 512 positions" in caplog.text
    with pytest.raises(LoraFtError, match="has 513 tokens, and the model has positions for 512"):
        generate.generate(model, tokenizer, [[9] * (held + 1)], sampling=Sampling(6))


def test_a_temperature_draws_and_zero_does_not(load: Callable[..., Any]) -> None:
    model, tokenizer = load("llama")
    asked = prompts(count=2)
    drawn = set()
    for seed in range(4):
        transformers.set_seed(seed)
        drawn.add(tuple(generate.generate(model, tokenizer, asked, sampling=Sampling(8, 5.0))))
    assert len(drawn) > 1
    assert len({tuple(generate.generate(model, tokenizer, asked, sampling=GREEDY)) for _ in range(2)}) == 1


# What replies and losses are worth


def test_a_reference_that_is_not_json_is_named() -> None:
    with pytest.raises(DataError, match="reference 2 of 3 is not JSON: 'yes'") as caught:
        metrics.compute("json_match", ["1", "2", "3"], ["1", "yes", "[" * 100_000])
    assert len(caught.value.problems) == 2


def test_a_reply_of_any_kind_can_be_scored() -> None:
    replies = ["null", "no", "[" * 100_000, "9" * 10_000, '{"a": 1}', "[1]"]
    wanted = ["null", "null", "1", "1", '{"a": 1, "b": 2}', '["a"]']
    assert metrics.compute("json_match", replies, wanted) == {
        "json_match": pytest.approx(1 / 6), "json_match.a": 1.0, "json_match.b": 0.0
    }  # fmt: skip


def test_the_interval_of_many_rows_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = losses.np.random.default_rng(0)
    rows = 20_000
    before = losses.Losses(rng.normal(5, 1, rows), losses.np.ones(rows), losses.np.zeros(rows))
    after = losses.Losses(before.nll - 0.1 + rng.normal(0, 1, rows), before.count, before.right)
    largest = []
    percentile = losses.np.percentile
    default_rng = losses.np.random.default_rng

    class Watched:
        def __init__(self, seed: int) -> None:
            self.inner = default_rng(seed)

        def integers(self, low: int, high: int, shape: tuple[int, int]) -> Any:
            largest.append(shape[0] * shape[1] * 8)
            return self.inner.integers(low, high, shape)

    def counted(changes: Any, bounds: Any) -> Any:
        assert len(changes) == losses.BOOTSTRAP_DRAWS
        return percentile(changes, bounds)

    monkeypatch.setattr(losses.np.random, "default_rng", Watched)
    monkeypatch.setattr(losses.np, "percentile", counted)
    low, high = losses.difference_interval(before, after)
    assert max(largest) <= 50 * rows * 8
    assert (low, high) == losses.difference_interval(before, after)
    # The mean of 20,000 differences of spread 1 is known to 1.96 / sqrt(20,000).
    middle, half = after.mean - before.mean, 1.96 / rows**0.5
    assert (low, high) == (pytest.approx(middle - half, abs=half / 5), pytest.approx(middle + half, abs=half / 5))


def test_of_few_rows_there_is_no_interval() -> None:
    def losses_of(rows: int, mean: float) -> losses.Losses:
        return losses.Losses(np.full(rows, mean), np.ones(rows), np.zeros(rows))

    few, enough = losses.FEWEST_ROWS - 1, losses.FEWEST_ROWS
    for rows in (1, few):
        assert losses.difference_interval(losses_of(rows, 2.0), losses_of(rows, 1.0)) is None
    assert losses.difference_interval(losses_of(enough, 2.0), losses_of(enough, 1.0)) == (-1.0, -1.0)


def test_a_cache_written_in_place_is_the_cache_that_is_copied():
    torch.manual_seed(0)
    ours, theirs = generate.InPlaceLayer(), DynamicLayer()
    for step, tokens in enumerate([5, 1, 70, 1, 1]):
        new = torch.randn(2 if step < 2 else 6, 3, tokens, 8)
        if step == 2:
            ours.batch_repeat_interleave(3)
            theirs.batch_repeat_interleave(3)
        for mine, other in zip(ours.update(new, -new), theirs.update(new, -new), strict=True):
            assert torch.equal(mine, other)
    copy = deepcopy(ours)
    ours.update(torch.ones(6, 3, 1, 8), torch.ones(6, 3, 1, 8))
    assert torch.equal(copy.keys, theirs.keys)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_head_multiplies_states_that_lie_side_by_side(load: Callable[..., Any], architecture: str) -> None:
    model, tokenizer = load(architecture)
    head = model.get_output_embeddings()
    contiguous = []
    watch = head.register_forward_hook(lambda _, args, __: contiguous.append(args[0].is_contiguous()))
    generate.generate(model, tokenizer, prompts(common=0), sampling=GREEDY)
    assert contiguous
    assert all(contiguous)
    assert list(head._forward_pre_hooks) == []
    # What transformers hands over by itself, and would make a processor copy the weight for every row.
    contiguous.clear()
    model(input_ids=torch.tensor([prompts()[0][:9]] * 3), logits_to_keep=1)
    assert contiguous == [False]
    watch.remove()


@pytest.mark.parametrize(
    ("layers", "key_heads", "dtype", "times"),
    [(30, 3, torch.bfloat16, 2), (30, 3, torch.float32, 1), (32, 32, torch.bfloat16, 1)],
)
def test_a_batch_has_more_tokens_where_they_are_small(
    layers: int, key_heads: int, dtype: torch.dtype, times: int
) -> None:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": key_heads, "hidden_size": 64 * key_heads}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(dtype)
    assert generate._batch_tokens(model) == times * generate.BATCH_TOKENS


def test_a_model_without_heads_replies() -> None:
    made = transformers.MambaConfig(vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(made)
    assert len(generate.replies(model, tiny.tokenizer(), [[5, 6], [7]], sampling=Sampling(3))) == 2


def test_what_a_batch_held_is_given_back_before_the_next(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load("llama")
    done: list[str] = []
    monkeypatch.setattr(generate.heap, "give_back", lambda: done.append("given back"))
    generate.replies(
        model, tokenizer, [[5, 6]] * 5, sampling=GREEDY, most_rows=2, note=lambda rows: done.append(f"{rows} more")
    )
    assert done == ["2 more", "given back", "2 more", "given back", "1 more"]
