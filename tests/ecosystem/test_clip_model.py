"""`CLIP` of Hugging Face's CLIPModel, small, against the logits of its own forward pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered_gradients import gathered
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import trak_dist
from trak_dist import CLIP
from trak_dist.ops.gradients import LoopGradients, VmapGradients
from trak_dist.ops.hooks import HookGradients
from trak_dist.ops.model_outputs import out_to_loss

PAIRS, OTHERS, TOKENS, END = 4, 5, 6, 19
TOWER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def clip() -> CLIPModel:
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": END + 1, "max_position_embeddings": TOKENS, "eos_token_id": END}
    config = CLIPConfig(
        text_config={**text, "bos_token_id": 0},
        vision_config={**TOWER, "image_size": 8, "patch_size": 4},
        projection_dim=5,
        attn_implementation="eager",
    )
    return CLIPModel(config).eval()


def pairs(rows: int, seed: int, mask: bool = True) -> dict[str, Tensor]:
    """As a processor gives them, texts padded to one length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, END - 1, (rows, TOKENS), generator=generator)
    end = torch.arange(rows) % 3 + 2
    after = torch.arange(TOKENS) - end[:, None]
    ids = ids.masked_fill(after >= 0, END)
    images = torch.randn(rows, 3, 8, 8, generator=generator)
    masks = {"attention_mask": (after <= 0).long()} if mask else {}
    return {"input_ids": ids, **masks, "pixel_values": images}


def margins(exact: CLIPModel, one: dict[str, Tensor], others: dict[str, Tensor]) -> Tensor:
    """A and b of a pair, from the logits of a batch of it and the others, which are constant."""
    whole = {name: torch.cat([one[name], others[name]]) for name in one}
    by_image = exact(**_double(whole)).logits_per_image
    return torch.stack([line[0] - line[1:].logsumexp(0) for line in (by_image[0], by_image[:, 0])])


def _double(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


@pytest.mark.parametrize("mask", [True, False])
def test_f_and_q_are_those_of_the_models_own_logits(clip: CLIPModel, mask: bool) -> None:
    batch, others = pairs(PAIRS, 1, mask), pairs(OTHERS, 2, mask)
    output, exact = CLIP([others]), copy.deepcopy(clip).double()
    found = HookGradients(clip, output, ["*"], piece_elements=10**6)((batch,), lambda *_: None)
    q = out_to_loss(output, clip, (batch,), None)
    for row in range(PAIRS):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        both = margins(exact, one, others).detach()
        assert found[row].item() == pytest.approx(both.sum().item(), rel=1e-4, abs=1e-4)
        assert q[row].item() == pytest.approx(1 - both.sigmoid().mean().item(), rel=1e-4)


@pytest.mark.parametrize("mask", [True, False])
def test_hooks_and_vmap_give_the_gradients_of_the_loop(clip: CLIPModel, mask: bool) -> None:
    batch, output = (pairs(PAIRS, 1, mask),), CLIP([pairs(OTHERS, 2, mask)])
    computers: dict[str, Any] = {"hooks": HookGradients(clip, output, ["*"], piece_elements=10**6)}
    if not mask:  # what transformers makes of a mask is nothing that torch.func can trace
        computers["vmap"] = VmapGradients(clip, output, ["*"])
    wanted = gathered(LoopGradients(clip, output, ["*"]), clip, batch)
    size = torch.stack([w.norm() for w in wanted.values()]).norm()
    assert wanted["logit_scale"].abs().min() > 0
    for name, computer in computers.items():
        found = gathered(computer, clip, batch)
        for parameter, grads in wanted.items():
            error = (found[parameter] - grads).norm()
            assert error <= 1e-4 * grads.norm() + 1e-6 * size, (name, parameter)


@pytest.mark.slow
def test_a_run_of_a_clip_model(clip: CLIPModel, tmp_path: Path) -> None:
    def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
        whole = pairs(count, seed)
        return [{name: tensor[row] for name, tensor in whole.items()} for row in range(count)]

    for seed in (0, 1):
        clip.save_pretrained(tmp_path / f"checkpoint-{seed}")
        with torch.no_grad():
            clip.visual_projection.weight.mul_(-0.5)
    problem = trak_dist.Problem(
        model=clip,
        model_output=CLIP([pairs(OTHERS, 2)]),
        train=rows(8, 3),
        targets={"val": rows(PAIRS, 4)},
        checkpoints=[tmp_path / f"checkpoint-{seed}" for seed in (0, 1)],
    )
    run = trak_dist.plan_run(
        problem=problem, run_dir=tmp_path / "run", cluster="debug", proj_dim=16
    )
    run.execute().raise_for_failures()
    found = trak_dist.open_run(tmp_path / "run")
    assert found.plan.gradients == "hooks"
    assert found.plan.curvature == "fisher"
    assert found.scores("val").shape == (8, PAIRS)
