"""Files: `extends`, sections by name, `--set`, the resolved dump, and what the hashes see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp4dist.errors import ConfigError
from fp4dist.spec.build import build
from fp4dist.spec.load import (
    config_hash,
    config_root,
    dump,
    load_model,
    load_recipe,
    load_run,
    model_hash,
    recipe_hash,
    shipped,
)
from fp4dist.spec.recipe import Recipe, Rule
from fp4dist.spec.run import RunConfig

RUN = """
run: {name: trial}
model: small
recipe: nvidia_nvfp4
data: {train: [tokens]}
optim: {lr: 2e-3}
train: {steps: 100, global_batch_size: 8, micro_batch_size: 4}
"""
SMALL = """
name: small
num_layers: 2
hidden_size: 128
ffn_hidden_size: 256
num_attention_heads: 4
vocab_size: 512
seq_length: 64
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with a run file and the model file it names."""
    write(tmp_path, "trial.yaml", RUN)
    write(tmp_path, "small.yaml", SMALL)
    return tmp_path


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, *overrides: str, name: str = "trial.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(folder / name, overrides)
    return str(caught.value)


# ---------- shipped


def test_the_shipped_folder_is_found() -> None:
    assert {"bf16", "nvidia_nvfp4", "nvidia_nvfp4_46", "quartet2", "tetrajet_v2_core"} <= set(shipped("recipes"))
    assert (config_root() / "recipes" / "bf16.yaml").is_file()


@pytest.mark.parametrize("name", shipped("models"))
def test_shipped_models_load(name: str) -> None:
    model = load_model(name)
    assert model.name == name
    assert build(type(model), yaml.safe_load(dump(model))) == model


@pytest.mark.parametrize("name", shipped("runs"))
def test_shipped_runs_load_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_run(name)
    again = load_run(write(tmp_path, "config.resolved.yaml", dump(config)))
    assert again == config
    assert config_hash(again) == config_hash(config)


def test_names_paths_and_suggestions() -> None:
    path = config_root() / "recipes" / "quartet2.yaml"
    assert load_recipe(path) == load_recipe(str(path)) == load_recipe("quartet2")
    assert load_recipe("configs/recipes/quartet2.yaml") == load_recipe("quartet2")
    with pytest.raises(
        ConfigError, match=r"recipes: no file for 'quartet3' \(looked at .*\); did you mean 'quartet'\?"
    ):
        load_recipe("quartet3")
    with pytest.raises(ConfigError, match=r"models: no file for 'zzz' .*; shipped models: .*llama_124m"):
        load_model("zzz")
    with pytest.raises(ConfigError, match=r"no file for 'nowhere/x.yaml'"):
        load_recipe("nowhere/x.yaml")


# ---------- sections and extends


def test_sections_by_name(folder: Path) -> None:
    config = load_run(folder / "trial.yaml")
    assert config.model.hidden_size == 128
    assert config.recipe == load_recipe("nvidia_nvfp4")
    assert config.optim.lr == 0.002


def test_unknown_section_names(folder: Path) -> None:
    write(folder, "trial.yaml", RUN.replace("recipe: nvidia_nvfp4", "recipe: nvidia_nvfp"))
    assert "recipes: no file for 'nvidia_nvfp'" in refusal(folder)
    assert refusal(folder).endswith("; did you mean 'nvidia_nvfp4'?")
    write(folder, "trial.yaml", RUN.replace("model: small", "model: smal"))
    assert "models: no file for 'smal'" in refusal(folder)


def test_a_run_and_its_model_may_share_a_name(tmp_path: Path) -> None:
    """`runs/small.yaml` with `model: small` means `models/small.yaml`, not itself."""
    write(tmp_path, "models/small.yaml", SMALL)
    path = write(tmp_path, "runs/small.yaml", RUN)
    assert load_run(path).model.hidden_size == 128
    beside = write(tmp_path, "flat/quickstart.yaml", RUN.replace("model: small", "model: quickstart"))
    assert load_run(beside).model == load_model("quickstart")  # not the run file of that name


def test_another_run_beside_is_not_a_model(tmp_path: Path) -> None:
    write(tmp_path, "models/small.yaml", SMALL)
    write(tmp_path, "runs/small.yaml", RUN)
    path = write(tmp_path, "runs/other.yaml", RUN)
    assert load_run(path).model.name == "small"


def test_what_lies_beside_wins_over_what_is_shipped(folder: Path) -> None:
    write(folder, "quartet2.yaml", "name: mine\nnotes: everything in bf16\n")
    write(folder, "trial.yaml", RUN.replace("nvidia_nvfp4", "quartet2"))
    assert load_run(folder / "trial.yaml").recipe.name == "mine"


def test_a_local_recipe_extends_the_shipped_one_of_its_name(folder: Path) -> None:
    path = write(folder, "quartet2.yaml", "extends: quartet2\nnotes: mine\n")
    recipe = load_recipe(path)
    assert recipe.notes == "mine"
    assert recipe.linears == load_recipe("quartet2").linears


def test_a_recipe_anywhere_extends_a_shipped_one(tmp_path: Path) -> None:
    path = write(tmp_path, "anywhere/mine.yaml", "extends: nvidia_nvfp4\nname: mine\n")
    assert load_recipe(path) == replace(load_recipe("nvidia_nvfp4"), name="mine")


def test_a_section_extends_a_shipped_file(folder: Path) -> None:
    changed = RUN.replace("model: small", "model: {extends: small, seq_length: 32}")
    changed = changed.replace("recipe: nvidia_nvfp4", "recipe: {extends: quartet2, name: mine}")
    config = load_run(write(folder, "trial.yaml", changed))
    assert (config.model.seq_length, config.model.hidden_size) == (32, 128)
    assert config.recipe == replace(load_recipe("quartet2"), name="mine")


def test_extends_chain_merges_mappings_and_replaces_the_rest(folder: Path) -> None:
    write(folder, "longer.yaml", "extends: trial\ntrain: {steps: 500}\ndata: {train: [a, b]}\n")
    write(folder, "longest.yaml", "extends: longer\ntrain: {global_batch_size: 16}\n")
    config = load_run(folder / "longest.yaml")
    assert (config.train.steps, config.train.global_batch_size, config.train.micro_batch_size) == (500, 16, 4)
    assert config.data.train == ("a", "b")
    assert config.run.name == "trial"


def test_extends_list_later_wins(folder: Path) -> None:
    write(folder, "a.yaml", "train: {steps: 1}\noptim: {lr: 1}\nrecipe: quartet2\n")
    write(folder, "b.yaml", "train: {steps: 2}\nrecipe: bf16\n")
    config = load_run(write(folder, "c.yaml", "extends: [trial, a, b]\nrun: {name: c}\n"))
    assert (config.train.steps, config.optim.lr, config.run.name) == (2, 1.0, "c")
    assert config.recipe == load_recipe("bf16")  # replaced, not mixed with quartet2's linears
    assert load_run(write(folder, "d.yaml", "extends: [b, trial]\n")).train.steps == 100


def test_an_extended_run_finds_its_own_sections_and_can_be_changed(tmp_path: Path) -> None:
    write(tmp_path, "base/trial.yaml", RUN)
    write(tmp_path, "base/small.yaml", SMALL)
    path = write(tmp_path, "mine/longer.yaml", "extends: ../base/trial.yaml\nmodel: {seq_length: 32}\n")
    config = load_run(path)
    assert (config.model.name, config.model.seq_length) == ("small", 32)
    path = write(tmp_path, "mine/other.yaml", "extends: ../base/trial.yaml\nmodel: quickstart\n")
    assert load_run(path).model == load_model("quickstart")


def test_extends_cycles(folder: Path) -> None:
    write(folder, "a.yaml", "extends: b\n")
    write(folder, "b.yaml", "extends: a\n")
    assert "b.yaml: extends 'a' leads back to itself" in refusal(folder, name="a.yaml")
    write(folder, "self.yaml", "extends: self\n")
    assert "self.yaml: extends 'self' leads back to itself" in refusal(folder, name="self.yaml")


@pytest.mark.parametrize("text", ["extends: {a: b}", "extends: [3]", "extends:"])
def test_extends_takes_names(folder: Path, text: str) -> None:
    write(folder, "trial.yaml", text)
    assert "trial.yaml: extends: expected a name, a path or a list of them, got" in refusal(folder)


def test_a_tagged_block_of_another_kind_replaces(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", linear_file("{kind: absmax, headroom: 17/16}"))
    same = load_recipe(write(tmp_path, "b.yaml", f"extends: a\n{linear_file('{budget: 256}', name=False)}"))
    other = load_recipe(write(tmp_path, "c.yaml", f"extends: a\n{linear_file('{kind: four_over_six}', name=False)}"))
    assert same.linears["fp4"].fprop.x.scale == build_rule("absmax", headroom=1.0625, budget=256.0)  # type: ignore[union-attr]
    assert other.linears["fp4"].fprop.x.scale == build_rule("four_over_six")  # type: ignore[union-attr]


def linear_file(scale: str, *, name: bool = True) -> str:
    head = "name: a\nrules: [{linear: fp4}]\n" if name else ""
    return f"{head}linears: {{fp4: {{fprop: {{x: {{format: nvfp4, scale: {scale}}}}}}}}}\n"


def build_rule(kind: str, **fields: float) -> Any:
    from fp4dist.spec.blocks import ScaleRule

    return build(ScaleRule, {"kind": kind, **fields})


def test_null_removes_a_block(tmp_path: Path) -> None:
    off = "{rotation: null, allow_bias: true}"
    text = f"extends: quartet2\nlinears: {{fp4: {{wgrad: {{dy: {off}, x: {off}}}}}}}\n"
    wgrad = load_recipe(write(tmp_path, "mine.yaml", text)).linears["fp4"].wgrad
    assert wgrad.dy is not None
    assert wgrad.dy.rotation is None
    assert wgrad.dy.rounding == load_recipe("quartet2").linears["fp4"].wgrad.dy.rounding  # type: ignore[union-attr]


# ---------- bad files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {name: a}\nrun: {name: b}\n", "trial.yaml: line 2: key 'run' is given twice; keep one"),
        ("optim: {lr: 1, lr: 2}\n", "trial.yaml: line 1: key 'lr' is given twice"),
        ("run: [\n", "trial.yaml: not valid YAML: "),
        ("run: !!python/object:os.system {}\n", "trial.yaml: not valid YAML: could not determine a constructor"),
        ("- a\n", "trial.yaml: expected a mapping at the top, got list"),
        ("", "trial.yaml: expected a mapping at the top, got NoneType"),
        ("a: &a {b: *a}\n", "trial.yaml: an alias refers to a place that contains it"),
    ],
)
def test_bad_files_are_named(folder: Path, text: str, message: str) -> None:
    write(folder, "trial.yaml", text)
    assert message in refusal(folder)
    write(folder, "child.yaml", "extends: trial\n")  # and the same through `extends`
    assert message in refusal(folder, name="child.yaml")


def test_bytes_that_are_no_text(folder: Path) -> None:
    (folder / "trial.yaml").write_bytes(b"run: \xff\xfe")
    assert "trial.yaml: not valid YAML: 'utf-8' codec" in refusal(folder)


def test_merge_keys_are_no_duplicates(folder: Path) -> None:
    recipe = """
    name: merged
    linears:
      fp4:
        wgrad: {dy: &a {format: nvfp4, rotation: {size: 16, signs: none}}, x: {<<: *a, rounding: nearest}}
        fprop: {x: {<<: *a, format: nvfp4}, w: *a}
    rules: [{linear: fp4}]
    """
    loaded = load_recipe(write(folder, "merged.yaml", recipe)).linears["fp4"]
    assert loaded.wgrad.x == loaded.wgrad.dy == loaded.fprop.x


def test_errors_name_file_and_key(folder: Path) -> None:
    write(folder, "trial.yaml", RUN.replace("lr: 2e-3", "lr: fast"))
    assert refusal(folder) == "trial.yaml: optim.lr: expected a finite number, got 'fast' (str)"
    write(folder, "trial.yaml", RUN + "optimizer: {}\n")
    assert refusal(folder) == "trial.yaml: optimizer: unknown key of RunConfig; did you mean 'optim'?"


# ---------- --set


def test_overrides(folder: Path) -> None:
    config = load_run(
        folder / "trial.yaml",
        ["train.steps=7", "optim.lr=1e-4", "parallel.tp=2", "run.dir=out/a=b", "model.tie_embeddings=true",
         "data.train=['0.3', a, '0.7', b]", "checkpoint.load=null"],
    )  # fmt: skip
    assert (config.train.steps, config.optim.lr, config.parallel.tp) == (7, 1e-4, 2)
    assert (config.run.dir, config.model.tie_embeddings, config.checkpoint.load) == ("out/a=b", True, None)
    assert config.data.train == ("0.3", "a", "0.7", "b")
    assert config.train.global_batch_size == 8


def test_override_of_a_list_item(folder: Path) -> None:
    config = load_run(folder / "trial.yaml", ["recipe.rules.0.last=2", "data.train.0=other"])
    assert config.recipe.rules[0].last == 2
    assert config.data.train == ("other",)


def test_override_of_a_whole_section(folder: Path) -> None:
    assert load_run(folder / "trial.yaml", ["recipe=quartet2"]).recipe == load_recipe("quartet2")
    config = load_run(
        folder / "trial.yaml", ["recipe=quartet2", "recipe.name=mine", "model={extends: small, seq_length: 8}"]
    )
    assert config.recipe == replace(load_recipe("quartet2"), name="mine")
    assert config.model.seq_length == 8


def test_an_override_reaches_one_place_of_a_yaml_anchor(folder: Path) -> None:
    """The shipped file writes `*sr` for several operands; they are separate operands all the same."""
    shipped_recipe = load_recipe("nvidia_nvfp4")
    recipe = load_run(folder / "trial.yaml", ["recipe.linears.fp4.dgrad.dy.rounding=nearest"]).recipe
    assert recipe.linears["fp4"].dgrad != shipped_recipe.linears["fp4"].dgrad
    assert recipe.linears["fp4_fprop_bf16"] == shipped_recipe.linears["fp4_fprop_bf16"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--set 'train.steps': expected key.sub=value"),
        ("=3", "--set '=3': expected key.sub=value"),
        ("train.steps=[", "--set train.steps: '[' is not valid YAML"),
        ("train.stepz=3", "trial.yaml: train.stepz: unknown key of TrainConfig; did you mean 'steps'?"),
        ("trane.steps=3", "trial.yaml: trane: unknown key of RunConfig; did you mean 'train'?"),
        ("train.steps.more=3", "--set train.steps.more: train.steps is 100, not a section; set it as a whole"),
        ("train.steps.more.yet=3", "--set train.steps.more: 100 is not a section; set it as a whole"),
        ("recipe.rules.9.last=2", "--set recipe.rules.9: '9' is not an index below 2"),
        ("recipe.rules.first.last=2", "--set recipe.rules.first: 'first' is not an index below 2"),
        ("data.train.1=x", "--set data.train.1: '1' is not an index below 1"),
        ("data.train.\u00b2=x", "--set data.train.\u00b2: '\u00b2' is not an index below 1"),
        ("train.steps=ten", "trial.yaml: train.steps: expected int, got 'ten' (str)"),
        ("train.steps=1e3", "trial.yaml: train.steps: expected int, got '1e3' (str)"),
        ("train=5", "trial.yaml: train: expected a mapping for TrainConfig, got 5"),
        ("recipe=quartet3", "recipes: no file for 'quartet3'"),
        ("optim.warmup_steps=100", "trial.yaml: optim.warmup_steps = 100 must be smaller than train.steps = 100"),
        ("parallel={tp: 2, tp: 4}", "key 'tp' is given twice"),
    ],
)
def test_bad_overrides(folder: Path, override: str, message: str) -> None:
    assert message in refusal(folder, override)


# ---------- dump and hashes


def test_the_resolved_dump_loads_as_an_equal_object(folder: Path) -> None:
    config = load_run(folder / "trial.yaml", ["optim.beta2=19/20", "data.prepare={sources: [a.txt]}"])
    text = dump(config)
    assert "extends" not in text
    assert "&id" not in text
    again = load_run(write(folder, "elsewhere/config.resolved.yaml", text))
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert dump(again) == text


@pytest.mark.parametrize(
    "override",
    ["run.dir=elsewhere", "logging.every=3", "logging.wandb=true", "checkpoint.every=5",
     "checkpoint.allow_recipe_change=true", "backend.kind=reference", "backend.allow_reference=true",
     "train.stop_after=3"],
)  # fmt: skip
def test_the_hash_ignores_what_changes_no_result(folder: Path, override: str) -> None:
    plain, changed = load_run(folder / "trial.yaml"), load_run(folder / "trial.yaml", [override])
    assert changed != plain
    assert config_hash(changed) == config_hash(plain)


@pytest.mark.parametrize(
    "override",
    ["run.seed=1", "model.seq_length=32", "model.rope_base=5000", "data.train=[x]", "optim.lr=1", "optim.clip_grad=0",
     "train.steps=99", "train.micro_batch_size=2", "train.dtype=fp32", "parallel.tp=2", "engine.kind=deepspeed",
     "recipe=quartet2", "recipe.rules.0.last=1", "recipe.linears.fp4.dgrad.dy.scale.headroom=9/8"],
)  # fmt: skip
def test_the_hash_sees_what_changes_a_result(folder: Path, override: str) -> None:
    hashes = {config_hash(load_run(folder / "trial.yaml", [o] if o else [])) for o in ("", override)}
    assert len(hashes) == 2
    assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)


def test_recipe_hash_is_about_what_the_recipe_does() -> None:
    recipe = load_recipe("quartet2")
    assert recipe_hash(replace(recipe, name="x", notes="y", paper="z")) == recipe_hash(recipe)
    assert recipe_hash(replace(recipe, rules=(Rule(first=1, linear="bf16"), *recipe.rules))) != recipe_hash(recipe)
    assert len({recipe_hash(load_recipe(name)) for name in shipped("recipes")}) == len(shipped("recipes"))


def test_model_hash_ignores_the_name() -> None:
    model = load_model("llama_124m")
    assert model_hash(replace(model, name="x")) == model_hash(model)
    assert model_hash(replace(model, num_layers=13)) != model_hash(model)


def test_equal_objects_have_equal_hashes() -> None:
    """Python code may write `last=1` where YAML reads 1.0."""
    recipe = Recipe(name="r", rules=(Rule(last=1, linear="bf16"),))
    again = build(Recipe, yaml.safe_load(dump(recipe)))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_the_hash_does_not_depend_on_the_process(folder: Path) -> None:
    data = yaml.safe_load(dump(load_run(folder / "trial.yaml")))
    shuffled = {k: data[k] for k in reversed(data)}
    assert config_hash(build(RunConfig, shuffled)) == config_hash(build(RunConfig, data))
