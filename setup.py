"""Package data of swiftlite; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "swiftlite/__init__.py").read_text(encoding="utf-8"), re.M)

setup(
    name="swiftlite",
    version=VERSION.group(1) if VERSION else "0",
    description="Fine-tune language models on Hugging Face or Megatron-core, and convert checkpoints between the two",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["swiftlite", "swiftlite.*"]),
    package_data={"swiftlite": ["py.typed", "**/*.json", "**/*.jsonl", "**/*.jinja"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=4.57,<6",
        "safetensors>=0.5",
        "numpy>=1.26",
        "peft>=0.18",
        "modelscope>=1.30",
        "datasets>=3.0",
        "accelerate>=1.6",
        "jinja2>=3.1",
        "pyyaml>=6.0",
        "packaging>=24",
        "tqdm>=4.66",
        "xxhash>=3.4",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
    ],
    extras_require={
        # Python 3.11 can only install 0.16.x; 3.12 and later also 0.17 to 0.19.
        "megatron": ["megatron-core>=0.16.1,<0.20", "psutil"],
        "te": ["transformer-engine[pytorch]>=2.8"],
        "dev": [
            "trl>=0.24",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "compressed-tensors>=0.15",
        ],  # fmt: skip
    },
    entry_points={"console_scripts": ["swiftlite=swiftlite.cli.main:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
