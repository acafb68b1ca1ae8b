"""The latent cache: its files, its key, its precision, and races between processes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from accelkit.data.latents import encode_latents
from accelkit.data.shards import INDEX
from accelkit.data.sources import open_source
from accelkit.errors import AccelkitError


def autoencoder(**config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            sample_size=16,
            **{"norm_num_groups": 4, **config},
        ).eval()


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def encode(folder, vae, cache, **options):
    source = open_source(folder, skip_bad=options.pop("skip_bad", False))
    return encode_latents(source, vae, size=16, cache_dir=cache, batch=4, **options)


def test_files_hold_unscaled_posteriors_and_where_each_came_from(folder, tmp_path):
    (folder / "ant" / "1.png").write_bytes(b"broken")
    vae = autoencoder(scaling_factor=0.25)
    latents = encode(folder, vae, tmp_path / "cache", skip_bad=True, flip=True)
    assert latents.classes == ("ant", "bee")
    index = json.loads((latents.path / INDEX).read_text())
    assert index["files"] == ["shard-00000.safetensors"]
    shard = load_file(latents.path / "shard-00000.safetensors")
    assert shard["index"].tolist() == [0, 2, 3, 4, 5] * 2
    assert shard["label"].tolist() == [0, 0, 1, 1, 1] * 2
    assert {str(shard[n].dtype) for n in ("mean", "std")} == {"torch.float32"}
    with Image.open(folder / "bee" / "0.png") as image:
        x = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        plain, mirrored = (vae.encode(v).latent_dist for v in (x, x.flip(-1)))
    for row, posterior in ((2, plain), (7, mirrored)):
        torch.testing.assert_close(shard["mean"][row], posterior.mean[0])
        torch.testing.assert_close(shard["std"][row], posterior.std[0])


def test_scaling_needs_no_new_latents_but_architecture_and_precision_do(folder, tmp_path):
    first = encode(folder, autoencoder(), tmp_path / "cache")
    scaled = encode(folder, autoencoder(scaling_factor=2.0, shift_factor=0.5), tmp_path / "cache")
    assert scaled.path == first.path
    z, at = torch.zeros(6, *first.shape), torch.arange(6)
    unscaled = first.sample(at, z) / 0.18215
    torch.testing.assert_close(scaled.sample(at, z), (unscaled - 0.5) * 2)
    # the same weights, in other groups
    assert encode(folder, autoencoder(norm_num_groups=2), tmp_path / "cache").path != first.path
    # the same values, in another type
    rounded = autoencoder().half()
    half = encode(folder, rounded, tmp_path / "cache")
    assert half.path != encode(folder, rounded.float(), tmp_path / "cache").path
    assert half.sample(at, z).dtype == torch.float32
    torch.testing.assert_close(half.sample(at, z), first.sample(at, z), atol=5e-3, rtol=0)


def test_a_strict_call_leaves_a_lenient_ones_cache_in_place(folder, tmp_path):
    (folder / "ant" / "1.png").write_bytes(b"broken")
    lenient = encode(folder, autoencoder(), tmp_path / "cache", skip_bad=True)
    with pytest.raises(AccelkitError, match=r"ant/1\.png"):
        encode(folder, autoencoder(), tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [lenient.path.name]
    assert (lenient.path / INDEX).is_file()


def test_a_cache_that_cannot_be_a_folder_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AccelkitError, match=r"cannot write latents to .*file.*ACCELKIT_CACHE"):
        encode(folder, autoencoder(), tmp_path / "file")


def test_a_folder_without_an_index_is_written_again(folder, tmp_path):
    first = encode(folder, autoencoder(), tmp_path / "cache")
    (first.path / INDEX).unlink()
    with pytest.warns(UserWarning, match="broken"):
        again = encode(folder, autoencoder(), tmp_path / "cache")
    assert (again.path / INDEX).is_file()
    assert len(again) == 6


def test_another_process_may_finish_just_before(folder, tmp_path, monkeypatch):
    rename, others = Path.rename, []

    def late(self, target):
        if self.name.startswith("partial-") and not others:
            others.append(None)  # the other process renames without delay
            others.append(encode(folder, autoencoder(), tmp_path / "cache"))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    latents = encode(folder, autoencoder(), tmp_path / "cache")
    z, at = torch.zeros(6, *latents.shape), torch.arange(6)
    assert torch.equal(latents.sample(at, z), others[1].sample(at, z))
    assert latents.path == others[1].path
    assert [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [latents.path.name]
