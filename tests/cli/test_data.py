"""What the commands say of the data, and the labels that ``--class-map`` sets."""

import json
import shutil

import pytest
from diffusers import DiTPipeline, DiTTransformer2DModel

import accelkit
from accelkit.bench import comparison
from accelkit.train import loop
from accelkit.train.rundir import RunDirectory

SMALL = ["-n", "2", "--batch-size", "2", "--samplers", "ddim:2", "--rounds", "1", "--baselines", ""]


@pytest.fixture
def class_map(tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"ant": 9, "bee": 4}))
    return path


@pytest.fixture
def trained(monkeypatch, without_comparison):
    """The sets of labels that runs are trained on, in order."""
    seen, real = [], loop.Labels

    def spied(labels, backbone):
        seen.append(set(labels.tolist()))
        return real(labels, backbone)

    monkeypatch.setattr(loop, "Labels", spied)
    return seen


def said(lines, start):
    (line,) = [line for line in lines if line.startswith(start)]
    assert len(line) <= 400
    return line


def test_labels_are_said_before_training(main, finetune, data, trained):
    (data / "notes.md").write_text("about the insects")
    status, _, lines = main(*finetune)
    assert (status, trained) == (0, [{0, 1}])
    line = said(lines, "training on 6 images")
    assert line.endswith("/data, labels ant=0, bee=1; other files passed over: 1 (1 .md)")
    assert lines.index(line) < next(i for i, text in enumerate(lines) if "loss" in text)


def test_a_class_map_sets_them(main, finetune, class_map, trained):
    assert main(*finetune)[0] == 0
    status, _, lines = main(*finetune, "--overwrite", "--class-map", class_map)
    assert said(lines, "training on 6 images").endswith("labels bee=4, ant=9")
    assert (status, trained) == (0, [{0, 1}, {4, 9}])
    assert RunDirectory("run").stored()["source"]["class_map"] == str(class_map)
    status, _, lines = main("finetune", "-o", "run", "--resume", "latest")
    assert (status, trained[2:]) == (0, [{4, 9}])  # as it was begun, and said once
    assert not [line for line in lines if line.startswith("training on")]


def test_a_recipe_names_a_class_map(main, finetune, class_map, trained, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'class-map = "{class_map}"\n')
    assert main(*finetune, "--recipe", recipe)[0] == 0
    assert trained == [{4, 9}]


def test_training_from_scratch_keeps_names_by_label(main, data, class_map, trained, tmp_path):
    sizes = "layers = 4\nheads = 2\nhead_dim = 8\nimage_size = 8\nnum_classes = 10\n"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"steps = 1\nbatch_size = 4\n[model]\n{sizes}"
        "[autoencoder]\nchannels = [8, 8]\nsteps = 1\nbatch_size = 4\n"
    )
    given = ["train", "--recipe", recipe, "--data", data, "--class-map", class_map, "-o", "run"]
    status, _, lines = main(*given)
    assert (status, trained) == (0, [{4, 9}])
    assert said(lines, "training on 6 images").endswith("labels bee=4, ant=9")
    assert accelkit.from_pretrained("run/pipeline").labels == {"bee": 4, "ant": 9}


def test_a_comparison_makes_images_of_the_labels(main, model, data, class_map, monkeypatch):
    made = []
    real = comparison.Comparison.__init__

    def spied(self, pipe, tuned, plan, items, *rest):
        made.append(items)
        real(self, pipe, tuned, plan, items, *rest)

    monkeypatch.setattr(comparison.Comparison, "__init__", spied)
    given = ["bench", "--model", model, "--data", data, "--schedules", "full", *SMALL]
    status, _, lines = main(*given, "--class-map", class_map, "-o", "bench")
    assert (status, made) == (0, [(4, 9)])
    assert said(lines, "comparing with 6 images").endswith("labels bee=4, ant=9")


def test_labels_beyond_the_models(refused, finetune, model, data, class_map, tmp_path):
    pipe = DiTPipeline.from_pretrained(model)
    config = {**pipe.transformer.config, "num_embeds_ada_norm": 8}
    pipe.register_modules(transformer=DiTTransformer2DModel.from_config(config))
    pipe.save_pretrained(model)
    message = refused(*finetune, "--class-map", class_map)
    assert "class ant of" in message
    assert "has the label 9, the model has 8 classes, 0 to 7" in message
    assert len(message) <= 400
    class_map.write_text(json.dumps({"ant": 1}))
    assert "no label for 1 of 2 classes" in refused(*finetune, "--class-map", class_map)
    assert list((tmp_path / "cwd").iterdir()) == []


def test_pictures_passed_over_warn_in_a_line(main, finetune, data, without_comparison):
    for suffix in ("tif", "gif"):
        (data / "ant" / f"4.{suffix}").write_bytes(b"")
    shutil.copy(data / "ant" / "0.png", data / "ant" / "4.png")
    status, _, lines = main(*finetune)
    assert status == 0
    assert said(lines, "accelkit: warning: passed over pictures").count("2 (1 .gif, 1 .tif)") == 1
    said(lines, "training on 7 images")
