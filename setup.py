from setuptools import setup

setup(
    name="sddm",
    version="0.1.0",
    description="Score-decomposed diffusion models on manifolds, for unpaired image-to-image translation",
    license="MIT",
    packages=["guided_diffusion", "resizer"],
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy", "safetensors", "pillow>=10.1", "tqdm", "blobfile"],
)
