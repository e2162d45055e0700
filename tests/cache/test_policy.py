"""Flush rules against a simulation of KIVI's steps, token by token."""

import pytest

from kvq.cache.policy import flush_rule
from kvq.recipe import load_recipe


def simulate_kivi(prompt: int, steps: int, residual: int):
    """Exact keys and values held after a prompt and after each decoded token, as the published code keeps them."""
    keys = prompt % residual if prompt >= residual else prompt
    values = min(prompt, residual)
    yield keys, values
    for _ in range(steps):
        keys += 1
        if keys == residual:
            keys = 0
        values = min(values + 1, residual)
        yield keys, values


def rules(window):
    recipe = load_recipe("kivi2").override({"tokens.window": window})
    return flush_rule(recipe.key, recipe.tokens), flush_rule(recipe.value, recipe.tokens)


@pytest.mark.parametrize(("prompt", "residual"), [(100, 32), (7, 32), (128, 128), (300, 128), (129, 128)])
def test_exact_tokens_follow_kivi_step_by_step(prompt, residual):
    key, value = rules(residual)
    for step, (keys, values) in enumerate(simulate_kivi(prompt, 300, residual)):
        stored = prompt + step
        assert stored - key.packed(stored) == keys
        assert stored - value.packed(stored) == values


def test_the_worked_example_with_a_window_of_32():
    """After a 100-token prompt keys have 4 exact tokens and values 32; 28 steps later 0 and 32."""
    key, value = rules(32)
    assert (100 - key.packed(100), 100 - value.packed(100)) == (4, 32)
    assert (128 - key.packed(128), 128 - value.packed(128)) == (0, 32)


def test_a_query_reads_the_state_before_its_own_step():
    """E3 boundaries: keys R * floor((n-1)/R), values max(0, n-1-R) for the n-th token."""
    key, value = rules(128)
    for n in (1, 128, 129, 256, 257, 1000):
        assert key.seen(n - 1) == 128 * ((n - 1) // 128)
        assert value.seen(n - 1) == max(0, n - 1 - 128)


def test_sinks_never_count_as_packed():
    recipe = load_recipe("int4").override({"tokens.sinks": 4, "tokens.window": 8})
    rule = flush_rule(recipe.key, recipe.tokens)
    assert [rule.packed(n) for n in (0, 4, 12, 13, 20)] == [0, 0, 0, 1, 8]


@pytest.mark.parametrize(("window", "unit"), [(0, 64), (64, 64), (128, 128)])
def test_gear_flushes_both_sides_in_blocks(window, unit):
    """The streaming buffer: g * floor((n-1)/g) tokens are read from pages by the n-th token."""
    recipe = load_recipe("gear2").override({"tokens.window": window})
    for side in (recipe.key, recipe.value):
        rule = flush_rule(side, recipe.tokens)
        for n in (1, 64, 65, 128, 129, 500):
            assert rule.seen(n - 1) == unit * ((n - 1) // unit)
