"""What to set where sbatch refuses a job: each by Slurm's own text, those of version 22.05."""

from __future__ import annotations

import pytest

from trak_dist.executors.refusals import hint

NODE = (
    "cluster.partition=… or cluster.constraint=…, of nodes that have what a task asks for: "
    "cluster.gpus_per_node=2, cluster.cpus_per_task=3, cluster.memory_gb=5"
)


@pytest.mark.parametrize(
    ("answer", "mends"),
    [
        (
            "Memory specification can not be satisfied",
            "cluster.memory_gb=… with less than the 5 GiB that a task asks for",
        ),
        (
            "Invalid account or account/partition combination specified",
            (
                "cluster.account=… with cluster.partition=…, a pair of those that "
                "sacctmgr show assoc user=$USER lists"
            ),
        ),
        (
            "Invalid account",
            "cluster.account=…, one of those that sacctmgr show assoc user=$USER lists",
        ),
        (
            (
                "invalid partition specified: gpus\nsbatch: error: Batch job submission failed: "
                "Invalid partition name specified"
            ),
            "cluster.partition=…, one of those that sinfo lists for you",
        ),
        (
            "User's group not permitted to use this partition",
            "cluster.partition=…, one of those that sinfo lists for you",
        ),
        (
            "Invalid qos specification",
            "cluster.qos=…, one of those that sacctmgr show assoc user=$USER format=qos lists",
        ),
        (
            "Requested time limit is invalid (missing or exceeds some limit)",
            "cluster.time=… with less than 90 minutes; sinfo -o '%P %l' lists the limits",
        ),
        (
            "Invalid generic resource (gres) specification",
            (
                "cluster.gpus_per_node=2 asks for GPUs that cluster.partition does not have by "
                "that name: another partition, or cluster.gpus_per_node=0 and "
                "+cluster.sbatch.gres=… as your site says"
            ),
        ),
        ("Requested node configuration is not available", NODE),
        ("CPU count per node can not be satisfied", NODE),
        ("More processors requested than permitted", NODE),
        (
            "Invalid feature specification",
            "cluster.constraint=…, features that sinfo -o '%P %f' lists",
        ),
        ("Invalid node name specified", "cluster.exclude=…, names of nodes that sinfo -N lists"),
        (
            "Requested reservation is invalid",
            "+cluster.sbatch.reservation=…, one of scontrol show reservation that is yours",
        ),
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            (
                "ask for less: cluster.time=90 minutes, cluster.gpus_per_node=2, "
                "cluster.cpus_per_task=3, cluster.memory_gb=5; sacctmgr show qos lists the limits"
            ),
        ),
        ("Invalid mail type specification", "correct the setting it names"),
    ],
)
def test_a_refusal_names_the_setting_that_mends_it(answer: str, mends: str) -> None:
    said = f"sbatch: error: Batch job submission failed: {answer}"
    found = hint(said, to="cluster.", gb=5, gpus=2, cpus=3, minutes=90)
    assert found == f"{mends}; cluster.dry_run=true shows the script"


def test_jobs_that_go_elsewhere_are_mended_there() -> None:
    found = hint("Invalid qos", to="cluster.cpu_jobs.", gb=1, gpus=0, cpus=2, minutes=60)
    assert found.startswith("cluster.cpu_jobs.qos=…, ")
