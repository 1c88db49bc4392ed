"""Checkpoints as training tools write them, and what can't be one."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import lightning
import peft
import pytest
import safetensors.torch
import tiny
import tiny_bert
import torch
import transformers
from gathered_gradients import gathered
from torch import Tensor, nn

from trak_dist import TextClassification, TRAKer, open_run
from trak_dist.checkpoints import state_dicts
from trak_dist.errors import CheckpointError
from trak_dist.ops.gradients import LoopGradients, select_params
from trak_dist.ops.hooks import HookGradients


def loaded(path: Path, model: nn.Module) -> state_dicts.Fitted:
    fitted = state_dicts.fit_state_dict(state_dicts.read(path), model, where=str(path))
    fitted.load_into(model)
    return fitted


def assert_same(found: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "network."])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_wrappers_prefix_is_left_out_and_reported(prefix: str, kind: str, tmp_path: Path) -> None:
    state = tiny.state(3)
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    path = tmp_path / f"wrapped.{kind}"
    torch.save(wrapped, path) if kind == "pt" else safetensors.torch.save_file(wrapped, path)
    model = tiny.net()
    assert loaded(path, model).notes == f"the prefix '{prefix}' of its names is left out"
    assert_same(model, state)


def test_a_prefix_of_the_model_itself_stays(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("module", tiny.net())
    torch.save(model.state_dict(), tmp_path / "own.pt")
    assert not loaded(tmp_path / "own.pt", model).notes


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_what_wrappers_save_is_read(wrap, tmp_path: Path) -> None:
    wrapped = wrap(tiny.net())
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pt")
    model = tiny.net()
    assert loaded(tmp_path / "wrapped.pt", model).notes
    assert_same(model, getattr(wrapped, "module", wrapped).state_dict() | model.state_dict())


class Trained(lightning.LightningModule):
    """As Lightning's own examples are written: the network is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": tiny.HIDDEN})
        self.network = tiny.net()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


@pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch")
def test_a_checkpoint_of_lightning_is_read(tmp_path: Path) -> None:
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Trained()
    trainer.fit(module, torch.utils.data.DataLoader(tiny.Rows(8, seed=1), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = tiny.net()
    assert "'network.'" in loaded(tmp_path / "last.ckpt", model).notes
    assert_same(model, module.network.state_dict())


@pytest.mark.parametrize("shards", ["1GB", "2KB"])
def test_a_folder_of_hugging_face_is_read(shards: str, tmp_path: Path) -> None:
    written = tiny_bert.net()
    written.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "2KB")
    model = tiny_bert.net()
    loaded(tmp_path, model)
    assert_same(model, written.state_dict())


OF_OTHER_NAMES = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=12,
        )
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=30,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )
    ),
}


@pytest.mark.parametrize("kind", OF_OTHER_NAMES)
def test_what_transformers_saves_under_other_names_is_read(kind: str, tmp_path: Path) -> None:
    written, model = (OF_OTHER_NAMES[kind]().eval() for _ in range(2))
    written.save_pretrained(tmp_path)
    saved = state_dicts.read(tmp_path)
    assert saved.keys() - written.state_dict().keys(), "else there is nothing to test"
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fitted = state_dicts.fit_state_dict(saved, model, where=str(tmp_path))
    assert_same(model, before)
    fitted.load_into(model)
    assert_same(model, written.state_dict())
    saved.pop(next(name for name in saved if "mlp" in name or "output" in name or "w1" in name))
    with pytest.raises(CheckpointError, match="the checkpoint does not fit the model: missing"):
        state_dicts.fit_state_dict(saved, model, where=str(tmp_path))


@pytest.mark.parametrize("name", ["../away.safetensors", "/away.safetensors", "a/b.safetensors"])
def test_an_index_that_names_a_file_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": name}}))
    with pytest.raises(CheckpointError, match="outside of its directory"):
        state_dicts.read(tmp_path)


def test_a_folder_without_a_checkpoint_says_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"none of model.safetensors, .* is in this directory"
    ):
        state_dicts.read(tmp_path)


def test_tied_weights_that_were_not_saved_are_those_of_the_other(tmp_path: Path) -> None:
    model = nn.ModuleDict({"into": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["into"].weight
    safetensors.torch.save_file({"into.weight": torch.ones(5, 4)}, tmp_path / "tied.safetensors")
    loaded(tmp_path / "tied.safetensors", model)
    assert torch.equal(model["out"].weight, torch.ones(5, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_taken_into_the_models_own(dtype, tmp_path: Path) -> None:
    half = {name: tensor.to(dtype) for name, tensor in tiny.state(0).items()}
    torch.save(half, tmp_path / "half.pt")
    model = tiny.net()
    loaded(tmp_path / "half.pt", model)
    assert_same(model, {name: tensor.float() for name, tensor in half.items()})


# Adapters ---------------------------------------------------------------------------------------


OF_PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def adapted() -> peft.PeftModel:
    torch.manual_seed(0)
    base = tiny_bert.net()
    base.load_state_dict(tiny_bert.state(0, type(base)))
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"]
    )
    return peft.get_peft_model(base, config)


def with_adapters(seed: int) -> peft.PeftModel:
    model = adapted()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@OF_PEFT
def test_adapters_are_read_from_what_peft_saves(tmp_path: Path) -> None:
    written = with_adapters(1)
    written.save_pretrained(tmp_path)
    model = adapted()
    fitted = loaded(tmp_path, model)
    assert_same(model, written.state_dict())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained <= fitted.state.keys()
    assert all("lora" in name or "classifier" in name for name in trained)


PEFT = {  # what each needs of a LoraConfig, and its tensors in the model
    "lora_A.default.": {},
    "lora_magnitude_vector.default.weight": {"use_dora": True},
    "trainable_tokens_delta.default": {"trainable_token_indices": {"word_embeddings": [1, 3]}},
    "modules_to_save.default.": {"modules_to_save": ["pooler"]},
    ".default.bias": {"bias": "all"},
    "lora_embedding_A.default": {"target_modules": ["query", "word_embeddings"]},
}


@OF_PEFT
@pytest.mark.parametrize("adapter", ["default", "mine", "query"])
@pytest.mark.parametrize("kind", PEFT)
def test_adapters_of_any_kind_and_name_are_read(kind: str, adapter: str, tmp_path: Path) -> None:
    inside = kind.replace("default", adapter)
    settings = {"target_modules": ["query", "value"]} | PEFT[kind]

    def made(seed: int) -> peft.PeftModel:
        model = peft.get_peft_model(
            tiny_bert.net(), peft.LoraConfig(task_type="SEQ_CLS", r=2, **settings), adapter
        )
        model.load_state_dict(tiny_bert.state(0, type(model.base_model.model)), strict=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator)
        return model

    written, model = made(1), made(2)
    assert any(inside in name for name in model.state_dict())
    written.save_pretrained(tmp_path)
    fitted = loaded(tmp_path if adapter == "default" else tmp_path / adapter, model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() <= fitted.state.keys()
    assert not trained.keys() & fitted.absent
    for name, parameter in written.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, trained[name]), name


@OF_PEFT
def test_prompts_are_read_and_what_hides_their_weights_is_refused(tmp_path: Path) -> None:
    def made(**more: object) -> peft.PeftModel:
        return peft.get_peft_model(
            tiny_bert.net(),
            peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4, **more),
        )

    written, model = made(), made()
    written.save_pretrained(tmp_path / "plain")
    loaded(tmp_path / "plain", model)
    inside = "prompt_encoder.default.embedding.weight"
    assert torch.equal(model.state_dict()[inside], written.state_dict()[inside])
    made(prefix_projection=True, encoder_hidden_size=8).save_pretrained(tmp_path / "projected")
    with pytest.raises(CheckpointError, match=r"or save model.state_dict\(\) with torch.save"):
        loaded(tmp_path / "projected", made(prefix_projection=True, encoder_hidden_size=8))


@OF_PEFT
def test_of_several_adapters_the_one_that_is_trained_is_given_what_peft_saved(
    tmp_path: Path,
) -> None:
    written = with_adapters(1)
    written.save_pretrained(tmp_path)
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    fitted = loaded(tmp_path, model)
    assert any(".lora_A.other." in name for name in fitted.state)
    assert all(".lora_A.default." not in name for name in fitted.state)


@OF_PEFT
def test_a_folder_of_named_adapters_says_where_they_are(tmp_path: Path) -> None:
    base = tiny_bert.net()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    peft.get_peft_model(base, config, "mine").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="that save_pretrained wrote: mine in it, or a file"):
        state_dicts.read(tmp_path)


@OF_PEFT
def test_only_adapters_have_gradients_and_they_are_those_of_autograd(tmp_path: Path) -> None:
    model, output, batch = with_adapters(1).eval(), TextClassification(), tiny_bert.batch(4, 2)
    assert set(select_params(model, ["*"])) == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    by_hooks = gathered(HookGradients(model, output, ["*"], piece_elements=10**6), model, batch)
    by_loop = gathered(LoopGradients(model, output, ["*"]), model, batch)
    for name, grads in by_loop.items():
        torch.testing.assert_close(by_hooks[name], grads, rtol=1e-4, atol=1e-6)

    fed = TRAKer(
        model=adapted(),
        task="text_classification",
        train_set_size=12,
        save_dir=tmp_path / "run",
        device="cpu",
        proj_dim=32,
    )
    for model_id in range(2):
        with_adapters(model_id).save_pretrained(tmp_path / str(model_id))
        fed.load_checkpoint(tmp_path / str(model_id), model_id=model_id)
        fed.featurize(tiny_bert.batch(12, seed=1), num_samples=12)
    plan = open_run(tmp_path / "run").plan
    assert plan.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.gradients == "hooks"


def test_checkpoints_that_lack_different_frozen_tensors_are_refused(tmp_path: Path) -> None:
    model = tiny.net()
    model[0].requires_grad_(False)
    fed = TRAKer(model, "image_classification", 8, tmp_path / "run", device="cpu", proj_dim=8)
    whole = tiny.state(0)
    fed.load_checkpoint(whole, 0)
    with pytest.raises(CheckpointError, match=r"0\.bias is in some checkpoints and not in others"):
        fed.load_checkpoint({n: t for n, t in tiny.state(1).items() if n[0] != "0"}, 1)
    assert logging.getLogger("trak_dist").level == logging.INFO


def test_a_checkpoint_that_may_not_be_looked_at_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(CheckpointError, match="not readable: Permission denied"):
        state_dicts.read(tmp_path / "0.pt")
