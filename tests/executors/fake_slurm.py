"""Commands that stand in for Slurm's: each logs its calls, and answers from a test's files.

sbatch puts its tasks into the queue that squeue tells; nothing ever runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

USER = "ada"
COMMANDS = {
    "sbatch": r"""
read -r job <"$home/last_job"
job=$((job + 1))
echo "$job" >"$home/last_job"
/bin/cp "$1" "$home/scripts/$job"
if [ -e "$home/refused/$job" ] && [ ! -e "$home/taken/$job" ]; then
  /bin/cat "$home/refused/$job" >&2
  exit 1
fi
qos=normal account=default reason=Priority
while IFS= read -r line; do
  case $line in
    "#SBATCH --job-name="*) name=${line#*=} ;;
    "#SBATCH --array="*) last=${line#*=0-} last=${last%%%*} ;;
    "#SBATCH --qos="*) qos=${line#*=} ;;
    "#SBATCH --account="*) account=${line#*=} ;;
    "#SBATCH --dependency="*) reason=Dependency ;;
  esac
done <"$1"
task=0
while [ "$task" -le "$last" ]; do
  echo "${job}_$task|$name|PENDING|$reason||$qos|$account|$LOGNAME" >>"$home/queue"
  task=$((task + 1))
done
if [ -e "$home/refused/$job" ]; then
  /bin/cat "$home/refused/$job" >&2
  exit 1
fi
echo "Submitted batch job $job"
""",
    "squeue": r"""
user= job= format=
while [ $# -gt 0 ]; do
  case $1 in
    -u) user=$2 ;;
    -j) job=$2 ;;
    -o) format=$2 ;;
  esac
  shift
done
while IFS="|" read -r id name state reason node qos account owner; do
  [ "${user:-$owner}" = "$owner" ] && [ "${job:-$id}" = "$id" ] || continue
  case $format in
    *%j*) echo "$id|$name|$state|$reason|$node" ;;
    *%q*) echo "$qos|$account" ;;
    *) echo "$state" ;;
  esac
done <"$home/queue"
""",
    "scontrol": r"""
case "$*" in
  "show config") /bin/cat "$home/config" ;;
  "-a -o show partition") /bin/cat "$home/partitions" ;;
esac
""",
    "sacctmgr": r"""
case "$*" in
  *"show assoc"*) /bin/cat "$home/associations" ;;
  *"show qos"*) /bin/grep "^$4|" "$home/qos" ;;
esac
exit 0
""",
    "sacct": '/bin/cat "$home/ended"\n',
    "scancel": "",
    "srun": 'read -r code <"$home/srun_exits"; exit "$code"\n',
}
PRELUDE = r"""#!/bin/sh
home='{home}' name='{name}'
{{ printf %s "$name"; for word in "$@"; do printf '\t%s' "$word"; done; echo; }} >>"$home/calls"
export -p >"$home/environment_of_$name"
if [ -e "$home/hangs/$name" ]; then exec /bin/sleep 60; fi
if [ -e "$home/fails/$name" ]; then /bin/cat "$home/fails/$name" >&2; exit 1; fi
"""
FILES = {
    "last_job": "0\n",
    "calls": "",
    "queue": "",
    "config": "MaxArraySize            = 1001\nMaxJobCount             = 10000\n",
    "partitions": "PartitionName=cpu Default=NO MaxTime=UNLIMITED State=UP\n"
    "PartitionName=gpu Default=YES MaxTime=1-00:00:00 State=UP\n",
    "associations": "default||normal\n",
    "qos": "normal|\n",
    "ended": "",
    "srun_exits": "0\n",
}


@dataclass(frozen=True)
class Queued:
    """One row of the queue."""

    job_id: str
    name: str
    state: str = "PENDING"
    reason: str = "Priority"
    node: str = ""
    qos: str = "normal"
    account: str = "default"
    user: str = USER


class FakeSlurm:
    """The commands in `home/bin`, and what they answer."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name in ("bin", "scripts", "refused", "taken", "fails", "hangs"):
            (home / name).mkdir(parents=True)
        for name, content in FILES.items():
            (home / name).write_text(content)
        for name, body in COMMANDS.items():
            path = home / "bin" / name
            path.write_text(PRELUDE.format(home=home, name=name) + body)
            path.chmod(0o755)

    # What a test says -----------------------------------------------------------------------

    def remove(self, command: str) -> None:
        (self.home / "bin" / command).unlink()

    def answer(self, **files: str) -> None:
        """Write what commands answer; the names are those of `FILES`."""
        assert files.keys() <= FILES.keys()
        for name, content in files.items():
            (self.home / name).write_text(content)

    def fail(self, command: str, says: str) -> None:
        (self.home / "fails" / command).write_text(f"{says}\n")

    def hang(self, command: str) -> None:
        (self.home / "hangs" / command).touch()

    def refuse(self, says: str, calls: Iterable[int], *, queued: bool = False) -> None:
        """Let these of sbatch's calls, counted from 1, fail; `queued`: though the job was taken."""
        for call in calls:
            (self.home / "refused" / str(call)).write_text(f"sbatch: error: {says}\n")
            if queued:
                (self.home / "taken" / str(call)).touch()

    def limit(self, jobs: int) -> None:
        """At most so many submitted jobs for each user of the QOS `normal`."""
        self.answer(qos=f"normal|{jobs}\n")

    def change(self, change: Callable[[Queued], Queued | None]) -> None:
        """Change each row of the queue; None takes it out."""
        self.queue = [after for before in self.queue if (after := change(before))]

    def set(self, chosen: Callable[[Queued], bool], **fields: str) -> None:
        """Change fields of some rows of the queue."""
        self.change(lambda row: replace(row, **fields) if chosen(row) else row)

    def end(self, *jobs: str) -> None:
        """Take tasks, or whole arrays, out of the queue."""
        self.change(lambda t: None if {t.job_id, t.job_id.split("_")[0]} & {*jobs} else t)

    # What a test asks -----------------------------------------------------------------------

    @property
    def queue(self) -> list[Queued]:
        return [Queued(*line.split("|")) for line in self._lines("queue")]

    @queue.setter
    def queue(self, rows: Iterable[Queued]) -> None:
        (self.home / "queue").write_text("".join("|".join(astuple(r)) + "\n" for r in rows))

    def calls(self, command: str) -> list[list[str]]:
        """The arguments of each call."""
        calls = (line.split("\t") for line in self._lines("calls"))
        return [words for name, *words in calls if name == command]

    def script(self, job: int) -> str:
        return (self.home / "scripts" / str(job)).read_text()

    def options(self, job: int) -> dict[str, str]:
        """The `#SBATCH` options of a job."""
        lines = self.script(job).splitlines()
        given = (line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH"))
        return {name: value for name, _, value in (option.partition("=") for option in given)}

    def environment(self, command: str) -> set[str]:
        """The names of the variables that the last call had."""
        exported = [line.split() for line in self._lines(f"environment_of_{command}")]
        return {words[1].split("=")[0] for words in exported if words[:1] == ["export"]}

    def _lines(self, name: str) -> list[str]:
        return (self.home / name).read_text().splitlines()
