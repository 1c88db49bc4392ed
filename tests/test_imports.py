"""What importing a part of the product loads, and what it must not load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

TESTS = Path(tiny.__file__).parent
HEAVY = {
    "torch",
    "zarr",
    "numpy",
    "numcodecs",
    "hydra",
    "omegaconf",
    "submitit",
    "matplotlib",
    "rich",
}


def run(*arguments: str, cwd: Path = TESTS.parent) -> str:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
    ).stdout


def loaded(code: str) -> set[str]:
    """The top-level modules that `code` loads, beyond those of a bare interpreter."""
    out = run("-c", f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))")
    return {name.split(".")[0] for name in json.loads(out.splitlines()[-1])}


def test_importing_the_package_loads_nothing_but_the_standard_library() -> None:
    new = loaded("import trak_dist") - loaded("pass")
    assert not new & HEAVY
    assert new - set(sys.stdlib_module_names) == {"trak_dist"}


def test_importing_the_package_takes_less_than_a_tenth_of_a_second() -> None:
    def best(code: str) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            run("-c", code)
            times.append(time.perf_counter() - started)
        return min(times)

    assert best("import trak_dist") - best("pass") < 0.1


def test_the_public_names_are_listed_before_they_are_loaded() -> None:
    new = loaded("import trak_dist\nassert set(trak_dist.__all__) <= set(dir(trak_dist))")
    assert not new & HEAVY


def test_plan_and_config_load_neither_torch_nor_numpy() -> None:
    assert (
        not loaded("import trak_dist.plan, trak_dist.cells, trak_dist.configuration.config") & HEAVY
    )


def test_opening_a_run_loads_no_torch() -> None:
    new = loaded("from trak_dist import open_run")
    assert "zarr" in new
    assert not new & {"torch", "hydra", "submitit", "matplotlib"}


def test_a_worker_loads_torch_but_neither_hydra_nor_submitit_nor_matplotlib() -> None:
    new = loaded("import trak_dist.worker")
    assert "torch" in new
    assert not new & {"hydra", "omegaconf", "submitit", "matplotlib", "rich", "jinja2"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imports")
    tiny.write_checkpoints(root / "checkpoints", 1)
    run(
        *("-m", "trak_dist.launch", "problem._target_=tiny.problem", "stage=plan"),
        *(f"+problem.directory={root / 'checkpoints'}", f"run_dir={root / 'run'}", "proj_dim=16"),
    )
    return root / "run"


def launched(*overrides: str) -> set[str]:
    code = f"sys.argv = ['trak-dist', *{overrides!r}]\nfrom trak_dist.launch import main\nmain()"
    return loaded(code)


def test_status_loads_neither_torch_nor_zarr(run_dir: Path) -> None:
    new = launched("stage=status", f"run_dir={run_dir}")
    assert "hydra" in new
    assert not new & {"torch", "zarr", "numcodecs", "submitit", "matplotlib"}


def test_files_of_the_package_stay_small() -> None:
    files = (TESTS.parent / "trak_dist").rglob("*.py")
    lengths = {path.name: len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}
