"""Who is who among the processes of a launcher, and which part of the work is whose."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from slm_pipeline.errors import UserError
from slm_pipeline.machine import ranks
from slm_pipeline.machine.ranks import Launched, Share, first_host

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "200000", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu[03-05,09],login", "SLURM_NTASKS": "4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Launched("torchrun", 3, 4, 1, "node7", 29500)),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
        # 20000 + (200000 * 101 + 2) % 12000
        (SRUN, Launched("srun", 2, 4, 0, "gpu03", 24002)),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}, Launched("srun", 2, 4, 0, "10.0.0.1", 5)),
        ({**SRUN, **TORCHRUN}, Launched("torchrun", 3, 4, 1, "node7", 29500)),  # torchrun, once on each node, by srun
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # the batch script is one process
    ],
)
def test_the_environment_says_who_a_process_is(environment, expected):
    assert Launched.of(environment) == expected


def test_half_an_environment_is_refused():
    lacking = {name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}
    for environment in (lacking, {**TORCHRUN, "RANK": "one"}):
        with pytest.raises(UserError, match="does not say which process this is: .*(MASTER_PORT|one)"):
            Launched.of(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("vm", "vm"), ("a1,b[2-3]", "a1"), ("gpu[03-05,09],login", "gpu03"), ("r[1-2]n[07,09]-x,z", "r1n07-x")],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("number", "processes"), [(7, 3), (3, 3), (16, 2)])
def test_each_piece_is_one_processs(number, processes, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: processes)
    found = []
    for rank in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        share = Share.of(number)
        assert share.divided
        assert number // processes <= len(share.numbers) <= -(-number // processes)
        found += share.numbers
    assert found == list(range(number))


def test_of_fewer_pieces_than_processes_each_does_all(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    sums = [torch.tensor([3.0, math.inf]), torch.tensor([4.0, 1.0]), torch.tensor([5.0, math.nan])]
    given = []
    monkeypatch.setattr(ranks, "summed", lambda values: given.append(values) or values)
    for rank, own in enumerate(sums):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        assert Share.of(2) == Share(range(2), divided=False)
        Share.of(2).summed(own)
    assert torch.equal(sum(given), sums[0])  # so that all go by the same


def test_a_group_of_somebody_elses_is_not_ours():
    distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        assert (ranks.count(), ranks.rank(), ranks.is_first()) == (1, 0, True)
        with ranks.together():
            assert (ranks.count(), ranks.rank(), ranks.is_first()) == (4, 3, False)
        assert ranks.count() == 1
    finally:
        distributed.destroy_process_group()
