"""Cutting a step: budgets kept, nothing lost, nothing twice, equally many a rank."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config

from posttrain.model.flops import attended_pairs, forward_flops, matrix_parameters
from posttrain.train.micro_batches import Planner, balance


def by_tokens(num_prompt: int, lengths: list[int]) -> float:  # type: ignore[type-arg]
    return float(num_prompt + sum(lengths))


def test_by_hand() -> None:
    """Budget 20: the long group in two parts with its prompt twice, the short ones together."""
    groups = [(10, [6, 5, 3]), (4, [3, 3]), (5, [2, 2])]
    ((*batches,),) = Planner(by_tokens, budget=20).plan(groups, 1)
    cut = sorted(
        sorted((part.group, part.completions, part.num_tokens) for part in batch)
        for batch in batches
    )
    assert cut == [[(0, (0, 1), 19)], [(0, (2,), 12), (1, (0, 1), 8)], [(2, (0, 1), 7)]]


def test_no_budget_is_a_group_a_micro_batch_and_dense_a_completion() -> None:
    groups = [(10, [6, 5, 3]), (4, [3, 3, 1])]
    assert [len(rank) for rank in Planner(by_tokens).plan(groups, 2)] == [1, 1]
    dense = Planner(by_tokens, budget=1_000, dense=True).plan(groups, 2)
    assert [len(rank) for rank in dense] == [3, 3]
    assert all(len(batch) == 1 and len(batch[0].completions) == 1 for r in dense for batch in r)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(
        st.tuples(st.integers(1, 60), st.lists(st.integers(1, 30), min_size=2, max_size=6)),
        min_size=1, max_size=4,
    ),
    st.one_of(st.none(), st.integers(1, 120)),
    st.booleans(),
)  # fmt: skip
def test_every_completion_once_and_budgets_kept(
    num_ranks: int, pattern: list, budget: int | None, dense: bool
) -> None:
    groups = [(p, list(lengths) * num_ranks) for p, lengths in pattern] * num_ranks
    plan = Planner(by_tokens, budget, dense).plan(groups, num_ranks)
    assert len({len(rank) for rank in plan}) == 1
    parts = [part for rank in plan for batch in rank for part in batch]
    seen = Counter((part.group, i) for part in parts for i in part.completions)
    assert seen == Counter(
        (i, j) for i, (_, lengths) in enumerate(groups) for j in range(len(lengths))
    )
    for part in parts:
        num_prompt, lengths = groups[part.group]
        assert part.num_tokens == num_prompt + sum(lengths[i] - 1 for i in part.completions)
    for rank in plan:
        for batch in rank:
            alone = len(batch) == 1 and len(batch[0].completions) == 1
            within = budget is None or dense or sum(p.num_tokens for p in batch) <= budget
            assert within or alone
    assert 0 < balance(plan) <= 1


def test_unequal_groups_are_balanced() -> None:
    groups = [(n, [10] * 4) for n in (4_000, 3_900, 4_100, 3_950, 100, 120, 90, 80)]
    assert (
        balance(Planner(by_tokens, budget=5_000).plan(groups, 2)) > 0.95
    )  # in the given order: 0.5


def test_operations_by_hand() -> None:
    config = Qwen2Config(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        num_hidden_layers=3, vocab_size=50,
    )  # fmt: skip
    assert attended_pairs(3, [2, 1]) == (1 + 2 + 3) + (3 + 1) + (3 + 2) + (3 + 1)
    # q and o: 8 x 8, k and v: 8 x 4, gate, up and down: 8 x 16
    assert matrix_parameters(config) == 3 * (2 * 64 + 2 * 32 + 3 * 128)
    assert forward_flops(config, 5, 19, 3) == pytest.approx(
        2 * 1_728 * 5 + 4 * 3 * 8 * 19 + 2 * 50 * 8 * 3
    )
