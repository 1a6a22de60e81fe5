import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="LoRA needs the mllm extra")
pytest.importorskip("accelerate", reason="training needs the train extra")

import safetensors.torch
import timm
from torch.nn import functional as F
from transformers import TrainerCallback

from zoo.mllm import accelerate, load
from zoo.mllm.conversations import read_conversations
from zoo.mllm.trained import load_trained
from zoo.tools import train_mllm as T
from zoo.tools.evaluate_mllm import evaluate, questions_of


def helper(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


tiny = helper(Path(__file__).with_name("tiny_vlm.py"))

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "mllm").glob("*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """No TensorBoard files, and one thread, so that sums are the same in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.language_model(folder / "lm")
    tiny.data(folder)
    torch.manual_seed(1)
    tower = timm.create_model("test_resnet")
    safetensors.torch.save_file(tower.state_dict(), folder / "tower.safetensors")
    return folder


@pytest.fixture(scope="module")
def aligned(folder, tmp_path_factory):
    """The folder of a finished run of the stage align."""
    output = tmp_path_factory.mktemp("aligned")
    T.run(T.Config(**tiny.settings(folder, output)))
    return output


def instruct(folder, aligned, output, **changes):
    values = tiny.settings(folder, output) | {"stage": "instruct", "model": str(aligned / "model"), "lora_rank": 4}
    for key in ("tower", "tower_checkpoint", "stages", "image_size"):
        del values[key]
    return T.Config(**values | changes)


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = T.load_config(path)
    assert config.output.startswith("output/mllm_") and config.stage == path.stem.rpartition("_")[2]


def test_align_trains_the_projector_alone(folder, aligned):
    config = T.Config(**tiny.settings(folder, aligned))
    model, _ = T.build_model(config)
    T.choose_trained(model, config)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"projector"}
    found = weights(aligned)
    assert {name.split(".")[0] for name in found} == {"tower", "projector"}
    torch.manual_seed(config.seed)
    for name, before in model.state_dict().items():
        if name.startswith("tower."):  # also the statistics of batch norm
            assert torch.equal(found[name], before.half() if before.is_floating_point() else before)
    told = json.loads((aligned / "metrics.json").read_text())
    losses = [entry["loss"] for entry in told["history"] if "loss" in entry]
    assert told["steps"] == 6 == len(losses) and losses[-1] < losses[0]
    assert told["trained"] == sum(p.numel() for p in model.projector.parameters())
    assert load(aligned / "model")[0].config.language_model["source"] == str(folder / "lm")


def test_instruct_learns_to_answer(folder, aligned, tmp_path):
    config = instruct(folder, aligned, tmp_path, steps=60, lr=1e-2, train_tower=True, checkpoint_every=100)
    T.run(config)
    model, processor = load(tmp_path / "model")
    asked = questions_of(read_conversations(folder / "train.json"))
    result, answers = evaluate(model, processor, asked, batch_size=8, max_new_tokens=3)
    assert result.kinds["colour"] >= 90  # chance is 50
    assert set(answers) <= {"red", "blue", "left", "right"}
    before, after = weights(aligned), weights(tmp_path)
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"tower", "projector", "language_model"}
    assert all(".lora_" in name for name in changed if name.startswith("language_model"))
    assert any(name.endswith("running_mean") for name in changed)
    assert any(after[name].abs().sum() > 0 for name in after if ".lora_B." in name)


def test_frozen_parts_stay(folder, aligned, tmp_path):
    T.run(instruct(folder, aligned, tmp_path))
    before, after = weights(aligned), weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("tower."))
    assert not torch.equal(before["projector.layers.0.weight"], after["projector.layers.0.weight"])


def test_the_whole_language_model_is_trained_without_lora(folder, aligned, tmp_path):
    T.run(instruct(folder, aligned, tmp_path, lora_rank=0, export_half=False, steps=2))
    plain = safetensors.torch.load_file(folder / "lm" / "model.safetensors")
    found = weights(tmp_path)
    assert not torch.equal(
        plain["model.layers.0.mlp.up_proj.weight"], found["language_model.model.layers.0.mlp.up_proj.weight"]
    )
    assert load(tmp_path / "model")[0].config.lora is None


def test_a_model_of_transformers_keeps_what_lora_learned(tmp_path, monkeypatch):
    others = helper(Path(__file__).parents[1] / "mllm" / "tiny_processors.py")
    model, processor = others.tiny.make("llava"), others.processor("llava")
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    others.picture().save(tmp_path / "a.png")
    texts = ["<image>\nwhere is the rocket ?", "left", "how many ?", "red"]
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 2))
    options = {"data": str(tmp_path / "a.json"), "model": str(tmp_path / "llava"), "cpu": True, "workers": 0}
    options |= {"batch_size": 2, "steps": 2, "warmup": 0, "lr": 1e-2, "output": str(tmp_path)}
    batch = T.Collator(processor)(read_conversations(tmp_path / "a.json"))
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(learned).split() == ["left", "</s>", "red", "</s>"]
    export, seen = T._export, []

    def look(trainer, trained, *rest):
        seen.append(trained.eval()(**batch).logits)
        export(trainer, trained, *rest)

    monkeypatch.setattr(T, "_export", look)
    T.run(T.Config(stage="instruct", lora_rank=4, **options))
    with torch.no_grad():
        found, before = load(tmp_path / "model")[0](**batch).logits, model(**batch).logits
    assert torch.allclose(found, seen[0], atol=1e-5) and (found - before).abs().max() > 0.1


class Stops(TrainerCallback):
    """A kill after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_as_if_nothing_had_happened(folder, aligned, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"train_tower": True, "mask": "mma", "mod_ratio": 0.5, "mod_layers": [1, 2]}
    T.run(instruct(folder, aligned, whole, **options))
    made = T.MultimodalTrainer

    def stopping(*args, **kwargs):
        trainer = made(*args, **kwargs)
        trainer.add_callback(Stops(5))
        return trainer

    monkeypatch.setattr(T, "MultimodalTrainer", stopping)
    with pytest.raises(KeyboardInterrupt):
        T.run(instruct(folder, aligned, parts, **options))
    assert not (parts / "model").exists()
    unfinished = parts / "checkpoint-5"  # killed while it was written
    shutil.copytree(parts / "checkpoint-4", unfinished)
    (unfinished / T.FINISHED).unlink()
    monkeypatch.setattr(T, "MultimodalTrainer", made)
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        T.run(instruct(folder, aligned, parts, **options, lr=1e-4))
    T.run(instruct(folder, aligned, parts, **options, log_every=3))
    expected, found = weights(whole), weights(parts)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    routers = [safetensors.torch.load_file(run / "model" / "mod.safetensors")["weight"] for run in (whole, parts)]
    assert torch.equal(*routers)


def test_the_schedule_ends_when_the_time_is_up(folder, aligned, tmp_path):
    config = instruct(folder, aligned, tmp_path, steps=10**6, max_minutes=0.04, checkpoint_every=10**5)
    told = T.run(config)
    rates = [entry["learning_rate"] for entry in told["history"] if "learning_rate" in entry]
    assert 3 < told["steps"] < 10**4 and 0.04 <= told["minutes"] < 0.2
    assert max(rates) > 0.8 * config.lr and rates[-1] < 0.1 * max(rates)
    again = T.run(config)  # the time of before counts
    assert again["steps"] <= told["steps"] + 1


def test_the_loss_is_that_of_the_model(folder, aligned, tmp_path):
    config = instruct(folder, aligned, tmp_path)
    model, processor = T.build_model(config)
    T.choose_trained(model, config)
    talks = read_conversations(folder / "train.json")[:4]
    batch = T.Collator(processor)(talks)
    trainer = T.MultimodalTrainer(config, None, model=model, args=T._arguments(config), train_dataset=talks)
    expected = model(**batch).loss
    assert torch.allclose(trainer.compute_loss(model, dict(batch)), expected, atol=1e-6)
    kept = batch["labels"] != -100
    words = processor.tokenizer.batch_decode([row[mask] for row, mask in zip(batch["labels"], kept)])
    assert words[0].split() == ["red", "<end>", "left", "<end>"]


def test_mask_and_mod_are_trained_with_and_told(folder, aligned, tmp_path, monkeypatch):
    made, routers = T.MultimodalTrainer, []

    def starting(config, handle, **kwargs):
        routers.append(handle.depth.router.weight.detach().clone())
        return made(config, handle, **kwargs)

    monkeypatch.setattr(T, "MultimodalTrainer", starting)
    config = instruct(folder, aligned, tmp_path, mask="mma", mod_ratio=0.5, mod_layers=[1, 2], lr=2e-2)
    T.run(config)
    model, processor = load(tmp_path / "model")
    options = load_trained(tmp_path / "model", model)
    assert options["mask"] == "mma" and options["depth"].ratio == 0.5 and options["depth"].layers == [1, 2]
    assert processor.tokenizer.decode(options["prompt_end"]) == "<assistant>"
    assert (options["depth"].router.weight - routers[0]).abs().max() > 1e-2  # one step of Adam is 2e-2
    assert not any(name.startswith("mod_router") for name in weights(tmp_path))
    asked = questions_of(read_conversations(folder / "train.json"))[:8]
    plain, _ = evaluate(model, processor, asked, max_new_tokens=2)
    routed, _ = evaluate(model, processor, asked, trained=options, max_new_tokens=2)
    assert routed.visual_tokens == pytest.approx(plain.visual_tokens * (1 + 0.5 + 0.5) / 3, abs=0.1)
    # The router's weights came from training: with them the answers' loss is that of the end of the run.
    batch = T.Collator(processor)(read_conversations(folder / "train.json"))
    labels = batch.pop("labels")
    with torch.no_grad(), accelerate(model, **options):
        logits = model(**batch).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    told = json.loads((tmp_path / "metrics.json").read_text())
    losses = [entry["loss"] for entry in told["history"] if "loss" in entry]
    assert loss < losses[0]


def test_accumulated_parts_are_one_batch(folder, aligned, tmp_path):
    options = {"steps": 2, "warmup": 0, "export_half": False}
    T.run(instruct(folder, aligned, tmp_path / "a", **options))
    T.run(instruct(folder, aligned, tmp_path / "b", **options, grad_accum=2))
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
    before, name = load(aligned / "model")[0].state_dict(), "projector.layers.0.weight"
    assert (first[name] - before[name]).abs().max() > 4e-3  # two steps of Adam, 5e-3 and less


def test_mod_is_refused_with_fsdp(folder, aligned, tmp_path, monkeypatch):
    made = T.MultimodalTrainer

    def sharded(*args, **kwargs):
        trainer = made(*args, **kwargs)
        trainer.is_fsdp_enabled = True
        return trainer

    monkeypatch.setattr(T, "MultimodalTrainer", sharded)
    with pytest.raises(ValueError, match="launch with DDP"):
        T.run(instruct(folder, aligned, tmp_path, mod_ratio=0.5, mod_layers=[1]))


def test_gradient_checkpointing_changes_nothing(folder, aligned, tmp_path, monkeypatch):
    options = {"train_tower": False, "mod_ratio": 0.5, "mod_layers": [1], "steps": 2}
    export, again = T._export, []

    def look(trainer, trained, *rest):
        again.append(trained.is_gradient_checkpointing)
        export(trainer, trained, *rest)

    monkeypatch.setattr(T, "_export", look)
    T.run(instruct(folder, aligned, tmp_path / "a", **options))
    T.run(instruct(folder, aligned, tmp_path / "b", **options, gradient_checkpointing=True))
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert again == [False, True] and any(first[name].any() for name in first if ".lora_B." in name)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage=pretrain", "stage must be one of align, instruct"),
        ("lora_rnk=3", "did you mean 'lora_rank'"),
        ("epochs=2", "either epochs or steps"),
        ("language_model=", "needs a model to go on with"),
        ("lora_rank=4", "trains the projector alone"),
        ("stage=instruct mod_ratio=1.5", "mod_ratio must be at least 0"),
        ("batch_size=3 grad_accum=2", "must be a multiple of 2"),
        ("data=/nowhere/train.json", "There is no file /nowhere/train.json"),
        ("images=/nowhere", "16 pictures of"),
        ("language_model=/nowhere/lm", "/nowhere/lm is not here"),
        ("tower=resnet", "no tower 'resnet'"),
    ],
)
def test_wrong_settings_are_one_sentence(folder, tmp_path, capsys, override, message):
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps(tiny.settings(folder, tmp_path / "out")))
    assert T.main([str(file), *override.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out" / "model").exists()
