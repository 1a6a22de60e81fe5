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
export: list[str] = []
train = ["accelerate>=1.0", "tensorboard", "pyyaml", "resvg_py>=0.3"]
extras = {
    "dense": dense,
    "mllm": mllm,
    "serve": serve,
    "export": export,
    "train": train,
    "all": [*dense, *mllm, *serve, *export, *train],
    "dev": [*train, "pytest>=8", "pytest-xdist", "hypothesis", "ruff", "build", "pyarrow"],
}

setup(
    name="linear-vision-zoo",
    version="0.1.0",
    description="Linear-complexity vision backbones as first-class timm models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
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
        "numpy",
        "typer>=0.15",
        "rich",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["zoo = zoo.cli:app"]},
)
