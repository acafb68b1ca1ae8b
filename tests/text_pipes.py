"""Tiny pipelines that are prompted by text: random weights, tokenizers that spell."""

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<pad>", "<unk>", "</s>", "<s>", *"abcdefghijklmnopqrstuvwxyz "]
WIDTH = 16
FLOW = {"shift": 3.0}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(length=120, words=WORDS):
    """One token per letter and one at the end."""
    spelled = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    spelled.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    spelled.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelled,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        bos_token="<s>",
        model_max_length=length,
    )


def filled(network, std=0.1):
    """Without a zero weight, so that all of it shows in the output."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return network.eval()


def t5():
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return filled(transformers.T5EncoderModel(config), 0.5)


def clip(projected=True):
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH // 2 if projected else WIDTH,
        intermediate_size=16,
        projection_dim=WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        eos_token_id=2,
        bos_token_id=3,
        pad_token_id=0,
    )
    named = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return filled(getattr(transformers, named)(config), 0.5)


def vae(channels=4, levels=2, shift=0.1):
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.5,
        shift_factor=shift,
    ).eval()


def pixart(layers=4, scheduler=None, **options):
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=WIDTH,
        use_additional_conditions=False,
        **options,
    )
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.PixArtAlphaPipeline(
        tokenizer(), t5(), vae(), scheduler=scheduler, transformer=filled(transformer)
    )


def sd3(layers=4):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=filled(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(),
    )


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
        vae=vae(),
        text_encoder=clip(projected=False),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=filled(transformer),
    )


def hunyuan():
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=8,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
    )
    bert = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return diffusers.HunyuanDiTPipeline(
        vae=vae(levels=4),
        text_encoder=filled(transformers.BertModel(bert), 0.5),
        tokenizer=tokenizer(77),
        transformer=filled(transformer),
        scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(256),
    )


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
        timestep_scale=0.5,
    )
    dc = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer(300),
        text_encoder=gemma(),
        vae=dc.eval(),
        transformer=filled(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )


def unet(**options):
    """One block on the way down, the middle one, two on the way up."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return filled(diffusers.UNet2DConditionModel(**{**settings, **options}))


def sd():
    return diffusers.StableDiffusionPipeline(
        vae=vae(shift=None),
        text_encoder=clip(projected=False),
        tokenizer=tokenizer(77),
        unet=unet(),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SCALED),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl():
    pooled, numbers = WIDTH // 2, 8
    network = unet(
        cross_attention_dim=WIDTH + WIDTH // 2,  # of both encoders
        addition_embed_type="text_time",
        addition_time_embed_dim=numbers,
        projection_class_embeddings_input_dim=pooled + 6 * numbers,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(levels=4, shift=None),
        text_encoder=clip(projected=False),
        text_encoder_2=clip(),
        tokenizer=tokenizer(77),
        tokenizer_2=tokenizer(77),
        unet=network,
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1, **SCALED),
        add_watermarker=False,
    )


def wan():
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=16,
    )
    umt5 = transformers.UMT5Config(
        vocab_size=len(WORDS), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    video = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.5, 0.5, 1.0],
    )
    return diffusers.WanPipeline(
        tokenizer(),
        filled(transformers.UMT5EncoderModel(umt5), 0.5),
        video.eval(),
        diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        filled(transformer),
    )


def auraflow():
    """A pipeline around a network that accelkit knows from a trial call only."""
    transformer = diffusers.AuraFlowTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        tokenizer(),
        t5(),
        vae(),
        filled(transformer),
        diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
    )


def gemma():
    config = transformers.Gemma2Config(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    return filled(transformers.Gemma2Model(config), 0.5)


def lumina2():
    """Another such network, which is given 1 - t / 1000 and predicts the negative."""
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        filled(transformer),
        diffusers.FlowMatchEulerDiscreteScheduler(**FLOW),
        vae(),
        gemma(),
        tokenizer(256),
    )


def make(family, **options):
    """Return a family's pipeline, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = globals()[family](**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


FAMILIES = ("pixart", "sd3", "flux", "hunyuan", "sana", "sd", "sdxl", "wan")
