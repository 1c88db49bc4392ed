"""Random models: gradients by hooks and by vmap are a float64 loop's, or refused."""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter, defaultdict

import pytest
import torch
from torch import Tensor, nn
from zoo import drawn

from trak_dist import ImageClassification
from trak_dist.errors import NotCovered, ProblemError
from trak_dist.ops.gradients import VmapGradients
from trak_dist.ops.hooks import HookGradients

pytestmark = pytest.mark.slow

FIRST = int(os.environ.get("ZOO_SEED", "0"))
Truth = tuple[Tensor, dict[str, Tensor]]


def one_by_one(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Truth:
    """The margin of each example alone and its gradients, by the model's own call and autograd."""
    values, rows = [], defaultdict(list)
    for x, label in zip(*batch, strict=True):
        own = copied(model)
        parameters = dict(own.named_parameters())
        logits = own(x.clone()[None])[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        margin = logits[label] - others.exp().sum().log()
        margin.backward()
        values.append(margin.detach())
        for name, weight in parameters.items():
            rows[name].append(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    return torch.stack(values), {name: torch.stack(row) for name, row in rows.items()}


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(
        model,
        {id(v): v.detach().clone() for m in model.modules() for v in vars(m).values()
         if isinstance(v, Tensor) and not v.is_leaf},
    )  # fmt: skip


def outcome(compute: object, batch: tuple[Tensor, Tensor], truth: Truth) -> str:
    f, wanted = truth
    found = {name: torch.zeros_like(grads) for name, grads in wanted.items()}

    def take(name: str, rows: slice, grads: Tensor) -> None:
        found[name][rows] += grads

    given = compute(batch, take)
    if given is not None and not torch.allclose(given, f, rtol=1e-9, atol=1e-9):
        return "wrong f"
    size = max(1.0, *(float(grads.abs().max()) for grads in wanted.values()))
    for name, grads in wanted.items():
        if (found[name] - grads).abs().max() > 1e-9 * size:
            return f"wrong {name}"
    return "right"


def tried(seed: int) -> tuple[list[str], dict[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, model, batch = drawn(seed)
        truth = one_by_one(model, batch)
        before = copy.deepcopy(dict(model.state_dict())), [t.clone() for t in batch]
        parameters = dict(model.named_parameters())
        results = {}
        try:
            hooks = HookGradients(model, ImageClassification(), ["*"], piece_elements=60)
            results["hooks"] = outcome(hooks, batch, truth)
        except (NotCovered, ProblemError) as refusal:
            results["hooks"] = f"refused: {refusal.what}"
        except Exception as error:
            results["hooks"] = f"wrong, raised {type(error).__name__}: {error}"
        try:
            vmap = VmapGradients(model, ImageClassification(), ["*"])
            results["vmap"] = outcome(vmap, batch, truth)
        except Exception as error:  # what torch.func can't trace goes on by the loop
            results["vmap"] = f"refused: {type(error).__name__}"
        state, tensors = before
        same = all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        same &= all(torch.equal(a, b) for a, b in zip(batch, tensors, strict=True))
        same &= all(p is parameters[n] for n, p in model.named_parameters())
        if not same:
            results["hooks"] = "wrong: model or batch changed"
    return names, results


def table(seeds: range) -> tuple[str, list[str]]:
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    wrong = []
    for seed in seeds:
        names, results = tried(seed)
        for way, found in results.items():
            kind = found.partition(" ")[0].strip(":,")
            for name in {*names, "all"}:
                counts[name][f"{way} {kind}"] += 1
            if kind == "wrong":
                wrong.append(f"seed {seed}, {way}: {found} of {names}")
    columns = [
        f"{way} {kind}" for kind in ("right", "refused", "wrong") for way in ("hooks", "vmap")
    ]
    lines = [f"seeds {seeds.start} to {seeds.stop - 1}", " " * 40 + "  ".join(columns)]
    for name in sorted(counts, key=lambda n: (n == "all", n)):
        cells = [f"{counts[name][c]:>{len(c)}}" for c in columns]
        lines.append(f"{name:40}" + "  ".join(cells))
    return "\n".join(lines), wrong


def test_random_models_have_the_loop_s_gradients_or_are_refused() -> None:
    told, wrong = table(range(FIRST, FIRST + 150))
    print(told)
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.long
def test_ten_thousand_models_have_the_loop_s_gradients_or_are_refused() -> None:
    told, wrong = table(range(FIRST + 1000, FIRST + 11_000))
    print(told)
    assert not wrong, "\n".join(wrong[:20])
