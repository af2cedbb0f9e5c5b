"""Samples side by side: how they are divided, and that they teach what the whole batch does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_fakes import SCHEME, tiny_configuration, tiny_recipe

from segfit.training.batch import Batch
from segfit.training.learner import Learner
from segfit.training.side_by_side import SideBySide, best_groups
from segfit.training.threads import kept_threads

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("threads", "samples", "least", "groups"),
    [(2, 2, 1, 2), (2, 2, 2, 1), (1, 4, 1, 1), (2, 1, 1, 1), (16, 2, 1, 2), (3, 2, 1, 2), (4, 9, 1, 4), (4, 4, 2, 2)],
)
def test_groups(threads: int, samples: int, least: int, groups: int) -> None:
    assert best_groups(threads, samples, least) == groups


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize(("ndim", "samples"), [(2, 2), (2, 3), (3, 4)])
def test_groups_teach_what_the_batch_does(
    optimizer: str, ndim: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tiny_configuration(ndim).model_copy(update={"batch_size": samples})
    recipe = tiny_recipe(optimizer=optimizer, augmentation={})
    shape = (samples, 1, *configuration.patch_size)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    labels = (image > 0.5).to(torch.int16)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    used: list[int] = []
    backward = SideBySide.backward

    def counted(self: SideBySide, network: Any, batches: Sequence[Tensor], *rest: Any) -> Tensor:
        used.append(len(batches))
        return backward(self, network, batches, *rest)

    monkeypatch.setattr(SideBySide, "backward", counted)
    for threads in (1, 2):
        learner = Learner(configuration, recipe, SCHEME, CPU, seed=0)
        with kept_threads(threads):
            values = [
                learner.step(Batch(image, labels), learning_rate=0.01, rng=np.random.default_rng(step))
                for step in range(3)
            ]
            assert torch.get_num_threads() == threads
        found.append((torch.stack(values), learner.tensors()))
    assert used == [2, 2, 2]
    (plain, plain_tensors), (beside, beside_tensors) = found
    torch.testing.assert_close(beside, plain, rtol=1e-4, atol=1e-5)
    for name, tensor in plain_tensors.items():
        torch.testing.assert_close(beside_tensors[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_work_is_done_in_order_and_errors_are_raised() -> None:
    apart = SideBySide(CPU)
    with kept_threads(2):
        assert apart.arrange(4) == 2
        assert apart.map(lambda number: (number, torch.get_num_threads()), range(3)) == [(0, 1), (1, 1), (2, 1)]
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError):
            apart.map(lambda number: 1 // number, [1, 0])
    with kept_threads(1):
        assert apart.arrange(4) == 1
        assert apart.map(str, [1, 2]) == ["1", "2"]
    assert SideBySide(torch.device("cuda")).arrange(4) == 1
