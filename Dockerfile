# SPDX-License-Identifier: Apache-2.0
# The page in a container, without torch, as a user without rights.
#
#   docker build -t wordbox .
#   docker run --rm -p 127.0.0.1:7860:7860 wordbox
#
# docs/guide/deploy.md says more: a reverse proxy with TLS and a password, read-only, other weights, Label Studio.

FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
WORKDIR /wordbox
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
# Packages first: they change seldom, and their layer is kept. Their tests are a tenth of them.
COPY requirements-light.lock ./
RUN pip install --no-compile --require-hashes --no-deps -r requirements-light.lock \
    && find /venv -type d -name tests -prune -exec rm -rf {} +
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY scripts scripts
COPY configs configs
COPY weights weights
COPY ovd ovd
COPY pretrain pretrain
# The wheel carries the default detector as ONNX graphs. What only builds it goes again, then all is compiled once.
RUN PYTHONPATH=. python scripts/build_wheel.py --out dist \
    && pip install --no-compile --no-deps dist/*.whl \
    && pip uninstall --yes hatchling editables pathspec trove-classifiers setuptools pip \
    && python -m compileall -q /venv/lib

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 wordbox
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /home/wordbox
USER wordbox
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/', timeout=4).read(1)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["wordbox", "demo", "--host", "0.0.0.0"]
CMD ["--port", "7860"]
