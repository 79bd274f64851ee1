import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.config import (
    Recipe,
    Role,
    difference,
    dump_recipe,
    identity,
    load_recipe,
    packaged_recipes,
    role_of,
)
from minimind.config.load import setting_names, setting_roles, toml_value
from minimind.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def error_message(name: str | Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(name, overrides=overrides)
    return str(caught.value)


def test_later_layers_take_precedence_and_origins_name_them(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", 'objective = "sft"\n[optim]\nlr = 1e-4\nbeta1 = 0.8\n')
    path = write(
        tmp_path / "mine.toml",
        'extends = "base.toml"\nseed = 3\n\n[optim]\nlr = 2e-4  # more\neps = 1e-7\n',
    )
    resolved = load_recipe(path, overrides=["optim.eps=1e-6", "out=runs/a"], flags={"seed": 5})
    recipe = resolved.recipe
    assert (recipe.objective, recipe.seed, recipe.out) == ("sft", 5, "runs/a")
    assert (recipe.optim.lr, recipe.optim.beta1, recipe.optim.eps) == (2e-4, 0.8, 1e-6)
    assert resolved.origins == {
        "objective": f"{tmp_path / 'base.toml'}:1",
        "optim.beta1": f"{tmp_path / 'base.toml'}:4",
        "optim.lr": f"{path}:5",
        "optim.eps": "command line",
        "out": "command line",
        "seed": "flag",
    }


def test_an_empty_table_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", 'objective = "sft"\n[optim]\nlr = 1e-4\n')
    path = write(tmp_path / "mine.toml", 'extends = "base.toml"\n[optim]\n')
    assert load_recipe(path).recipe.optim.lr == 1e-4


def test_extends_finds_packaged_recipes_too(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", 'extends = "pretrain-small"\nseed = 9\n')
    expected = load_recipe("pretrain-small").recipe.model_copy(update={"seed": 9})
    assert load_recipe(path).recipe == expected


def test_circular_extends_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'extends = "b.toml"\n')
    write(tmp_path / "b.toml", 'extends = "a.toml"\n')
    message = error_message(tmp_path / "a.toml")
    assert message.startswith(f"{tmp_path / 'a.toml'}: this recipe extends itself")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[optim]\nlrr = 1\n", ":3: optim.lrr is not a setting; did you mean optim.lr?"),
        ("optim = {lrr = 1}\n", ":2: optim.lrr is not a setting; did you mean optim.lr?"),
        ("[optimm]\nlr = 1\n", ":3: optimm is not a setting; did you mean optim?"),
        ("warmup = 0.1\n", ":2: warmup is not a setting; did you mean schedule.warmup?"),
        ("[optim]\n\nlr = -1.0\n", ":4: optim.lr = -1.0: must be greater than 0"),
        ("optim.lr = '1'\n", ':2: optim.lr = "1": must be a valid number'),
        ("optim.lr = nan\n", ":2: optim.lr = nan: must be"),
        ("seed = true\n", ":2: seed = true: must be a valid integer"),
        ("seed = 1979-05-27\n", ":2: seed = 1979-05-27: must be"),
        ("optim = 3\n", ":2: optim = 3: must be a group of settings"),
        ("[training]\nprecision = 'bf8'\n", "must be 'auto', 'bf16', 'fp16' or 'fp32'"),
        ("[model]\npreset = 'smal'\n", "must be one of nano, nano-moe, demo"),
        ("[[data.sources]]\npath = 'a'\nwait = 2\n", ":2: data.sources.0.wait is not a setting"),
        (
            "[training]\nglobal_batch_size = 10\nmicro_batch_size = 4\n",
            ":4: training: global_batch_size (10) must be a multiple",
        ),
        (
            "[schedule]\nname = 'cosine'\ndecay = 0.3\n",
            ":4: schedule: decay (0.3) applies to wsd only, but the schedule is cosine",
        ),
        (
            "[schedule]\nname = 'wsd'\nwarmup = 0.9\n",
            ":4: schedule: warmup (0.9) and decay (0.2) are fractions of the same steps and sum to "
            "more than 1; lower one of them",
        ),
        ("[model]\nnum_attention_heads = 3\n", ":3: model: num_attention_heads (3) must be"),
        ("[model]\nhidden_size = 0\n", ":3: model.hidden_size = 0: must be"),
        ("[optim\nlr = 1\n", ":2: not TOML: "),
        ("seed = 1\nseed = 2\n", ":3: not TOML: "),
        ("seed = [1,\n", ":2: not TOML: "),
        ("extends = 3\n", ":2: extends = 3: must be the name of one recipe"),
        ("extends = 'nowhere'\n", ':2: extends = "nowhere": '),
        ("out = 2024\n", ':2: out = 2024: must be a valid string; write "2024"'),
        (f"seed = {'9' * 5000}\n", ":2: not TOML: Exceeds the limit"),
        (f"seed = {'[' * 5000}\n", ": its values are nested too deeply"),
    ],
)
def test_errors_name_file_line_and_key(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "mine.toml", f"objective = 'sft'\n{text}")
    message = error_message(path)
    assert message.startswith(f"{path}:")
    assert expected in message


def test_a_contradiction_is_in_the_file_that_changed_last(tmp_path: Path) -> None:
    text = "extends = 'pretrain-small'\n[schedule]\nname = 'cosine'\ndecay = 0.3\n"
    path = write(tmp_path / "mine.toml", text)
    assert error_message(path).startswith(f"{path}:4: schedule: decay (0.3) applies to wsd only")


def test_a_name_that_is_not_utf_8_cannot_be_recorded() -> None:
    recipe = load_recipe("pretrain-small", flags={"data.sources": ["caf\udce9.jsonl"]}).recipe
    with pytest.raises(ConfigError, match="not UTF-8; rename the file or folder"):
        dump_recipe(recipe)


def test_all_errors_are_reported_together(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.toml", "objective = 'sft'\nsed = 1\n[optim]\nlr = 0.0\n")
    lines = error_message(path, "data.seq_lens=3").splitlines()
    assert len(lines) == 3
    assert f"{path}:2: sed is not a setting; did you mean seed?" in lines
    assert "command line: data.seq_lens is not a setting; did you mean data.seq_len?" in lines


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "command line: optim.lrr is not a setting; did you mean optim.lr?"),
        ("lr=1", "command line: lr is not a setting; did you mean optim.lr?"),
        ("optim.lr.x=1", "command line: optim.lr.x is not a setting; did you mean optim.lr?"),
        (
            "optim.learningrate=1",
            "command line: optim.learningrate is not a setting; did you mean optim.lr?",
        ),
        (
            "optimizer.learning_rate=1",
            "command line: optimizer is not a setting; did you mean optim?",
        ),
        ("learning_rate=1", "command line: learning_rate is not a setting; did you mean optim.lr?"),
        ("zzz=1", "command line: zzz is not a setting; --explain lists all settings"),
        (
            "optim.lr=fast",
            'command line: optim.lr = "fast": must be a valid number',
        ),
        (
            "out=2024",
            "command line: out = 2024: must be a valid string; write out='\"2024\"'",
        ),
        (
            "data.sources=a.jsonl",
            'command line: data.sources = "a.jsonl": must be a valid list; write '
            "data.sources='[\"a.jsonl\"]'",
        ),
        ("=1", "command line: '=1' is not of the form KEY=VALUE, such as optim.lr=3e-4"),
        ("seed", "command line: 'seed' is not of the form KEY=VALUE, such as optim.lr=3e-4"),
        (
            "training.micro_batch_size=7",
            "command line: training: global_batch_size (128) must be a multiple",
        ),
    ],
)
def test_errors_on_the_command_line(override: str, expected: str) -> None:
    assert error_message("pretrain-small", override).startswith(expected)


def test_a_setting_is_not_given_twice() -> None:
    with pytest.raises(ConfigError, match="command line: out is also set by the command"):
        load_recipe("pretrain-small", overrides=["out=a"], flags={"out": "b"})


def test_override_values_are_toml_or_bare_strings() -> None:
    overrides = [
        "model.preset=base",
        "training.compile=true",
        'data.sources=["a.jsonl", "b.jsonl@0.5", {path = "c@d", weight = 2, schema="qa"}]',
        "out=it's here",
    ]
    recipe = load_recipe("pretrain-small", overrides=overrides).recipe
    assert (recipe.model.preset, recipe.training.compile) == ("base", True)
    assert recipe.out == "it's here"
    assert [(s.path, s.weight, s.record_schema) for s in recipe.data.sources] == [
        ("a.jsonl", 1.0, "auto"),
        ("b.jsonl", 0.5, "auto"),
        ("c@d", 2.0, "qa"),
    ]


def test_a_missing_required_setting_is_an_error() -> None:
    assert error_message(None).startswith("objective is not set")


def test_an_unknown_recipe_is_refused_with_suggestions() -> None:
    message = error_message("pretran-small")
    assert "did you mean pretrain-small?" in message
    assert all(name in message for name in packaged_recipes())


def test_recipes_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes("objective = '中'".encode("gbk"))
    assert error_message(path) == f"{path}: not UTF-8 text (byte 13); save it as UTF-8"


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbfobjective = 'sft'\r\nseed = 4\r\n")
    assert load_recipe(path).recipe.seed == 4


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_load_and_survive_a_dump(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name).recipe
    kind = name.replace("lora", "sft") if recipe.lora else name
    assert recipe.objective in kind.split("-")
    shapes = {"pretrain-base": "base", "pretrain-moe": "moe", "demo-pretrain": "demo"}
    assert recipe.model.preset == shapes.get(name, "small")
    reloaded = load_recipe(write(tmp_path / "recipe.toml", dump_recipe(recipe))).recipe
    assert reloaded == recipe
    assert difference(reloaded, recipe) == {}


def test_choosing_cosine_drops_the_decay_of_an_inherited_wsd_schedule(tmp_path: Path) -> None:
    """In an extending recipe and on the command line; an explicit decay is refused."""
    assert load_recipe("pretrain-small").recipe.schedule.decay == 0.4
    chosen = load_recipe("pretrain-small", overrides=["schedule.name=cosine"])
    assert (chosen.recipe.schedule.name, chosen.recipe.schedule.decay) == ("cosine", None)
    assert "schedule.decay" not in chosen.origins
    path = tmp_path / "mine.toml"
    write(path, "extends = 'pretrain-small'\nschedule.name = 'cosine'\n")
    assert load_recipe(path).recipe.schedule == chosen.recipe.schedule
    path = write(path, dump_recipe(chosen.recipe))
    assert load_recipe(path).recipe == chosen.recipe
    wsd = load_recipe(path, overrides=["schedule.name=wsd"]).recipe
    assert wsd.schedule.decay == 0.2
    for overrides in (["schedule.decay=0.3"], ["schedule.decay=0.3", "schedule.name=cosine"]):
        with pytest.raises(
            ConfigError, match=r"command line: schedule: decay \(0.3\) applies to wsd"
        ):
            load_recipe(path, overrides=overrides)
    table = ['schedule={name="wsd",decay=0.3}', "schedule.name=cosine"]
    assert load_recipe(path, overrides=table).recipe.schedule.decay is None


def test_epochs_replace_inherited_steps(tmp_path: Path) -> None:
    assert load_recipe("lora-identity").recipe.training.steps == 200
    chosen = load_recipe("lora-identity", overrides=["training.epochs=4"]).recipe.training
    assert (chosen.steps, chosen.epochs) == (None, 4.0)
    path = write(tmp_path / "mine.toml", "extends = 'lora-identity'\ntraining.epochs = 4\n")
    assert load_recipe(path).recipe.training == chosen
    both = load_recipe("lora-identity", overrides=["training.epochs=4", "training.steps=9"])
    assert both.recipe.training.steps == 9


def test_an_existing_model_replaces_an_inherited_shape() -> None:
    assert load_recipe("pretrain-base").recipe.model.preset == "base"
    chosen = load_recipe("pretrain-base", flags={"model.init": "out/base"})
    assert chosen.recipe.model.init == "out/base" and "model.preset" not in chosen.origins
    with pytest.raises(ConfigError, match="preset: cannot be set for an existing model"):
        load_recipe("pretrain-base", overrides=["model.init=a", "model.preset=base"])


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    text=TEXT,
    lr=st.floats(min_value=1e-300, max_value=1e300),
    sources=st.lists(st.tuples(TEXT, st.floats(min_value=1e-9, max_value=1e9)), max_size=3),
    steps=st.none() | st.integers(min_value=1),
)
def test_dumps_load_as_equal_recipes(
    text: str, lr: float, sources: list[tuple[str, float]], steps: int | None
) -> None:
    recipe = Recipe(
        objective="sft",
        out=text,
        optim={"lr": lr},
        data={"sources": [{"path": p, "weight": w} for p, w in sources]},
        training={"steps": steps},
        validation={"prompts": [text]},
    )
    assert Recipe(**tomllib.loads(dump_recipe(recipe))) == recipe


def test_toml_values() -> None:
    assert toml_value('a"\\\n') == '"a\\"\\\\\\U0000000a"'
    assert toml_value([True, 1, 1e-8, "长"]) == '[true, 1, 1e-08, "长"]'


def test_difference_describes_changed_settings() -> None:
    old = load_recipe("pretrain-small").recipe
    new = load_recipe("pretrain-small", overrides=["optim.lr=0.002", "out=x"]).recipe
    assert difference(old, new) == {
        "out": 'out was not set and is now "x"',
        "optim.lr": "optim.lr was 0.001 and is now 0.002",
    }


OPERATION = {
    *("out", "device", "data.max_invalid_fraction", "data.store", "validation.every"),
    *("validation.prompts", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best"),
    *(f"training.{name}" for name in ("micro_batch_size", "activation_checkpointing", "backend")),
    *(f"training.{name}" for name in ("zero_stage", "compile", "log_every", "trackers")),
}


def test_every_setting_is_marked_as_identity_or_operation() -> None:
    """A setting without exactly one mark raises. New operation settings must be added here."""
    roles = setting_roles()
    assert {key for key, role in roles.items() if role is Role.OPERATION} == OPERATION
    assert set(roles) == set(setting_names())
    assert {"seed", "optim.lr", "training.steps", "lora.rank", "data.sources"} <= set(
        identity(load_recipe("lora-small").recipe)
    )


def test_entries_of_a_setting_and_absent_groups_have_a_role() -> None:
    assert (
        role_of("data.variables.name") is role_of("lora") is role_of("lora.rank") is Role.IDENTITY
    )
    assert role_of("training.trackers") is Role.OPERATION


def test_the_seed_has_the_range_of_generators() -> None:
    assert load_recipe("sft-small", overrides=[f"seed={2**63 - 1}"]).recipe.seed == 2**63 - 1
    with pytest.raises(ConfigError, match=r"seed = 9223372036854775808: must be less than"):
        load_recipe("sft-small", overrides=[f"seed={2**63}"])


def test_setting_names_reach_into_groups() -> None:
    names = setting_names()
    assert {"objective", "model.init", "data.sources", "optim.lr"} <= set(names)
    assert "optim" not in names


def test_optional_lora_and_arbitrary_variables_survive_a_dump(tmp_path: Path) -> None:
    plain = load_recipe("sft-small").recipe
    assert plain.lora is None and "[lora]" not in dump_recipe(plain)
    overrides = ["lora.rank=4", "data.variables.name=小明", 'data.variables.author="李雷 }\\""']
    adapted = load_recipe("sft-small", overrides=overrides).recipe
    assert adapted.lora is not None and (adapted.lora.rank, adapted.lora.alpha) == (4, 16.0)
    assert adapted.data.variables == {"name": "小明", "author": '李雷 }"'}
    unusual = adapted.model_copy(
        update={"data": adapted.data.model_copy(update={"variables": {"作者 1": "李雷"}})}
    )
    for recipe in (plain, adapted, unusual):
        path = tmp_path / "recipe.toml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path).recipe == recipe
    assert difference(plain, adapted)["lora.rank"] == "lora.rank was not set and is now 4"
    with pytest.raises(ConfigError, match=r"lora\.rnak is not a setting; did you mean lora\.rank"):
        load_recipe("sft-small", overrides=["lora.rnak=4"])


@pytest.mark.parametrize("name", ["lora-small", "lora-identity", "lora-medical"])
def test_recipes_with_lora_are_consistent(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert recipe.lora is not None
    assert (recipe.objective, recipe.optim.name) == ("sft", "adamw")


def test_adding_lora_on_the_command_line_selects_adamw() -> None:
    full = {name: load_recipe(name).recipe.optim.lr for name in ("lora-small", "dpo-small")}
    for name, lr in (("sft-small", full["lora-small"]), ("dpo-small", 10 * full["dpo-small"])):
        adapted = load_recipe(name, overrides=["lora.rank=8"])
        assert (adapted.recipe.optim.name, adapted.recipe.optim.lr) == ("adamw", lr)
        assert adapted.origins["optim.lr"] == "default with lora"
    own = load_recipe("dpo-small", overrides=["lora.rank=8", "optim.lr=1e-4"]).recipe.optim
    assert (own.name, own.lr) == ("adamw", 1e-4)
    assert load_recipe("dpo-small").recipe.optim.name == "muon"
    muon = load_recipe("dpo-small", overrides=["lora.rank=8", "optim.name=muon"]).recipe.optim
    assert (muon.name, muon.lr) == ("muon", 5e-5)  # the stage refuses it
    unchanged = load_recipe("lora-small", overrides=["lora.rank=8"])
    assert "default with lora" not in unchanged.origins.values()
