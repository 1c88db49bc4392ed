"""Mutated command lines, settings and files of a run: told, or the scores are what they were.

SEED and MUTATIONS of the environment choose others; a defect names the seed that makes it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from mutations import (
    Mutations,
    mutated_bytes,
    mutated_json,
    mutated_line,
    mutated_text,
    sealed,
    sealed_plan,
)
from omegaconf import OmegaConf
from safetensors.torch import save

from trak_dist import console, open_run
from trak_dist.cells import KernelCell, ReportCell, ScoreCell, of_stage
from trak_dist.checkpoints import state_dicts
from trak_dist.checkpoints.digests import content_digest
from trak_dist.configuration.config import SlurmConfig
from trak_dist.configuration.validation import (
    check_sections,
    cluster_from_mapping,
    config_from_mapping,
)
from trak_dist.errors import CorruptChunk
from trak_dist.interface import options
from trak_dist.launch import main
from trak_dist.status.state import read_status
from trak_dist.status.text import lines
from trak_dist.status.verify import damaged_cells
from trak_dist.store import parts
from trak_dist.store.jobs import JobRecord, JobRecords
from trak_dist.store.prepare import prepare
from trak_dist.store.run import Run

SEED = int(os.environ.get("SEED", "1"))
FEW = int(os.environ.get("MUTATIONS", "30"))
MANY = 10_000
LINE = ["problem._target_=tiny.problem", "cluster=debug", "proj_dim=16", "projection=sjlt"]

Kind = Callable[[random.Random], Callable[[], str]]


class Subject:
    """A finished run, its scores, and the mutations of each kind."""

    def __init__(self, parent: Path) -> None:
        self.parent, self.run_dir = parent, parent / "run"
        tiny.write_checkpoints(parent / "checkpoints")
        self.line = [
            *(f"run_dir={self.run_dir}", f"+problem.directory={parent / 'checkpoints'}"),
            *("featurize.batch_rows=4", "featurize.cell_rows=8", "targets=val", *LINE),
        ]
        assert launched(self.line) == 0
        self.run = Run.open(self.run_dir)
        self.scores = open_run(self.run_dir).scores("val")
        self.mapping: dict[str, Any] = {}
        job = JobRecord(
            launch="a",
            step="featurize",
            fingerprint=self.run.plan.fingerprint,
            device="cpu",
            tasks=tuple((c.id,) for c in of_stage(self.run.plan, "featurize")),
            cluster=json.loads(json.dumps(SlurmConfig().__dict__, default=vars)),
            stages=("featurize",),
        )
        JobRecords(self.run).publish(job)
        JobRecords(self.run).begin("1", 0, done=0, by={"host": "n"})
        self.state = parent / "checkpoints" / "kept.safetensors"
        self.state.write_bytes(save({k: v.contiguous() for k, v in tiny.state(9).items()}))
        rows = np.arange(4)
        self.arrays = {
            "rows": rows,
            "inputs": np.zeros((4, 16), np.uint8),
            "grads": np.ones((4, 16), np.float16),
        }
        self.part = parts.write(self.run_dir / "parts", parts.Part(self.arrays, {"dtype": "x"}))
        self.outputs = {p: p.read_bytes() for p in self.run_dir.rglob("*") if p.is_file()}
        self.stamps = {path: _stamp(path) for path in self.outputs}

    def restore(self) -> None:
        """Write back what changed since, and remove what was not there."""
        for path in [p for p in self.run_dir.rglob("*") if p.is_file()]:
            if path not in self.outputs:
                path.unlink()
            elif _stamp(path) != self.stamps[path]:
                path.write_bytes(self.outputs[path])
                self.stamps[path] = _stamp(path)
        for path in self.outputs:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.outputs[path])
                self.stamps[path] = _stamp(path)

    def looked(self) -> str:
        """All that only looks; the scores last."""
        run = Run.open(self.run_dir)
        "\n".join(lines(read_status(run)))
        with contextlib.redirect_stdout(io.StringIO()):
            console.results(run)
        list(damaged_cells(run))
        for stage in ("featurize", "reduce", "report"):
            open_run(self.run_dir).receipts(stage)
        open_run(self.run_dir).top("val", [0])
        found = open_run(self.run_dir).scores("val")
        return "correct" if np.array_equal(found, self.scores) else "wrong"

    def file(self, *patterns: str) -> Callable[[random.Random], Path]:
        found = sorted(p for pattern in patterns for p in self.run_dir.glob(pattern))
        assert found
        return lambda draw: draw.choice(found)


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def launched(arguments: list[str]) -> int:
    before = sys.argv
    sys.argv = ["trak-dist", *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.argv = before
    assert "Traceback" not in err.getvalue(), err.getvalue()[-2000:]
    assert code == 0 or err.getvalue() or out.getvalue()
    return code


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(tmp_path_factory.mktemp("mutations"))


@pytest.fixture(scope="module")
def mutations() -> Iterator[Mutations]:
    found = Mutations()
    yield found
    print(f"\nseed {SEED}\n{found.table()}")


def file_kind(
    choose: Callable[[random.Random], Path],
    mutate: Callable[[random.Random, bytes], bytes],
    look: Callable[[], str],
) -> Kind:
    def kind(draw: random.Random) -> Callable[[], str]:
        path = choose(draw)
        path.write_bytes(mutate(draw, path.read_bytes()))
        return look

    return kind


def kinds(subject: Subject) -> dict[str, Kind]:

    def of_json(seal: Callable[[Any], Any]) -> Callable[[random.Random, bytes], bytes]:
        return lambda draw, whole: mutated_text(draw, whole, seal)

    def jobs() -> str:
        found = JobRecords(subject.run)
        found.attempt("1", 0)
        for _, job in found.readable(found.numbers()):
            job.cells(10**6)
            job.cells(0)
        cluster_from_mapping(found.read(1).cluster)
        return subject.looked()

    def part() -> str:
        rows, _ = parts.rows_of(subject.part)
        found = parts.read(subject.part)
        same = all(np.array_equal(found.arrays[n], v) for n, v in subject.arrays.items())
        return "correct" if same and np.array_equal(rows, subject.arrays["rows"]) else "wrong"

    def state() -> str:
        found = content_digest(state_dicts.read(subject.state))
        # Another digest is what a worker refuses.
        return "correct" if found == content_digest(tiny.state(9)) else "told"

    def header(draw: random.Random, whole: bytes) -> bytes:
        end = 8 + int.from_bytes(whole[:8], "little")
        if draw.random() < 0.5:
            return mutated_bytes(draw, whole[:end]) + whole[end:]
        text = json.dumps(mutated_json(draw, json.loads(whole[8:end]))).encode()
        return len(text).to_bytes(8, "little") + text + whole[end:]

    def mended() -> str:
        prepare(subject.run)  # what the planner does: mends it, or says what to do
        if not subject.run.receipts.done(ScoreCell.of(subject.run.plan)):
            return "told"  # revoked, to be done again
        return subject.looked()

    def metadata(draw: random.Random) -> Callable[[], str]:
        path = subject.file("store.zarr/scores/val/zarr.json", "store.zarr/**/zarr.json")(draw)
        if draw.random() < 0.5:
            path = subject.run_dir / "store.zarr/scores/val/zarr.json"
        path.write_bytes(mutated_text(draw, path.read_bytes(), lambda content: content))
        return mended if draw.random() < 0.3 else subject.looked

    def configuration(draw: random.Random) -> Callable[[], str]:
        if not subject.mapping:
            base = OmegaConf.load(options.CONF / "config.yaml")
            plain = OmegaConf.to_container(base, resolve=False)
            assert isinstance(plain, dict)
            plain = {k: v for k, v in plain.items() if k not in ("defaults", "hydra")}
            slurm = OmegaConf.to_container(OmegaConf.load(options.CONF / "cluster/slurm.yaml"))
            plain |= {"problem": {"_target_": "a.b"}, "run_dir": "x", "store_dim": 2048}
            subject.mapping = plain | {"projection": {"kind": "sjlt", "seed": 0}, "cluster": slurm}
            config_from_mapping(subject.mapping)
        changed = mutated_json(draw, subject.mapping)

        def look() -> str:
            check_sections(changed)
            config_from_mapping(changed)
            return "correct"

        return look

    def command_line(draw: random.Random) -> Callable[[], str]:
        arguments = mutated_line(draw, subject.line)
        if draw.random() < 0.3:
            arguments = mutated_line(draw, arguments)

        def look() -> str:
            code = launched([*arguments, "stage=status"])
            assert code in (0, 1, 2), code
            return "told" if code else "correct"

        return look

    return {
        "plan": file_kind(subject.file("plan.json"), of_json(sealed_plan), subject.looked),
        "receipts": file_kind(subject.file("receipts/**/*.json"), of_json(sealed), subject.looked),
        "columns": file_kind(subject.file("receipts/**/*.npz"), mutated_bytes, subject.looked),
        "jobs": file_kind(
            subject.file("jobs/*.json", "jobs/1/*.json"), of_json(lambda content: content), jobs
        ),
        "parts": file_kind(lambda _: subject.part, header, part),
        "safetensors": file_kind(lambda _: subject.state, header, state),
        "zarr.json": metadata,
        "configuration": configuration,
        "command lines": command_line,
    }


KINDS = (
    *("plan", "receipts", "columns", "jobs", "parts", "safetensors", "zarr.json"),
    *("configuration", "command lines"),
)


def mutate(subject: Subject, mutations: Mutations, name: str, count: int) -> None:
    kind = kinds(subject)[name]
    kept = subject.state.read_bytes()
    for number in range(count):
        seed = SEED * 10**6 + number
        draw = random.Random(f"{name} {seed}")
        look = kind(draw)
        mutations.check(name, seed, look, subject.run_dir)
        subject.restore()
        subject.state.write_bytes(kept)
    defects, mutations.defects = mutations.defects, []
    assert defects == []


@pytest.mark.parametrize("name", KINDS)
def test_each_mutation_is_reported_or_harmless(subject, mutations, name: str, monkeypatch) -> None:
    monkeypatch.chdir(subject.run_dir)
    mutate(subject, mutations, name, FEW if name != "command lines" else FEW // 3)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_ten_thousand_mutations(subject, mutations, name: str, monkeypatch) -> None:
    monkeypatch.chdir(subject.run_dir)
    mutate(subject, mutations, name, MANY)


def test_damaged_metadata_of_scores_is_repaired_by_the_same_command(subject) -> None:
    for content in (b"", b'{"zarr_format": 3}', b"[" * 10**5):
        (subject.run_dir / "store.zarr/scores/val/zarr.json").write_bytes(content)
        assert launched(subject.line) == 0
        np.testing.assert_array_equal(open_run(subject.run_dir).scores("val"), subject.scores)
        subject.restore()


def test_a_changed_scale_in_a_receipt_is_noticed(subject) -> None:
    cell = KernelCell(0)
    path = subject.run.layout.receipt(subject.run.plan, cell)
    record = json.loads(path.read_text())
    record["facts"]["scale"] *= 2
    path.write_text(json.dumps(record))
    assert cell not in subject.run.receipts.done([cell])
    assert launched(subject.line) == 0
    np.testing.assert_array_equal(open_run(subject.run_dir).scores("val"), subject.scores)
    subject.restore()


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"stability": {"5": {}}}, "the facts of a receipt can't be read"),
        ({"counterfactuals": [1]}, "the facts of a receipt can't be read"),
    ],
)
def test_odd_facts_of_a_report_are_reported(subject, facts: dict[str, Any], what: str) -> None:
    cell = ReportCell("val")
    receipt = subject.run.receipts.done([cell])[cell]
    subject.run.receipts.publish(cell, replace(receipt, facts=facts))
    with pytest.raises(CorruptChunk, match=what), contextlib.redirect_stdout(io.StringIO()):
        console.results(subject.run)
    subject.restore()
