"""SDDM: score-decomposed diffusion models on manifolds, for unpaired image-to-image translation.

The package keeps guided-diffusion's module names and adds the method's own: `manifold`, `moo`, `energy`, `sddm`,
`baselines`, `checkpoint`, `engine`. Nothing is imported here, so that `import guided_diffusion` costs nothing.
"""

__version__ = "0.2.0"
