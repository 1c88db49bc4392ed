"""The batch scripts: what they ask Slurm for, what they run, and when they requeue themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm, Queued
from submission_assertions import opened

from trak_dist.cells import Cell, parse_cell
from trak_dist.configuration.config import CpuJobsConfig, SlurmConfig
from trak_dist.executors import batch
from trak_dist.executors.batch import BatchRequest
from trak_dist.plan import Plan
from trak_dist.store.run import Run

pytestmark = pytest.mark.slow

TEMPLATE = Path(__file__).parent.parent.parent / "launch" / "array.sbatch"
REQUEUE = """\
code=$?
task=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
if [ "$code" = 85 ] || [ "$code" -gt 128 ]; then
  for _ in 1 2 3; do state=$(squeue -h -j "$task" -o %T) && break; sleep 5; done
  if [ "$state" = RUNNING ]; then trap '' TERM; scontrol requeue "$task"; fi
fi
exit "$code\""""

Script = Callable[..., str]


@pytest.fixture
def run(launch, slurm_run, tmp_path: Path) -> Run:
    assert launch(*slurm_run, "stage=plan").code == 0
    return opened(tmp_path)


@pytest.fixture
def script(run: Run) -> Script:
    """The script of array 3 of a step, for some settings of the cluster."""

    def write(
        step: str,
        *,
        tasks: int = 1,
        dependency: str = "",
        processes: int = 1,
        **settings: object,
    ) -> str:
        array = BatchRequest(
            name=f"trak-{step}-3-0123456789ab",
            step=step,
            tasks=tasks,
            dependency=dependency,
            number=3,
            processes=processes,
        )
        return batch.script(run, SlurmConfig(**settings), array)  # type: ignore[arg-type]

    return write


def options(script: str) -> list[str]:
    lines = (line for line in script.splitlines() if line.startswith("#SBATCH --"))
    return [line.removeprefix("#SBATCH --") for line in lines]


def test_the_script_of_a_featurize_array(script: Script, run: Run) -> None:
    logs = run.layout.logs / "slurm" / "3"
    text = script(
        "featurize",
        tasks=7,
        partition="gpu",
        account="lab",
        qos="high",
        constraint="a100|h100",
        exclude="n[3,7-9]",
        time=90,
        signal_delay=100,
        array_parallelism=4,
        setup=("module load cuda", "source $HOME/venv/bin/activate"),
        sbatch={"reservation": "paper", "mail-type": "FAIL", "exclusive": True},
    )
    assert text == (
        f"""\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-6%4
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=2
#SBATCH --exclude='n[3,7-9]'
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --job-name=trak-featurize-3-0123456789ab
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL
#SBATCH --mem=9216M
#SBATCH --nodes=1
#SBATCH --open-mode=append
#SBATCH --output={logs}/%A_%a_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --reservation=paper
#SBATCH --signal=USR2@100
#SBATCH --time=90

# setup
export TRAK_DIST_LOG={logs}/"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_%t_log.out"
{{ module load cuda
}} || exit 1
{{ source $HOME/venv/bin/activate
}} || exit 1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {logs}/%A_%a_%t_log.out --cpus-per-task=2 --open-mode=append """
        f"""--wait=0 --kill-on-bad-exit=0 """
        f"""{sys.executable} -u -m trak_dist.task {run.layout.run_dir} 3


# teardown
{REQUEUE}"""
    )


def test_the_script_of_a_kernel_array(script: Script, run: Run) -> None:
    logs = run.layout.logs / "slurm" / "3"
    python = 'apptainer exec --nv --bind "$PWD" image.sif python'
    text = script(
        "kernel",
        tasks=2,
        dependency="afterok:1_0:1_1",
        partition="gpu",
        account="lab",
        qos="high",
        constraint="a100",
        cpu_jobs=CpuJobsConfig(partition="cpu", qos="normal"),
        memory_gb=1.5,
        cpus_per_task=6,
        python=python,
    )
    assert text == (
        f"""\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-1%2
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=6
#SBATCH --dependency=afterok:1_0:1_1
#SBATCH --job-name=trak-kernel-3-0123456789ab
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=1536M
#SBATCH --nodes=1
#SBATCH --open-mode=append
#SBATCH --output={logs}/%A_%a_0_log.out
#SBATCH --partition=cpu
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
export TRAK_DIST_LOG={logs}/"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}_%t_log.out"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {logs}/%A_%a_%t_log.out --cpus-per-task=6 --open-mode=append """
        f"""--wait=0 --kill-on-bad-exit=0 """
        f"""{python} -u -m trak_dist.task {run.layout.run_dir} 3


# teardown
{REQUEUE}"""
    )


@pytest.mark.parametrize(
    ("step", "settings", "gpus"),
    [
        ("train", {}, "1"),
        ("featurize", {"device": "cuda", "gpus_per_node": 2}, "2"),
        ("featurize", {"device": "cpu"}, None),
        ("featurize", {"gpus_per_node": 0}, None),
        ("kernel", {"device": "cuda"}, None),
        ("score", {}, None),
        ("report", {}, None),
        ("submit", {}, None),
    ],
)
def test_gpus_are_asked_for_where_they_are_used(
    script: Script, step: str, settings: dict[str, object], gpus: str | None
) -> None:
    asked = [o for o in options(script(step, **settings)) if o.startswith("gpu")]
    assert asked == ([f"gpus-per-node={gpus}"] if gpus else [])


def test_a_task_has_a_process_for_each_gpu_that_has_a_cell(script: Script) -> None:
    cells = tuple(parse_cell(f"featurize/0/train/{i}-{i + 1}") for i in range(4))
    chain = tuple(map(parse_cell, ("gram/0", "kernel/0")))

    def count(step: str, task: tuple[Cell, ...], **settings: object) -> int:
        return batch.processes(SlurmConfig(**settings), step, [task, task[:1]])  # type: ignore[arg-type]

    assert count("featurize", cells, gpus_per_node=3) == 3
    assert count("featurize", cells, gpus_per_node=8) == 4
    assert count("featurize", cells, gpus_per_node=8, device="cpu") == 1
    assert count("kernel", chain, gpus_per_node=8) == 1
    assert count("kernel", chain, sbatch={"ntasks_per_node": 2}) == 2
    assert count("featurize", cells, gpus_per_node=8, sbatch={"ntasks": "1"}) == 1
    asked = options(script("featurize", processes=3, gpus_per_node=3))
    assert {"ntasks-per-node=3", "gpus-per-node=3", f"mem={3 * 9216}M"} <= {*asked}


def test_memory_is_what_cells_the_users_data_and_libraries_take(run: Run) -> None:
    def asked(step: str, plan: Plan, processes: int = 1, **settings: object) -> float:
        array = BatchRequest(name="", step=step, tasks=1, dependency="", number=1)
        array = replace(array, processes=processes)
        return batch.memory_gb(plan, SlurmConfig(**settings), array)  # type: ignore[arg-type]

    assert 0 < run.plan.problem_bytes < 2**29
    plan = replace(run.plan, problem_bytes=3 * 2**30)
    # Libraries 1, CUDA 7, twice the user's 3, and what is begun of another.
    assert asked("featurize", plan) == 1 + 7 + 7
    assert asked("featurize", plan, processes=2) == 2 * 15
    assert asked("featurize", plan, gpus_per_node=0) == 1 + 7
    assert asked("report", plan) == 1 + 7
    assert asked("kernel", plan) == asked("score", plan) == asked("submit", plan) == 1 + 1
    assert asked("kernel", plan, memory_gb=0.5) == 0.5
    unmeasured = replace(plan, problem_bytes=0)
    assert asked("featurize", unmeasured, gpus_per_node=0) == 9
    assert asked("kernel", unmeasured) == 2


def test_every_step_without_a_gpu_goes_where_cpu_jobs_says(script: Script) -> None:
    elsewhere = CpuJobsConfig(
        partition="cpu", account="free", qos="low", constraint="epyc", exclude="c1"
    )
    for step in ("kernel", "score", "report", "submit"):
        asked = options(script(step, partition="gpu", cpu_jobs=elsewhere))
        for option in ("partition=cpu", "account=free", "qos=low", "constraint=epyc", "exclude=c1"):
            assert option in asked
    for step in ("train", "featurize"):
        asked = options(script(step, partition="gpu", cpu_jobs=elsewhere))
        assert "partition=gpu" in asked
        assert not [o for o in asked if o.startswith(("account", "qos", "constraint", "exclude"))]


def test_a_site_may_overrule_any_option(script: Script) -> None:
    asked = options(
        script("kernel", sbatch={"requeue": "no", "mem": 0, "kill-on-invalid-dep": "no"})
    )
    assert {"requeue=no", "mem=0", "kill-on-invalid-dep=no"} <= {*asked}


def test_paths_are_quoted(launch, slurm_run, tmp_path: Path) -> None:
    run_dir = tmp_path / "a \"run\" 'for' $HOME"
    quoted = str(run_dir).replace("\\", "\\\\").replace("'", "\\'")
    overrides = [o for o in slurm_run if not o.startswith("run_dir=")]
    assert launch(*overrides, f"run_dir='{quoted}'", "stage=plan").code == 0
    array = BatchRequest(name="n", step="featurize", tasks=1, dependency="", number=1)
    text = batch.script(Run.open(run_dir), SlurmConfig(python="show"), array)
    command = next(line for line in text.splitlines() if line.startswith("srun "))
    setup = next(line for line in text.splitlines() if line.startswith("export TRAK_DIST_LOG"))
    shown = subprocess.run(
        [
            "/bin/bash",
            "-c",
            f'srun() {{ printf "%s\\n" "$@"; }}\n{setup}\n{command}\necho "$TRAK_DIST_LOG"',
        ],
        capture_output=True,
        text=True,
        check=True,
        env={"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"},
    ).stdout.splitlines()
    assert shown[2] == f"{run_dir}/logs/slurm/1/%A_%a_%t_log.out"
    assert shown[-4:] == [
        "trak_dist.task",
        str(run_dir),
        "1",
        f"{run_dir}/logs/slurm/1/5_2_%t_log.out",
    ]


# Requeueing ---------------------------------------------------------------------------------------


def test_the_template_requeues_as_the_scripts_do() -> None:
    def logic(lines: list[str]) -> list[str]:
        return [line.strip() for line in lines if not line.startswith("task=")]

    lines = TEMPLATE.read_text().splitlines()
    assert logic(lines[lines.index("code=$?") :]) == logic(list(batch.REQUEUE))
    assert "\n".join(batch.REQUEUE) == REQUEUE
    header = {line for line in lines if line.startswith("#SBATCH")}
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= header
    assert any(line.startswith("#SBATCH --signal=USR2@") for line in header)


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
        (84, "RUNNING", False),
        (85, "RUNNING", True),
        (86, "RUNNING", False),
        (128, "RUNNING", False),
        (137, "RUNNING", True),
        (143, "RUNNING", True),
        (85, "COMPLETING", False),
        (137, "COMPLETING", False),
        (143, "PENDING", False),
        (137, None, False),
    ],
)
def test_who_asks_for_it_or_was_killed_is_requeued_unless_slurm_sees_to_it(
    fake_slurm: FakeSlurm, script: Script, tmp_path: Path, code: int, state: str, requeued: bool
) -> None:
    path = tmp_path / "script.sh"
    path.write_text(script("featurize"))
    fake_slurm.answer(srun_exits=f"{code}\n")
    for queued, environment, of_ours in (
        ("12_3", {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, path),
        ("12_3", {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, TEMPLATE),
        ("14", {"SLURM_JOB_ID": "14"}, TEMPLATE),
    ):
        fake_slurm.answer(calls="")
        fake_slurm.queue = [Queued(queued, "n", state=state)] if state else []
        environment["PATH"] = os.environ["PATH"]
        command = ["/bin/bash", str(of_ours), "RUN", "kernel"]
        ended = subprocess.run(command, env=environment, check=False)
        assert ended.returncode == code
        assert len(fake_slurm.calls("srun")) == 1
        asked = [["requeue", queued]] if requeued else []
        assert fake_slurm.calls("scontrol") == asked


def test_the_worker_is_not_run_where_the_setup_fails(
    fake_slurm: FakeSlurm, script: Script, tmp_path: Path
) -> None:
    path = tmp_path / "script.sh"
    path.write_text(script("featurize", setup=("A=1", "false", "echo never")))
    ended = subprocess.run(["/bin/bash", str(path)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert fake_slurm.calls("srun") == []
