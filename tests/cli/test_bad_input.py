"""What a user can give wrong: exit status 2, one line that says what to do, nothing begun."""

import re
import shutil
import zipfile

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel
from spoil import WEIGHTS, Evil, content, cut_weights

# --- schedules and settings: refused before anything is opened


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("D5", "unknown schedule 'D5'.*nearest first: D"),
        ("d44", "nearest first: D4,"),
        ("ful", "nearest first: full,"),
        ("28@0.5,14@0.4,3@1", "edges of a schedule must rise.*0.5, 0.4, 1"),
        ("28@0.5,14@0.9", "last edge of a schedule must be 1.*0.9"),
        ("28@0.5,0@1", "depth 0 runs no block"),
        ("28@0.5,-3@1", "0 or more, got -3"),
        ("28@0.5,14@", "cannot read the schedule"),
        ("28@nan,14@1", "cannot read the schedule"),
        ("uniform:0", "depth 0"),
        ("nowhere.toml", "no schedule file at nowhere.toml"),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "bench", "sample", "schedules"])
def test_schedules(refused, command, schedule, words, tmp_path):
    option = {"finetune": "--schedule", "bench": "--schedules", "sample": "--schedule"}
    given = [command, *([option[command]] if command in option else []), schedule]
    if command == "bench":
        words = words.replace("unknown schedule", "unknown method")
        given[-1] += ";full" * ("," in schedule)
    assert re.search(words, refused(*given))
    assert list((tmp_path / "cwd").iterdir()) == []


def test_a_schedule_deeper_than_the_model(refused, finetune, tmp_path):
    finetune[finetune.index("6@0.5,3@1")] = "7@0.5,3@1"
    message = refused(*finetune)
    assert "depth 7 is above the model's 6 blocks" in message
    assert list((tmp_path / "cwd").iterdir()) == []
    assert "above the model's 28" in refused("schedules", "uniform:29")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read the schedule file"),
        ("[]", "a schedule is a table"),
        ('{"layers": 6, "intervals": [{"until": 1}]}', "each interval"),
        ('{"layers": 6, "intervals": [{"until": 1, "depth": "x"}]}', "depth"),
        ('{"layers": 6, "intervals": [{"until": 1, "depth": 3, "scale": 2}]}', "each interval"),
        ('{"layers": "6", "intervals": [{"until": 1, "depth": 3}]}', "layers"),
    ],
)
def test_schedule_files(refused, content, words, tmp_path):
    (tmp_path / "s.json").write_text(content)
    assert words in refused("schedules", tmp_path / "s.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--sampler", "euler"], "unknown sampler 'euler'; known: ddpm, ddim, dpm"),
        (["sample", "--steps", "0"], "give 1 to 1000"),
        (["sample", "--steps", "1001"], "give 1 to 1000"),
        (["sample", "-n", "0"], "at least 1 image"),
        (["sample", "--batch-size", "0"], "batch of 1"),
        (["sample", "--labels", "one"], "cannot read the labels 'one'"),
        (["sample", "--labels", "1001"], "classes 0 to 999, got 1001"),
        (["bench", "--samplers", "euler:5"], "unknown sampler 'euler'"),
        (["bench", "-n", "0"], "--num-images must be at least 1, got 0"),
        (["finetune", "--eval-batch-size", "0"], "--eval-batch-size must be at least 1, got 0"),
        (["finetune", "--checkpoints-kept", "-1"], "--checkpoints-kept must be 0 or more, got -1"),
        (["schedules", "D4", "--sampler", "euler"], "unknown sampler 'euler'"),
        (["schedules", "D7", "--family", "uvit"], "unknown schedule 'D7' for the uvit family"),
        (["schedules", "--depth", "0"], "at least 1"),
        (["finetune", "--schedule", ""], "unknown schedule ''"),
        (["finetune", "--lr-schedule", "linear"], "lr_schedule must be one of constant, cosine"),
        (["finetune", "--loss-weight", "x"], "loss_weight must be one of ones, ramp"),
        (["finetune", "--mixed-precision", "fp8"], "mixed_precision must be one of no, bf16, fp16"),
        (["finetune", "--steps", "0"], "steps must be at least 1"),
        (["finetune", "--learning-rate", "nan"], "learning_rate must be above 0"),
        (["finetune", "--learning-rate", "-1"], "learning_rate must be above 0"),
        (["finetune", "--ema-decay", "1"], "ema_decay must be in"),
        (["finetune", "--label-dropout", "1.5"], "label_dropout must be in"),
        (["finetune", "--resume", "step-3"], "--resume takes 'latest', got 'step-3'"),
        (["finetune", "--resume", "latest", "-o", "gone"], "no run in gone to resume"),
        (["train", "--resume", "best"], "--resume takes 'latest', got 'best'"),
        (["finetune", "--sampler", "euler", "-o", "run"], "unknown sampler 'euler'"),
        (["finetune", "--sampling-steps", "0", "-o", "run"], "give 1 to 1000"),
        (["finetune", "--eval-images", "0", "-o", "run"], "images must be at least 1, got 0"),
        (["finetune", "--report-to", "abacus", "-o", "run"], "--report-to abacus"),
        (["finetune", "--schedule", "D9", "--data", "x"], "unknown schedule 'D9'; known, nearest"),
        (["finetune", "--data", "nowhere"], "no data at nowhere"),
        (["finetune", "--model", "nowhere", "--data", "digits"], "no model at nowhere"),
        (["finetune", "--model", "nowhere"], "give --data with nowhere"),
        (["convert", "nowhere.pt", "x"], "nowhere.pt does not exist"),
        (["sample", "--seed", str(2**64)], "a seed is in [0, 2^32)"),
        (["sample", "--seed", "-5"], "a seed is in [0, 2^32)"),
        (["bench", "--seed", str(2**32)], "a seed is in [0, 2^32)"),
        (["sample", "--guidance", "nan"], "a guidance scale is a finite number, got nan"),
        (["finetune", "--guidance", "inf", "-o", "run"], "a guidance scale is a finite number"),
        (["finetune", "--guidance-channels", "9", "-o", "run"], "9 channels cannot be guided"),
        (["finetune", "--revision", "x", "-o", "run"], "builtin has no revisions"),
        (["finetune", "--schedule", "30@1", "--dry-run"], "above the model's 28 blocks"),
        (["schedules", "--family", "uvitt"], "the family 'uvitt' has no presets of its own"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(refused, arguments, words, tmp_path):
    assert words in refused(*arguments)
    assert not (tmp_path / "cwd" / "run").exists()  # refused before a run begins


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", "--steps", "many"], "'--steps'"),
        (["finetune", "--stepz", "3"], "--stepz"),
        (["fine"], "fine"),
        (["convert"], "source"),
    ],
)
def test_what_the_parser_refuses(refused, arguments, words):
    assert words in refused(*arguments)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("steps = 'many'", "steps in the recipe"),
        ("steps = 3.5", "steps in the recipe"),
        ("steps = [3]", "steps takes one value, the recipe has [3]"),
        ("steps = true", "steps takes one value"),
        ("flip = 1", "flip takes true or false, the recipe has 1"),
        ("flip = 'yes'", "flip takes true or false"),
        ("learning_rate = 'fast'", "learning_rate in the recipe"),
        ("learning_rat = 1", "unknown setting 'learning_rat' in the recipe; did you mean"),
        ("[train]\nsteps = 0", "steps must be at least 1"),
        ("steps = ", "cannot read the recipe"),
        ("schedule = 'D5'", "unknown schedule 'D5'"),
    ],
)
def test_recipes(refused, recipe, words, tmp_path):
    (tmp_path / "r.toml").write_text(recipe)
    assert words in refused("finetune", "--recipe", tmp_path / "r.toml")
    assert "no recipe at" in refused("finetune", "--recipe", tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("[model]\nlayer = 3", "unknown settings in [model]: layer"),
        ("[model]\nimage_size = 30", "image_size 30"),
        ("[model]\nlayers = 'three'", "layers must be a whole number, got 'three'; see [model]"),
        ("[model]\nheads = 0", "heads must be from 1 to 1,000,000, got 0; see [model]"),
        ("[model]\nfamily = 'unet'", "family must be one of dit, uvit, got 'unet'; see [model]"),
        ("[model]\nfamily = 'uvit'\nlayers = 5", "layers = 5; a U-ViT has as many decoder blocks"),
        ("[model]\nnum_classes = 9", "num_classes"),
        ("[autoencoder]\nstep = 3", "unknown settings in [autoencoder]: step"),
        ("model = 3", "[model] is a table of settings, the recipe has 3"),
    ],
)
def test_recipes_for_training(refused, recipe, words, tmp_path):
    quick = "" if "autoencoder" in recipe else "\n[autoencoder]\nsteps = 1\nchannels = [8, 8, 8]\n"
    (tmp_path / "r.toml").write_text(recipe + quick)
    given = ("train", "--recipe", tmp_path / "r.toml", "-o", "run")
    assert words in refused(*given, after_progress=True)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            "[model]\nlayers = 1000000000",
            "layers must be from 1 to 1,000, got 1000000000; see [model]",
        ),
        ("[model]\nhead_dim = 1000000000", "head_dim must be from 1 to 1,000,000, got"),
        ("[model]\nhead_dim = 1000000", "parameters on images of 32 pixels takes at least"),
        ("[model]\nheads = 1000000\nhead_dim = 1000000", "no network of these sizes can be built"),
        ("[model]\nimage_size = 1000000", "on images of 1000000 pixels takes at least"),
        ("[model]\nlayers = -1", "layers must be from 1 to 1,000, got -1"),
        ("[model]\nfamily = []", "family must be text, got ()"),
        ("[model]\npatch_size = 3", "image_size 32 is not a multiple of 12"),
        ("[autoencoder]\nchannels = []", "channels must be a list of multiples of 8, at most 16"),
        ("[autoencoder]\nchannels = [-1]", "channels must be a list of multiples of 8"),
        ("[autoencoder]\nchannels = 8", "channels must be a list of multiples of 8"),
        ("[autoencoder]\nchannels = [[8]]", "channels must be a list of multiples of 8"),
        (
            "[autoencoder]\nlatent_channels = 0",
            "latent_channels must be from 1 to 1,000,000, got 0",
        ),
        ("[autoencoder]\nlearning_rate = nan", "learning_rate must be above 0, got nan; see [auto"),
        ("[autoencoder]\nlearning_rate = inf", "learning_rate must be above 0, got inf; see [auto"),
        ("[autoencoder]\nkl_weight = -1", "kl_weight must be 0 or more, got -1"),
        ("[autoencoder]\nlayers_per_block = 1000", "layers_per_block must be from 1 to 999, got"),
        ("[autoencoder]\nsteps = true", "steps must be a whole number, got True"),
        ("[autoencoder]\nseed = -1", "seed must be in [0, 2^32), got -1"),
        ("[autoencoder]\nstep = 3", "unknown settings in [autoencoder]: step"),
        ("schedule = '30@1'", "above the model's 28 blocks"),
        ("intermediate_weight = 1", "at least two depths"),
    ],
)
def test_a_dry_run_checks_all_settings_of_a_training(refused, recipe, words, tmp_path):
    (tmp_path / "r.toml").write_text(recipe)
    assert words in refused("train", "--recipe", tmp_path / "r.toml", "--dry-run")
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "-n"],
        ["bench", "--rounds"],
        ["finetune", "--checkpoints-kept"],
        ["schedules", "--depth"],
        ["inspect", "--num-heads"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("number", [str(10**30), "9" * 5_000, "1e400", "nan", "1.5"])
def test_numbers_that_no_option_takes(refused, arguments, number):
    assert arguments[1].lstrip("-") in refused(*arguments, number)


def test_only_what_is_on_the_hub_has_revisions(refused, model, original):
    for name in (model, original, "builtin"):
        assert "has no revisions" in refused("inspect", "--model", name, "--revision", "main")


# --- models


def spoil_json(model):
    (model / "model_index.json").write_text("{")


def unet(model):
    shutil.rmtree(model)
    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(model)


def pickled(model):
    (model / "transformer" / WEIGHTS).unlink()
    torch.save(Evil(), model / "transformer" / "diffusion_pytorch_model.bin")


MODELS = {
    "missing": (shutil.rmtree, "no model at"),
    "empty": (lambda m: (shutil.rmtree(m), m.mkdir()), "no model_index.json"),
    "another network": (unet, "no attention and no middle block"),
    "truncated": (cut_weights, "cannot read the model"),
    "corrupt JSON": (spoil_json, "cannot read"),
    "pickled code": (pickled, "cannot read the model"),
}


DATA = dict.fromkeys(("finetune", "bench"), ("--data", "digits"))


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("command", ["finetune", "sample", "bench", "inspect"])
def test_models(refused, model, command, case, tmp_path):
    spoil, words = MODELS[case]
    spoil(model)
    assert words in refused(command, "--model", model, *DATA.get(command, ()))
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize("command", ["finetune", "sample", "bench", "inspect", "convert"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: torch.save(Evil(), path), "could run code"),
        (lambda path: path.write_bytes(b"PK\x03\x04 cut"), "cannot be read as a checkpoint"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), "layout of no known family"),
        (lambda path: torch.save([1, 2], path), "holds a list"),
    ],
    ids=["code", "cut", "empty", "else", "list"],
)
def test_original_files(refused, command, make, words, tmp_path):
    make(tmp_path / "dit.pt")
    given = [tmp_path / "dit.pt", "x"] if command == "convert" else ["--model", tmp_path / "dit.pt"]
    assert words in refused(command, *given, *DATA.get(command, ()))
    assert list((tmp_path / "cwd").iterdir()) == []


@pytest.mark.parametrize("command", ["finetune", "bench"])
def test_another_models_data_have_to_be_named(refused, model, command, tmp_path):
    assert f"give --data with {model}" in refused(command, "--model", model)
    assert list((tmp_path / "cwd").iterdir()) == []


# --- data


def test_data(refused, finetune, data, tmp_path):
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "cut.zip", "w") as archive:
        archive.write(data / "ant" / "0.png", "ant/0.png")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "cut.zip").read_bytes()[:-30])
    for name, words in (("empty", "no images in"), ("cut.zip", "cannot read the zip")):
        finetune[finetune.index("--data") + 1] = str(tmp_path / name)
        assert words in refused(*finetune)
        assert list((tmp_path / "cwd").iterdir()) == []
    shutil.copy(data / "ant" / "0.png", data / "loose.png")
    finetune[finetune.index("--data") + 1] = str(data)
    assert "next to class folders" in refused(*finetune)


def test_a_broken_image(refused, finetune, data):
    (data / "bee" / "1.png").write_bytes(b"broken")
    before = content(data)
    assert "bee/1.png" in refused(*finetune, after_progress=True)
    assert content(data) == before


def test_more_classes_than_the_model_has(refused, finetune, data, model, make_dit, tmp_path):
    pipe = DiTPipeline.from_pretrained(model)
    config = {**pipe.transformer.config, "num_embeds_ada_norm": 1}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config))
    pipe.save_pretrained(model)
    assert "has 2 classes, the model has 1;" in refused(*finetune)
    assert list((tmp_path / "cwd").iterdir()) == []
