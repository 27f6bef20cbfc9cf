"""SDDMPipeline for the argument `custom_pipeline` of DiffusionPipeline.from_pretrained; see its module."""

from guided_diffusion.diffusers_pipeline import SDDMPipeline

__all__ = ["SDDMPipeline"]
