"""Ways to spoil a model, and what a folder holds."""

import os

WEIGHTS = "diffusion_pytorch_model.safetensors"


def content(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def cut_weights(model):
    path = model / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-5000])


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("ran",))
