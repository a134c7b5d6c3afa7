# The image of every node of a cluster, for cluster=kuberay and for `ray up`:
#
#   docker build -t REGISTRY/NAME:TAG . && docker push REGISTRY/NAME:TAG
#
# Your own code goes on top, in a Dockerfile of yours: FROM REGISTRY/NAME:TAG, then COPY --chown=1000 mypackage mypackage
# (the working directory is on Python's path), or RUN pip install what it needs.
#
# PYTHON       the base image; another patch release of 3.11 will do
# TORCH_INDEX  where else torch is looked for: https://download.pytorch.org/whl/cpu for an image of a tenth of the size.
#              Without it PyPI's is taken, which has CUDA in it.
# PACKAGES     more packages, space between them: "boto3 einops==0.8.1"
ARG PYTHON=python:3.11.14-slim-bookworm

# A wheel of this tree, and the list of what it needs, which changes less often than the code.
FROM ${PYTHON} AS build
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --disable-pip-version-check hatchling -c constraints.txt
COPY pyproject.toml README.md LICENSE ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['optuna'], sep='\n')" > requirements.txt
COPY configs configs
COPY hydra_plugins hydra_plugins
COPY raytrainer raytrainer
RUN pip wheel --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON}
ARG TORCH_INDEX=""
ARG PACKAGES=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONPATH=/home/ray/app \
    GIT_PYTHON_REFRESH=quiet
# wget: KubeRay's probes of a pod's health ask with it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --user-group --create-home --shell /bin/bash ray \
    && install --directory --owner=1000 --group=1000 /home/ray/app
COPY constraints.txt /opt/raytrainer/
COPY --from=build /src/requirements.txt /opt/raytrainer/
RUN pip install -r /opt/raytrainer/requirements.txt -c /opt/raytrainer/constraints.txt ${PACKAGES} \
    ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}}
COPY --from=build /wheels /opt/raytrainer/wheels
RUN pip install --no-deps /opt/raytrainer/wheels/*.whl

# A number, by which Kubernetes sees that it is not root.
USER 1000:1000
WORKDIR /home/ray/app
# An image that cannot compose and import is not built.
RUN python -m raytrainer --cfg job experiment=smoke > /dev/null && python -c "import mlflow, ray, torch, raytrainer.attempt"
CMD ["python", "-m", "raytrainer", "--help"]
