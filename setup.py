"""Packaging: the top-level folders become sub-packages of ``zoo``, so nothing else is put into site-packages."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"zoo.backbones": "backbones", "zoo.kernels": "kernels", "zoo.tools": "tools"}

packages = find_packages(include=["zoo", "zoo.*"])
for name, folder in FOLDERS.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

dense: list[str] = []
mllm: list[str] = []
serve: list[str] = []
export = ["pyarrow"]
train = ["accelerate>=1.0", "tensorboard", "pyyaml", "resvg_py>=0.3"]
everything = [*dense, *mllm, *serve, *export, *train]
checks = ["build", "hypothesis", "pre-commit", "pytest>=8", "pytest-xdist", "setuptools>=77", "transformers"]
# The formatter's output differs between its versions, so there is one version of it.
formatter = ["ruff==0.17.6"]

setup(
    name="linear-vision-zoo",
    version="0.1.0",
    description="Linear-complexity vision backbones as first-class timm models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*packages, "zoo.configs"],
    package_dir={**FOLDERS, "zoo.configs": "configs"},
    package_data={
        "zoo": ["weights/*", "samples/*"],
        "zoo.configs": ["**/*.yaml"],
    },
    install_requires=[
        "torch>=2.9",
        "torchvision",
        "timm>=1.0.29",
        "pillow",
        "safetensors",
        "huggingface_hub",
        "filelock",
        "numpy",
        "typer>=0.15",
        "rich",
    ],
    extras_require={
        "dense": dense,
        "mllm": mllm,
        "serve": serve,
        "export": export,
        "train": train,
        "all": everything,
        "dev": [*everything, *checks, *formatter],
    },
    entry_points={"console_scripts": ["zoo = zoo.cli:app"]},
)
