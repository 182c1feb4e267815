"""What the number of a step decides: literal rates, the residual warm-up, orders."""

from dataclasses import replace

import pytest

from tests.torchimpl.training.test_loop import CONFIG
from torchimpl.training import schedule


def test_rates_by_hand():
    config = replace(CONFIG, learning_rate=1.0, warmup=0.2, final=0.1)
    rates = [schedule.learning_rate(config, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.55)
    assert rates[4] == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    linear = replace(config, schedule="linear")
    assert schedule.learning_rate(linear, 6, 10) == pytest.approx(0.55)
    assert schedule.learning_rate(linear, 4, 10) == pytest.approx(0.775)
    assert schedule.learning_rate(replace(config, schedule="constant"), 9, 10) == 1.0
    assert schedule.learning_rate(replace(config, warmup=0.0), 0, 10) == 1.0


def test_the_residual_scale_rises_from_0_to_1():
    assert [schedule.residual_scale(0.4, step, 10) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.residual_scale(0.0, 0, 10) == 1.0


def test_every_epoch_sees_every_example_in_an_order_of_its_own():
    orders = [schedule.order(3, epoch, 11).tolist() for epoch in range(4)]
    assert all(sorted(made) == list(range(11)) for made in orders)
    assert len({tuple(made) for made in orders}) == 4
    assert schedule.order(3, 2, 11).tolist() == orders[2]
    assert schedule.order(4, 2, 11).tolist() != orders[2]
