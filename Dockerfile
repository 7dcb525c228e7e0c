# The command line with all extras:
#   docker build --tag perf-vit .
#   docker run --rm --volume "$PWD:/data" perf-vit predict --checkpoint best.ckpt --input scene.tif --output map.tif
# With GPUs: docker run --gpus all. EXTRAS=geo makes an image that only predicts.
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY perf_vit perf_vit
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.12-slim-bookworm
ARG EXTRAS=all
COPY --from=build /dist /dist
RUN python -m pip install --no-cache-dir "$(echo /dist/*.whl)[${EXTRAS}]" \
    && useradd --create-home --uid 1000 user
USER 1000
WORKDIR /data
ENTRYPOINT ["perf-vit"]
CMD ["--help"]
