"""When to push: against a plain enumeration of epochs, and with the learning rates of real schedulers."""

from __future__ import annotations

import logging
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from protopush import InputError, PushSchedule

EPOCHS = 24


def optimizer(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates])


def asked(schedule: PushSchedule, steps, epochs: int = EPOCHS) -> list[int]:
    """The epochs, counted from 1, after which a loop with this optimizer and scheduler would push."""
    one, scheduler = steps
    found = []
    for epoch in range(epochs):
        one.step()
        if scheduler is not None:
            scheduler.step()
        if schedule.due(epoch, one):
            found.append(epoch + 1)
    return found


# -- epochs -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_contract():
    schedule = PushSchedule()
    assert [e for e in range(60) if schedule.due(e)] == [e for e in range(60) if (e + 1) >= 10 and (e + 1) % 5 == 0]


@pytest.mark.parametrize(("start", "interval", "end"), list(product([0, 1, 4, 10, 23], [1, 2, 5, 30], [None, 23, 24])))
def test_epochs_are_those_of_a_plain_enumeration(start, interval, end):
    wanted, number = [], 0
    while number < EPOCHS:  # multiples of the interval, one by one
        number += interval
        if number > EPOCHS:
            break
        if number < start or (end is not None and number > end):
            continue
        wanted.append(number)
    schedule = PushSchedule(start, interval, end)
    assert schedule.planned(EPOCHS) == wanted
    assert [epoch + 1 for epoch in range(EPOCHS) if schedule.due(epoch)] == wanted
    assert asked(schedule, (optimizer(0.1), None)) == wanted  # a constant rate has no decay


def test_numpys_epochs_count_as_well():
    assert [e for e in np.arange(20) if PushSchedule().due(e)] == [9, 14, 19]


# -- the final decay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.4])
def test_the_final_decay_of_a_cosine(share):
    one = optimizer(0.4, 0.004)
    steps = (one, lr_scheduler.CosineAnnealingLR(one, EPOCHS))
    rates = [(1 + math.cos(math.pi * (e + 1) / EPOCHS)) / 2 for e in range(EPOCHS)]  # as that epoch's end finds it
    wanted = [e + 1 for e in range(EPOCHS) if rates[e] >= share]
    found = asked(PushSchedule(1, 1, final_decay=share), steps)
    # the rate falls to about 1e-17 where the cosine says 0
    assert found == wanted
    assert (len(found) < EPOCHS) == (share > 0)


def test_one_cycle_knows_its_peak_before_it_is_reached():
    one = optimizer(1e-5)
    cycle = lr_scheduler.OneCycleLR(one, max_lr=0.5, total_steps=EPOCHS + 1, div_factor=25)
    found = asked(PushSchedule(1, 1, final_decay=0.1), (one, cycle))
    again = optimizer(1e-5)
    plain = lr_scheduler.OneCycleLR(again, max_lr=0.5, total_steps=EPOCHS + 1, div_factor=25)
    wanted = []
    for epoch in range(EPOCHS):
        again.step()
        plain.step()
        if again.param_groups[0]["lr"] >= 0.1 * 0.5:
            wanted.append(epoch + 1)
    assert found == wanted
    assert 0 < wanted[-1] < EPOCHS


def test_a_peak_that_only_the_loop_has_seen():
    schedule = PushSchedule(1, 1)
    one = optimizer(0.0)
    found = []
    for epoch, rate in enumerate([0.01, 1.0, 0.2, 0.09, 0.11, 0.05]):  # set by hand, as some loops do
        one.param_groups[0]["lr"] = rate
        found.append(schedule.due(epoch, one))
    assert found == [True, True, True, False, True, False]
    assert schedule.peaks == [1.0]


def test_one_group_that_still_learns_is_no_final_decay():
    schedule = PushSchedule(1, 1)
    both = optimizer(1.0, 1.0)
    assert schedule.due(0, both)
    both.param_groups[0]["lr"] = 0.001
    assert schedule.due(1, both)
    both.param_groups[1]["lr"] = 0.001
    assert not schedule.due(2, both)
    assert not schedule.due(2, [both])  # several optimizers, as Lightning has them
    both.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.01})  # unfrozen later
    assert schedule.due(3, both)


def test_groups_that_never_learn_are_left_out():
    assert PushSchedule(1, 1).due(0, optimizer(0.0, 0.0))
    frozen = optimizer(0.0, 1.0)
    schedule = PushSchedule(1, 1)
    assert schedule.due(0, frozen)
    frozen.param_groups[1]["lr"] = 0.01
    assert not schedule.due(1, frozen)


def test_rates_as_numbers_and_tensors():
    schedule = PushSchedule(10, 5)
    assert schedule.due(14, lr=2e-4, peak_lr=1e-3)
    assert schedule.due(14, lr=1e-4, peak_lr=1e-3)
    assert not schedule.due(14, lr=9e-5, peak_lr=1e-3)
    assert schedule.peaks == []  # what is told is not remembered
    assert schedule.due(9, lr=1.0)
    assert not schedule.due(14, lr=0.05)
    assert PushSchedule(1, 1, final_decay=0).due(0, lr=0.0, peak_lr=1.0)
    capturable = optimizer(1.0)
    capturable.param_groups[0]["lr"] = torch.tensor(0.5)
    assert PushSchedule(1, 1).due(0, capturable)


def test_a_push_that_the_decay_takes_away_is_told(caplog):
    with caplog.at_level(logging.INFO, "protopush.push.schedule"):
        PushSchedule().due(13, lr=0.01, peak_lr=1.0)
        assert not caplog.messages  # none was due
        PushSchedule().due(14, lr=0.01, peak_lr=1.0)
    assert caplog.messages == [
        "No push after epoch 15: the learning rate is at 0.01 of its peak, below final_decay 0.1"
    ]


def test_state_goes_on_in_another_process():
    first = PushSchedule(1, 1)
    one = optimizer(1.0)
    assert first.due(0, one)
    one.param_groups[0]["lr"] = 0.05
    other = PushSchedule(1, 1)
    assert other.due(1, one)  # it knows of no other rate
    other.load_state_dict(first.state_dict())
    assert not other.due(1, one)
    assert other.state_dict() == first.state_dict() == {"peaks": [1.0]}


# -- what makes no sense ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"interval": 0}, "interval is 0; expected a whole number, at least 1"),
        ({"interval": -5}, "interval is -5"),
        ({"start": -1}, "start is -1; expected a whole number, at least 0"),
        ({"start": 2.5}, "start is 2.5; expected a whole number"),
        ({"interval": True}, "interval is True"),
        ({"end": 9}, "end is 9 but start is 10"),
        ({"end": 0, "start": 0}, "end is 0; expected a whole number, at least 1"),
        ({"total_epochs": 0}, "total_epochs is 0"),
        ({"total_epochs": 9}, "no push would follow any of 9 epochs with start 10, interval 5;"),
        ({"start": 11, "end": 14, "total_epochs": 30}, "interval 5 and end 14"),
        ({"final_decay": 1.5}, "final_decay is 1.5"),
        ({"final_decay": math.nan}, "final_decay is nan"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options, told):
    with pytest.raises(InputError, match=told.replace(".", r"\.")) as caught:
        PushSchedule(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ({"epoch": -1}, "epoch is -1"),
        ({"epoch": 9, "lr": math.nan}, "learning rate is nan"),
        ({"epoch": 9, "lr": -1.0}, "learning rate is -1.0"),
        ({"epoch": 9, "lr": 1.0, "peak_lr": math.inf}, "learning rate is inf"),
        ({"epoch": 9, "peak_lr": 1.0}, "peak_lr without lr"),
        ({"epoch": 9, "optimizer": optimizer(1.0), "lr": 1.0}, "expected one of them"),
        ({"epoch": 9, "optimizer": 3}, "int has no param_groups"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(question, told):
    with pytest.raises(InputError, match=told):
        PushSchedule().due(**question)


def test_planned_wants_the_number_of_epochs():
    assert PushSchedule(total_epochs=16).planned() == [10, 15]
    with pytest.raises(InputError, match="needs the number of epochs"):
        PushSchedule().planned()
