# The project's images; docs/deployment.md says how to run them.
#
#   docker build --target cpu   --tag dropserve:cpu   .    serves on a CPU
#   docker build --target cuda  --tag dropserve:cuda  .    serves on an NVIDIA GPU
#   docker build --target train --tag dropserve:train .    trains and exports
#
# A serving image is a virtual environment and a bundle, copied from the stages that made them, so
# it holds neither torch nor pip.

FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY deploy/requirements.py deploy/cuda-libraries.txt deploy/

FROM build AS train
# The index of torch's CPU builds. Without it torch comes from the index of all other packages, and
# PyPI's build brings gigabytes of CUDA libraries, which a network of this size does not need.
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"; \
    fi \
    && python deploy/requirements.py cpu train > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY dropserve dropserve
COPY model model
COPY export export
RUN python -m dropserve train --data digits --out /runs/digits \
    && python -m dropserve export /runs/digits --models /models

FROM build AS cpu-packages
RUN python -m venv --without-pip /opt/dropserve \
    && python deploy/requirements.py cpu otel > requirements.txt \
    && pip --python /opt/dropserve/bin/python install \
        --constraint constraints.txt --requirement requirements.txt

FROM build AS cuda-packages
RUN python -m venv --without-pip /opt/dropserve \
    && python deploy/requirements.py cuda otel > requirements.txt \
    && pip --python /opt/dropserve/bin/python install --constraint constraints.txt \
        --constraint deploy/cuda-libraries.txt --requirement requirements.txt

FROM build AS project
COPY README.md ./
COPY dropserve dropserve
COPY model model
COPY export export
COPY app app
RUN pip install --no-deps --target /project .

FROM python:3.11-slim-bookworm AS served
LABEL org.opencontainers.image.title="dropserve" \
      org.opencontainers.image.description="Serves predictions of networks with dropout, and their uncertainty" \
      org.opencontainers.image.version="0.2.0"
# PYTHONSAFEPATH: modules in the working directory never shadow the service's.
ENV PATH=/opt/dropserve/bin:$PATH \
    PYTHONPATH=/project \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DROPSERVE_MODELS=/models \
    DROPSERVE_HOST=0.0.0.0
COPY --from=train /models /models
COPY --from=project /project /project
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-ISc", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('DROPSERVE_PORT', 8000)), timeout=2); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "dropserve.app"]

FROM served AS cuda
# Not auto, with which an image for GPUs would run on a CPU without anybody noticing.
ENV DROPSERVE_DEVICE=cuda
COPY --from=cuda-packages /opt/dropserve /opt/dropserve

FROM served AS cpu
ENV DROPSERVE_DEVICE=cpu
COPY --from=cpu-packages /opt/dropserve /opt/dropserve
