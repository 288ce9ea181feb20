# Avito AI API. Models are mounted, settings come from the environment: docs/containers.md.
# The tag follows the corrections of its Debian and Python; `make pin-digests` nails it down.
FROM python:3.12-slim-bookworm

LABEL org.opencontainers.image.title="Avito AI API" \
      org.opencontainers.image.version="0.4.0"

# torch.compile builds small launchers when it starts; without a compiler steps run uncompiled. No pinned version:
# Debian's mirrors keep the newest one of a release only.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# By number, so that an orchestrator can see that it is not root. The folders are its own, and so are volumes made
# from them.
RUN groupadd --gid 10001 avito \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/cache/avito-ai --shell /usr/sbin/nologin avito \
    && install --directory --owner=10001 --group=10001 /var/cache/avito-ai /var/log/avito-ai

WORKDIR /app
# torch as the package index has it is the build for CUDA. `--build-arg PIP_EXTRA_INDEX_URL=...` adds the index of
# another build, for an older driver.
ARG PIP_EXTRA_INDEX_URL
COPY requirements.txt ./
RUN pip install --no-cache-dir --root-user-action=ignore --requirement requirements.txt

COPY *.py ./
COPY models ./models
COPY static ./static
COPY templates ./templates
COPY tools/service_client.py ./tools/

# Whatever a library keeps in its user's home (compiled kernels of torch, Triton and the driver) goes to the volume.
ENV HOME=/var/cache/avito-ai \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    AVITO_ENV=production \
    AVITO_HOST=0.0.0.0 \
    AVITO_PORT=8085 \
    AVITO_COMPILE_CACHE=/var/cache/avito-ai/compile

USER 10001:10001
VOLUME ["/var/cache/avito-ai", "/var/log/avito-ai"]
EXPOSE 8085

# Alive, not ready: while models load a container is healthy, and whether to send it requests is for the balancer.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['AVITO_PORT'] + '/api/health/live', timeout=4)"]

CMD ["python", "-m", "gunicorn", "-c", "gunicorn_config.py"]
