# SPDX-License-Identifier: Apache-2.0
# The page in a container, as a user without rights.
#
#   docker build -t wordbox --build-arg TORCH_INDEX=URL .     URL: an index with torch's CPU builds; without it the build
#   docker run --rm -p 127.0.0.1:7860:7860 wordbox            takes the package index's torch, with CUDA's libraries
#
# docs/guide/deploy.md says more: a reverse proxy with TLS and a password, read-only, other weights.

FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_USE_PEP517=1
WORKDIR /wordbox
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
# Packages first: they change seldom, and their layer is kept.
COPY requirements.lock ./
# torch from another index has other hashes than the lock file's, so that pair goes in by version; nothing else does.
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-deps --index-url "$TORCH_INDEX" $(grep -oE '^(torch|torchvision)==[^ ]+' requirements.lock) \
        && grep -vE '^(nvidia-|cuda-|triton)' requirements.lock > packages.lock; \
    else cp requirements.lock packages.lock; fi \
    && grep '^setuptools==' packages.lock > setuptools.lock \
    && pip install --require-hashes --no-deps -r setuptools.lock \
    && pip install --require-hashes --no-build-isolation -r packages.lock
COPY scripts/build_detectron2.py scripts/
RUN python scripts/build_detectron2.py
COPY pyproject.toml README.md LICENSE NOTICE app.py ./
COPY ovd ovd
COPY pretrain pretrain
RUN pip install --no-deps --no-build-isolation --editable .

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 wordbox
WORKDIR /wordbox
COPY --from=build /venv /venv
COPY --from=build /wordbox /wordbox
COPY configs configs
COPY datasets datasets
COPY weights weights
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER wordbox
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=90s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/', timeout=4).read(1)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["wordbox", "demo", "--host", "0.0.0.0"]
CMD ["--port", "7860"]
