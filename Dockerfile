# Image for training and prediction on machines with NVIDIA GPUs:
#
#   docker build -t locreweight .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/datasets:/app/datasets" \
#     -v "$PWD/output:/app/output" -v "$PWD/configs:/app/configs" locreweight \
#     python train_net.py --num-gpus 1 --config-file configs/mine.yaml
#
# PyTorch's wheels contain CUDA, so the machine needs only NVIDIA's driver and container toolkit.
# Another PyTorch, as for make: --build-arg TORCH="torch==... torchvision==... --index-url <index>".
FROM python:3.12-slim-bookworm

# The package index's copy of Detectron2 needs neither a compiler nor git.
ARG DETECTRON2=pypi
ARG TORCH=""

WORKDIR /app
# Only what the installation reads, so that a change of the code does not repeat it.
COPY setup.cfg pyproject.toml LICENSE ./
COPY tools/setup_env.py tools/
COPY projects/LocReweightTeacher/locreweight/__init__.py projects/LocReweightTeacher/locreweight/
RUN python tools/setup_env.py && rm -rf /root/.cache
COPY . .

ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1
CMD ["python", "train_net.py", "--help"]
