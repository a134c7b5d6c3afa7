"""A tiny Hugging Face model, randomly initialized and saved here, is fine-tuned: whole from the command line, and by
LoRA."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raytrainer import batches, cli, preflight
from raytrainer.config import InitFrom
from raytrainer.errors import ConfigError
from raytrainer.parallel import World
from raytrainer.trainer import Trainer
from tests.launches import launched
from tests.training import checkpointer, differences, experiment, node, weights

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 7, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PACKAGE = '''
import torch
from safetensors.torch import save_file


class Text:
    """Token ids and the next ones, of a rule that can be learnt."""

    def __init__(self, rows: int, seed: int) -> None:
        self.first = torch.randint(7, (rows, 1), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (self.first[i] + 3 * torch.arange(9)) % 7
        return {"input_ids": ids[:-1], "labels": ids[1:]}


class Witness:
    """Keeps the weights that the first step is made with, and those in the end."""

    def on_fit_start(self, trainer, event) -> None:
        save_file({n: t.clone() for n, t in trainer.raw_model.state_dict().items()}, f"at-{event.step}.safetensors")

    def on_fit_end(self, trainer, event) -> None:
        save_file({n: t.clone() for n, t in trainer.raw_model.state_dict().items()}, f"at-{event.step}.safetensors")
'''
EXPERIMENT = """
# @package _global_
defaults:
  - override /model: null
  - override /data: null
  - override /loss: token_cross_entropy
model:
  _target_: transformers.AutoModelForCausalLM.from_config
  config: {_target_: transformers.AutoConfig.from_pretrained, pretrained_model_name_or_path: "${init_from}"}
data:
  train: {_target_: mine.Text, rows: 64, seed: 0}
  val: {_target_: mine.Text, rows: 16, seed: 1}
  global_batch_size: 16
optimizer: {lr: 0.01}
trainer: {max_steps: 8, freeze: ["*embed_tokens*"]}
callbacks:
  witness: {_target_: mine.Witness}
  save: {_target_: raytrainer.callbacks.SavePretrained, path: tuned}
tracking: {log_model: false}
"""


def saved(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Save a model as its authors would publish it, in several files. Return its state dict."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options))
    model.save_pretrained(folder, max_shard_size="40KB")
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


@pytest.mark.slow
def test_an_outside_project_fine_tunes_it_from_the_command_line(
    in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published = saved(in_tmp / "hub", tie_word_embeddings=True)
    assert (in_tmp / "hub" / "model.safetensors.index.json").exists()
    (in_tmp / "mine.py").write_text(PACKAGE)
    (in_tmp / "conf" / "experiment").mkdir(parents=True)
    (in_tmp / "conf" / "experiment" / "tune.yaml").write_text(EXPERIMENT)

    tune = ["--config-dir=conf", "experiment=tune", "cluster=inline", "init_from=hub"]
    monkeypatch.syspath_prepend(str(in_tmp))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert cli.main(["check", *tune, "+model.config.num_hidden_layers=3"]) == 2
    assert "holds another model: it lacks model.layers.2.input_layernorm.weight" in capsys.readouterr().err

    done = launched(in_tmp, *tune, "name=one").exits(0)
    shown = f"weights of {in_tmp}/hub/model.safetensors.index.json: {len(published) - 1} tensors taken"
    assert shown in done.err
    size = sum(t.numel() for n, t in published.items() if n != "lm_head.weight")  # the same tensor as the embedding
    assert f"training {size - 7 * 32:,} of {size:,} parameters" in done.err
    assert differences(load_file("at-0.safetensors"), published) == []
    after = load_file("at-8.safetensors")
    assert differences(after, published) != []
    assert torch.equal(after["model.embed_tokens.weight"], published["model.embed_tokens.weight"])

    # A resume does not need the published weights, only the config that creates the model.
    (in_tmp / "hub" / "model.safetensors.index.json").unlink()
    resumed = launched(in_tmp, "resume", "one", "trainer.max_steps=12").exits(0)
    assert "weights of" not in resumed.err
    assert differences(load_file("at-8.safetensors"), after) == []

    # Another run starts from this run's weights, given only by its id in MLflow.
    run_id = json.loads(Path("runs/one/run.json").read_text())["run_id"]
    another = [*tune[:-1], "model.config.pretrained_model_name_or_path=hub"]
    assert cli.main(["check", *another, f"init_from={run_id}", "preflight.first_batch=false"]) == 0
    assert cli.main(["check", *another, "init_from=0123456789abcdef"]) == 2
    assert "init_from=0123456789abcdef cannot be used: no weights file" in capsys.readouterr().err

    tuned = transformers.AutoModelForCausalLM.from_pretrained("tuned").state_dict()
    last = load_file("at-12.safetensors")
    assert differences(tuned, last) == []


# -- adapters --------------------------------------------------------------------------------------------------------


def lora(folder: Path) -> Any:
    base = node(
        "transformers.AutoModelForCausalLM.from_config",
        config=node("transformers.AutoConfig.from_pretrained", pretrained_model_name_or_path=str(folder)),
    )
    adapter = node("peft.LoraConfig", r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    e = experiment(
        model=node("peft.get_peft_model", model=base, peft_config=adapter),
        loss=node("raytrainer.losses.TokenCrossEntropy"),
        data={"train": node("tests.training.tokens", rows=24), "val": None},
        checkpoint={"every_n_steps": 3},
        trainer={"max_steps": 6},
        init_from=InitFrom(source=str(folder)),
    )
    e.storage_path = str(folder.parent)
    return e


def test_lora_trains_only_its_adapters_and_goes_on_exactly(tmp_path: Path) -> None:
    published = saved(tmp_path / "hub")
    e = lora(tmp_path / "hub")
    preflight.check_init_from(e)
    with pytest.raises(ConfigError, match=r"it lacks lm_head.weight, model.embed_tokens.weight"):
        preflight.check_init_from(lora_without(e, tmp_path / "part", published))
    e.callbacks = {"save": node("raytrainer.callbacks.SavePretrained", path=str(tmp_path / "adapter"))}

    trainer = Trainer(e, checkpointer=checkpointer(World(), tmp_path / "checkpoints"))
    assert trainer.init_from(e.init_from) == (
        f"weights of {tmp_path}/hub/model.safetensors.index.json: {len(published)} tensors taken"
    )
    before = weights(trainer)
    assert differences(weights_of_base(before), published) == []
    trainer.fit()
    changed = differences(before, weights(trainer))
    assert changed
    assert all(".lora_" in name for name in changed)
    assert len(trainer.optimizer.state) == len([p for p in trainer.raw_model.parameters() if p.requires_grad]) == 8

    again = Trainer(e, checkpointer=trainer.checkpointer)
    assert again.checkpointer is not None
    again.restore(next(i for i in again.checkpointer.list() if i.step == 3))
    again.checkpointer = None
    again.fit()
    assert differences(weights(again), weights(trainer)) == []

    # The published model with the adapter is the trained model.
    assert sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir()) < 20_000
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ids = torch.arange(7)[None]
    assert torch.equal(model(ids).logits, trainer.raw_model.eval()(ids).logits)


def weights_of_base(found: dict[str, Tensor]) -> dict[str, Tensor]:
    plain = {n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in found.items()}
    return {n: t for n, t in plain.items() if ".lora_" not in n}


def lora_without(e: Any, folder: Path, published: dict[str, Tensor]) -> Any:
    """Return the same experiment, with weights from a folder that lacks two tensors."""
    import copy

    from safetensors.torch import save_file

    folder.mkdir()
    save_file({n: t for n, t in published.items() if ".layers." in n or "norm" in n}, folder / "model.safetensors")
    other = copy.deepcopy(e)
    other.init_from = InitFrom(source=str(folder))
    return other


def test_what_its_collators_return_is_moved_and_keeps_its_type() -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.float64)
    encoding = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    output = transformers.modeling_outputs.CausalLMOutput(logits=mask)
    for data in (encoding, output):
        moved = batches.cast(batches.move(data, torch.device("meta")), torch.float32)
        assert type(moved) is type(data)
        assert {t.device.type for t in batches.tensors(moved)} == {"meta"}
    assert encoding.attention_mask.device.type == "cpu"
    assert moved.logits is moved["logits"] is moved[0]
    assert batches.cast(encoding, torch.float32).attention_mask.dtype is torch.float32
    assert batches.cast(encoding, torch.float32).input_ids is ids
