# swiftlite on NVIDIA GPUs, with Transformer Engine.
#
#   docker build -t swiftlite .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" swiftlite env
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" -e NPROC_PER_NODE=8 swiftlite megatron sft run.yaml
#
# The toolkit stays in the image: Transformer Engine and Triton compile kernels when they are first used.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/swiftlite
ENV PATH=/opt/swiftlite/bin:$PATH PIP_NO_CACHE_DIR=1
COPY tests/constraints.txt /tmp/constraints.txt
# Transformer Engine's extension of torch is compiled against this torch.
# hadolint ignore=DL3013
RUN pip install torch==2.13.0 setuptools wheel ninja pybind11 \
    && pip install --no-build-isolation "transformer-engine[pytorch,core-cu13]==2.20.2"
COPY README.md LICENSE pyproject.toml setup.py /src/
COPY swiftlite /src/swiftlite
RUN pip install -c /tmp/constraints.txt "/src[megatron,te,qlora,html]"
RUN useradd --create-home --uid 1001 swiftlite && mkdir /work && chown swiftlite /work
USER 1001
WORKDIR /work
ENTRYPOINT ["swiftlite"]
CMD ["--help"]
