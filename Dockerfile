# The command line on a CPU, as a user without rights:
#
#   docker build --tag nnprune-backdoor .
#   docker run --rm --network none --volume "$PWD:/work" nnprune-backdoor \
#       scan stranger.pth --arch resnet18 --clean images/
#
# PyTorch's default wheels hold CUDA, several gigabytes; its site names the index of those for CPUs:
# --build-arg TORCH_INDEX=ADDRESS.
FROM python:3.11-slim

ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision

COPY setup.cfg pyproject.toml README.md LICENSE MANIFEST.in /src/
COPY nnprune_backdoor /src/nnprune_backdoor
RUN pip install --no-cache-dir '/src[plots]' && rm -r /src

RUN useradd --create-home --uid 1000 scanner
USER scanner
WORKDIR /work
ENTRYPOINT ["nnprune-backdoor"]
CMD ["--help"]
