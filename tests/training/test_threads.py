from __future__ import annotations

import torch

from segfit.training.threads import ThreadChoice, kept_threads, thread_numbers


def run(choice: ThreadChoice, steps: int, seconds: dict[int, float]) -> list[int]:
    used = []
    for _ in range(steps):
        used.append(choice.number)
        choice.add(seconds[choice.number])
    return used


def test_all_threads_and_half_of_them_are_compared() -> None:
    assert [thread_numbers(available) for available in (1, 2, 3, 16)] == [(1,), (2, 1), (3, 1), (16, 8)]


def test_the_faster_number_stays_until_the_next_comparison() -> None:
    choice = ThreadChoice((2, 1))
    used = run(choice, 200, {2: 0.4, 1: 0.3})
    assert used[:10] == [2] * 10
    assert used[10:18] == [2, 1] * 4
    assert set(used[18:]) == {1}
    used = run(choice, 200, {2: 0.2, 1: 0.3})  # what else ran has ended
    assert set(used[:10]) == {1}
    assert used[10:18] == [2, 1] * 4
    assert set(used[18:]) == {2}


def test_a_small_gain_changes_nothing() -> None:
    assert set(run(ThreadChoice((2, 1)), 200, {2: 0.32, 1: 0.3})[18:]) == {2}


def test_one_number_is_never_compared() -> None:
    assert run(ThreadChoice((1,)), 50, {1: 0.1}) == [1] * 50


def test_the_number_of_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    with kept_threads():
        torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before
