"""Package definition. Versions are pinned where another one is known to break (docs/decisions.md)."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

HF = ["transformers>=4.57,<6"]  # d2v export --format hf
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]  # d2v export --format onnx
FINETUNE = ["timm>=1.0.9,<2", "torchvision==0.26.0"]  # RandAugment, mixup; the torchvision of torch 2.11
EVAL = ["jiwer>=3,<5"]  # d2v eval ctc
CTC = [*EVAL, "flashlight-text>=0.0.7,<0.1"]  # d2v eval ctc --decoder beam; its wheels bring KenLM

TEST = ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.6", "moto[s3,server]>=5"]
REMOTE = [
    "fsspec[http]>=2025.3",
    "s3fs>=2025.3",
    "gcsfs>=2025.3",
    "huggingface_hub>=0.30",
]  # shards elsewhere

setup(
    name="d2v_ds",
    version="0.1.0",
    description="Train data2vec models (1.0 and 2.0) on images, speech and text, at any scale, on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=[*find_namespace_packages(include=["d2v_ds*"]), "shards", "ds_configs"],
    package_data={"ds_configs": ["*.json"], "shards": ["sample/*"]},
    install_requires=[
        "torch==2.11.0",  # brings the triton built for it
        "torchaudio==2.11.0",
        "deepspeed==0.19.8",
        "webdataset>=1.0.2,<1.1",
        "isal>=1.7; platform_machine in 'x86_64 aarch64'",  # crc32
        "sentencepiece>=0.2",
        "tokenizers>=0.20",  # byte-level BPE of released text models
        "tensorboard>=2.15",
        "safetensors>=0.4.3",
        "soundfile>=0.12",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "pillow>=10",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "pyarrow>=15",  # embeddings as parquet
        "scipy>=1.10",  # ImageNet's classes are in a file of MATLAB
        "scikit-learn>=1.3",  # the handwritten digits of the sample shards
        "setuptools>=70.1,<82",  # what DeepSpeed builds its operators with
        "ninja",
    ],
    extras_require={
        "hf": HF,
        "onnx": ONNX,
        "eval": EVAL,
        "ctc": CTC,
        "remote": REMOTE,
        "finetune": FINETUNE,
        "dev": [*TEST, *HF, *ONNX, *CTC, *REMOTE, *FINETUNE],
    },
    entry_points={"console_scripts": ["d2v=d2v_ds.cli:main"]},
)
