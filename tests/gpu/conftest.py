"""Before CUDA starts: tests that compare in fp32 want its products in fp32, which Transformer Engine makes in TF32."""

import os

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
