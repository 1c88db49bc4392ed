"""The documentation, followed literally."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gathered_gradients import gathered

from trak_dist import settings
from trak_dist.ops.gradients import VmapGradients
from trak_dist.ops.hooks import HookGradients

ROOT = Path(__file__).parents[2]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def run(command: str, cwd: Path) -> str:
    program, *arguments = shlex.split(command)
    assert program == "python"
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.mark.long
def test_the_page_on_your_own_problem_works_as_written(tmp_path: Path) -> None:
    page = ROOT / "docs/your-problem.md"
    for block in blocks(page, "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name, block
        (tmp_path / name[1]).write_text(block)
    outputs = [run(line, tmp_path) for block in blocks(page, "bash") for line in block.splitlines()]
    assert '"complete": true' in outputs[-2]
    assert outputs[-1].startswith("(1500, 297) [")


def test_by_the_output_of_the_page_a_step_on_a_helpful_example_lowers_the_loss() -> None:
    (source,) = (b for b in blocks(ROOT / "docs/your-problem.md", "python") if "Counts" in b)
    names: dict[str, type] = {}
    exec(source, names)
    output, model = names["Counts"](), torch.nn.Linear(3, 1).double()
    counts = torch.tensor([0, 1, 5, 2, 0], dtype=torch.float64)
    batch = (torch.randn(5, 3, dtype=torch.float64), counts)
    hooks = HookGradients(model, output, ["weight"], piece_elements=10)
    by_vmap, grads = (
        gathered(compute, model, batch, ["weight"])["weight"][:, 0]
        for compute in (VmapGradients(model, output, ["weight"]), hooks)
    )
    torch.testing.assert_close(grads, by_vmap)
    q = output.get_out_to_loss_grad(model, dict(model.named_parameters()), {}, batch)
    scores = (q[:, None] * grads @ grads.T).detach()

    def losses() -> torch.Tensor:
        return torch.nn.functional.poisson_nll_loss(
            model(batch[0])[:, 0], counts, full=False, reduction="none"
        )

    before = losses().detach()
    for row in range(5):
        step = 1e-6 * torch.autograd.grad(losses()[row], model.weight)[0]
        with torch.no_grad():
            model.weight -= step
        fall = (before - losses().detach()) / 1e-6
        # f falls as the loss ½f² does, divided by −f.
        torch.testing.assert_close(fall / q.detach(), scores[row], rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            model.weight += step


@pytest.mark.slow
def test_the_commands_of_the_readme_work_as_written(tmp_path: Path) -> None:
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python ")]
    outputs = [run(command, tmp_path) for command in commands]
    assert any('"complete": true' in output for output in outputs)
    for block in blocks(ROOT / "README.md", "python"):
        (tmp_path / "block.py").write_text(block)
        run("python block.py", tmp_path)


def test_the_readme_names_only_files_that_exist() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_design_names_the_modules_and_packages_that_there_are() -> None:
    layers = (ROOT / "docs/design.md").read_text().partition("## 2. Layers")[2]
    rows = re.findall(r"(?m)^\| ((?:`[\w/.]+`(?:, )?)+) \|", layers.partition("## 3.")[0])
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    there = [p for p in (ROOT / "trak_dist").iterdir() if not p.name.startswith("_")]
    packages = {f"{path.name}/" for path in there if path.is_dir()}
    assert sorted(named) == sorted(packages | {p.name for p in there if p.suffix == ".py"})
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_commands_for_hugging_face_have_settings_that_there_are() -> None:
    """Composed; `tests/problems` runs such commands on small models."""
    lines = [x for b in blocks(ROOT / "docs/hugging-face.md", "bash") for x in b.splitlines()]
    launches = [shlex.split(x)[3:] for x in lines if x.startswith("python -m trak_dist.launch ")]
    assert {o for command in launches for o in command if o.startswith("problem=")} == {
        f"problem={name}" for name in ("causal_lm", "text_classification", "image_folder", "table")
    }
    for overrides in launches:
        settings.check_overrides(overrides)
