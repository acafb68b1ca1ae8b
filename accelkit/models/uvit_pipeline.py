"""Sampling from a U-ViT in pixels or latents, with any of diffusers' samplers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from accelkit.backbones.autoencoders import scaling
from accelkit.errors import AccelkitError
from accelkit.models.uvit import UViTTransformer2DModel
from accelkit.noise.axis import NoiseAxis

Generators = torch.Generator | list[torch.Generator] | None

_PREDICTED = ("discrete VP", "continuous VP, linear beta")
"""Processes for which the network's prediction of the noise is right."""


class UViTPipeline(DiffusionPipeline):
    """Images from a U-ViT (Bao et al. 2023).

    Saved, it opens with ``UViTPipeline.from_pretrained`` or :func:`accelkit.from_pretrained`;
    ``diffusers.DiffusionPipeline`` looks for pipelines in diffusers alone. A scheduler's timestep
    is the index 0..999 of the process; the network is given another number, computed from its
    config (:meth:`UViTTransformer2DModel.timestep_of`).

    Args:
        transformer: the network.
        scheduler: a scheduler of diffusers for a model that predicts the noise.
        vae: the autoencoder of a network in latents; None for a network in pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - diffusers' own

    def __init__(
        self,
        transformer: UViTTransformer2DModel,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            class_labels: a class for each image; None without classes.
            batch_size: number of images for a network without classes, 1 by default; with classes,
                it is the number of labels.
            guidance_scale: s in u + s (c - u), for the prediction without (u) and with label (c),
                as in DiT and diffusers; 1 is no guidance. The U-ViT paper writes
                c + s' (c - u), which is s = 1 + s': its 0.4 and 0.7 on ImageNet are 1.4 and 1.7.
            num_inference_steps: number of steps of the scheduler.
            generator: one for all images, or one for each image, which then does not depend on the
                rest of the batch.
            output_type: ``"pil"``, ``"np"`` (B, H, W, C) or ``"pt"`` (B, C, H, W), floats in
                [0, 1], or ``"latent"``, the sampler's result.
            return_dict: False returns a tuple of one.

        Returns:
            ``.images``.

        Raises:
            AccelkitError: labels are missing or not among the network's classes; there are neither
                one generator nor as many as images; guidance is asked of a network that was never
                trained without labels; the output type is unknown; or the scheduler's process is
                neither one with betas nor the VP SDE.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise AccelkitError(f"output_type={output_type!r}; give pil, np, pt or latent")
        if not NoiseAxis.of(self.scheduler).kind.startswith(_PREDICTED):
            raise AccelkitError(
                f"a U-ViT predicts the noise, which {type(self.scheduler).__name__} does not "
                "sample with; give a scheduler of a process with betas, or of the VP SDE"
            )
        config, device = self.transformer.config, self._execution_device
        guided = guidance_scale != 1
        if batch_size is not None and batch_size < 1:
            raise AccelkitError(f"give a batch_size of at least 1, got {batch_size}")
        labels = self._labels(class_labels, guided)
        batch = (batch_size or 1) if labels is None else len(labels)
        if isinstance(generator, list) and len(generator) != batch:
            raise AccelkitError(
                f"got {len(generator)} generators for {batch} images; give one, or one for each"
            )
        side = config.sample_size
        shape = (batch, config.in_channels, side, side)
        x = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)

        # Timesteps stay on the CPU, where reading one does not synchronise with the device.
        self.scheduler.set_timesteps(num_inference_steps)
        if hasattr(
            self.scheduler, "set_begin_index"
        ):  # Two timesteps may be rounded to the same number.
            self.scheduler.set_begin_index(0)
        x = x * self.scheduler.init_noise_sigma
        options = self._step_options(generator)
        for t in self.progress_bar(self.scheduler.timesteps):
            eps = self._predict(self.scheduler.scale_model_input(x, t), t, labels, guidance_scale)
            x = self.scheduler.step(eps, t, x, **options).prev_sample
        images = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None, scale: float) -> Tensor:
        timestep = self.transformer.timestep_of(t.reshape(1))
        if scale == 1 or labels is None:
            return self.transformer(x, timestep, labels).sample
        null = torch.full_like(labels, self.transformer.config.null_class)
        both = self.transformer(torch.cat([x, x]), timestep, torch.cat([labels, null])).sample
        cond, uncond = both.chunk(2)
        return uncond + scale * (cond - uncond)

    def _images(self, x: Tensor, output_type: str) -> Any:
        if self.vae is not None:
            shift, scale = (v.to(x) if isinstance(v, Tensor) else v for v in scaling(self.vae))
            x = self.vae.decode(x / scale + shift).sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)

    def _labels(self, labels: Sequence[int] | None, guided: bool) -> Tensor | None:
        config = self.transformer.config
        if guided and config.null_class is None:
            raise AccelkitError(
                "guidance needs a network whose labels were sometimes dropped in training, which "
                "this one's were not; leave guidance_scale at 1"
            )
        if config.num_classes is None:
            if labels is not None:
                raise AccelkitError("this U-ViT has no classes; give batch_size, not class_labels")
            return None
        if labels is None:
            raise AccelkitError(f"this U-ViT has {config.num_classes} classes; give class_labels")
        given = [] if isinstance(labels, int) else [int(label) for label in labels]
        if not given:
            raise AccelkitError(
                f"class_labels takes a class for each image, such as [0, 1], got {labels!r}"
            )
        if outside := [label for label in given if not 0 <= label < config.num_classes]:
            raise AccelkitError(
                f"this U-ViT has classes 0 to {config.num_classes - 1}, got {outside[0]}"
            )
        return torch.tensor(given, device=self._execution_device)

    def _step_options(self, generator: Generators) -> dict[str, Any]:
        """Return the generators as an option, if the sampler draws noise and takes them."""
        takes = inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if "generator" in takes else {}
