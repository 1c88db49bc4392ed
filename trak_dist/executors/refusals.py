"""What to set where sbatch refuses a job, by what it says."""

from __future__ import annotations

_NODE = (
    "{to}partition=… or {to}constraint=…, of nodes that have what a task asks for: "
    "cluster.gpus_per_node={gpus}, cluster.cpus_per_task={cpus}, cluster.memory_gb={gb}"
)
# By a part of Slurm's own text (slurm_errno.c), the more special ones first.
_HINTS = {
    "Memory specification": "cluster.memory_gb=… with less than the {gb} GiB that a task asks for",
    "Invalid account or account/partition": "{to}account=… with {to}partition=…, a pair of those "
    "that sacctmgr show assoc user=$USER lists",
    "Invalid account": "{to}account=…, one of those that sacctmgr show assoc user=$USER lists",
    "partition": "{to}partition=…, one of those that sinfo lists for you",
    "Invalid qos": "{to}qos=…, one of those that sacctmgr show assoc user=$USER format=qos lists",
    "time limit is invalid": "cluster.time=… with less than {minutes} minutes; sinfo -o '%P %l' "
    "lists the limits",
    "gres": "cluster.gpus_per_node={gpus} asks for GPUs that {to}partition does not have by that "
    "name: another partition, or cluster.gpus_per_node=0 and +cluster.sbatch.gres=… as your site "
    "says",
    "node configuration": _NODE,
    "CPU count": _NODE,
    "processors": _NODE,
    "feature": "{to}constraint=…, features that sinfo -o '%P %f' lists",
    "node name": "{to}exclude=…, names of nodes that sinfo -N lists",
    "reservation": "+cluster.sbatch.reservation=…, one of scontrol show reservation that is yours",
    "accounting/QOS policy": "ask for less: cluster.time={minutes} minutes, "
    "cluster.gpus_per_node={gpus}, cluster.cpus_per_task={cpus}, cluster.memory_gb={gb}; "
    "sacctmgr show qos lists the limits",
}


def hint(answer: str, *, to: str, gb: int, gpus: int, cpus: int, minutes: int) -> str:
    """What the user can do about sbatch's answer.

    Parameters
    ----------
    to : str
        Where the settings are that say where the tasks go: `cluster.`, or `cluster.cpu_jobs.`.
    gb, gpus, cpus, minutes : int
        What a task asks for.
    """
    found = (mend for text, mend in _HINTS.items() if text.lower() in answer.lower())
    mend = next(found, "correct the setting it names")
    asked = mend.format(to=to, gb=gb, gpus=gpus, cpus=cpus, minutes=minutes)
    return f"{asked}; cluster.dry_run=true shows the script"
