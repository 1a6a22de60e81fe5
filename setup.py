"""Packaging: the top-level folders become sub-packages of ``zoo``, so nothing else is put into site-packages."""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"zoo.backbones": "backbones", "zoo.kernels": "kernels", "zoo.mllm": "mllm", "zoo.tools": "tools"}

packages = find_packages(include=["zoo", "zoo.*"])
for name, folder in FOLDERS.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

# mmdet and mmsegmentation want mmcv < 2.2. Python 3.12 has no distutils, which mmengine takes from setuptools; mmseg
# imports ftfy and regex without saying so.
dense = ["mmengine>=0.10.7,<1", "mmcv-lite==2.1.0", "mmdet==3.3.0", "mmsegmentation==1.2.2"]
dense += ["ftfy", "regex", 'setuptools; python_version >= "3.12"', "supervision>=0.25"]
# num2words is for the processor of SmolVLM.
mllm = ["transformers>=5.17", "gguf>=0.10", "peft>=0.17", "num2words", "open_clip_torch>=2.24"]
serve = ["gradio>=6.20,<7", "fastapi>=0.115", "fastapi-offline>=1.7", "uvicorn"]
export = ["onnx>=1.18", "onnxscript>=0.5.4", "onnxruntime>=1.23", "pyarrow"]
# Ray Data brings pyarrow; 2.64 is to lose the argument that bounds the retries of an actor.
bulk = ["ray[data]>=2.55,<2.64", "fsspec"]
bench = ["matplotlib"]
train = ["accelerate>=1.0", "tensorboard", "pyyaml", "resvg_py>=0.3"]
everything = [*dense, *mllm, *serve, *export, *bench, *train]
checks = ["build", "hypothesis", "pre-commit", "pytest>=8", "pytest-xdist", "setuptools>=77"]
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
        "zoo": ["weights/**/*", "samples/*", "scenes/*", "serve/page.*"],
        "zoo.configs": ["**/*.yaml", "**/*.py"],
    },
    install_requires=[
        "torch>=2.9",
        "torchvision",
        "timm>=1.0.29",
        "pillow>=10.1",
        "safetensors>=0.4.5",
        "huggingface_hub>=0.27",
        "filelock>=3.12",
        "numpy>=1.26",
        "typer>=0.15",
        "rich>=14.3",
    ],
    extras_require={
        "dense": dense,
        "mllm": mllm,
        "serve": serve,
        "export": export,
        "bulk": bulk,
        "bench": bench,
        "train": train,
        "all": [*everything, *bulk],
        "dev": [*everything, *checks, *formatter],
    },
    entry_points={
        "console_scripts": ["zoo = zoo.cli:app"],
        "lmms_eval.models": ["zoo_mllm = zoo.mllm.lmms_adapter:manifest"],
    },
)
